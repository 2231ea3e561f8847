/* SPDX-License-Identifier: Apache-2.0 */
/* The rules of a translated packet: addresses, ports, checksums and hops alone are changed. */
#include <string.h>

#include "packets.h"

static bool is_zero16(const uint8_t *p)
{
	return !get16(p);
}

/* The value of a checksum that covers what may change: it stays the same, right or wrong. */
static uint32_t residue(uint64_t sum)
{
	return sum % 65535;
}

static uint64_t covered(const struct view *v, const struct frame *f)
{
	const uint32_t end = end_of(v, f);

	if (v->proto == ICMP)
		return sum16(f->b + v->l4, end - v->l4);
	return pseudo(v, f->b, end - v->l4, v->proto) + sum16(f->b + v->l4, end - v->l4);
}

static void allow(uint8_t *may, uint32_t at, uint32_t size)
{
	memset(may + at, 1, size);
}

static void check_inner(const struct program *p, const struct view *v, const struct frame *in,
			const struct result *r, uint8_t *may)
{
	const uint32_t l3 = v->inner_l3, l4 = v->inner_l4, end = end_of(v, in);
	const uint32_t size = v->version == 4 ? 4 : 16, at = l3 + (v->version == 4 ? 12 : 8);
	const uint8_t *b = in->b, *o = r->out.b;
	uint32_t check = l4 + (v->inner_proto == TCP ? 16 : 6);

	allow(may, at, 2 * size);
	if (v->version == 4) {
		allow(may, l3 + 10, 2);
		if (residue(sum16(b + l3, 20)) != residue(sum16(o + l3, 20)))
			violated(RULE_INNER_IP, p, in, r);
	}
	allow(may, l4, 4);
	if (v->inner_proto == SCTP || check + 2 > end)
		return;
	allow(may, check, 2);
	if (v->inner_proto != TCP && is_zero16(b + check)) {
		if (!is_zero16(o + check))
			violated(RULE_NO_CHECK, p, in, r);
	} else if (residue(sum16(b + at, 2 * size) + sum16(b + l4, 4) + get16(b + check)) !=
		   residue(sum16(o + at, 2 * size) + sum16(o + l4, 4) + get16(o + check))) {
		violated(RULE_INNER_CHECK, p, in, r);
	}
}

/* Notes what may become of a packet of a flow that begins where nobody can see how. */
void note_unseen(const struct view *v)
{
	const struct endpoint *from = find_frontend(&v->dst, v->dport, v->proto);
	const struct ends before = ends_of(v);

	if (from || find_backend(&v->dst, v->dport, v->proto))
		note_begun(&before);
	for (uint32_t i = 0; from && i < world.backend_count; i++) {
		const struct endpoint *to = &world.backends[i];
		struct ends after = before;

		if (to->service != from->service)
			continue;
		after.dst = to->a;
		after.dport = to->port;
		note_translation(&before, &after);
		/* It may have been masqueraded, too. */
		note_begun(&after);
	}
}

/* Says if a frontend's Service has a backend there: several may share one. */
static bool is_backend_of(const struct endpoint *frontend, const addr *a, uint16_t port)
{
	for (uint32_t i = 0; i < world.backend_count; i++)
		if (world.backends[i].service == frontend->service &&
		    same_addr(&world.backends[i].a, a) && world.backends[i].port == port)
			return true;
	return false;
}

/* Returns the frontend of a packet that becomes one to a backend of its Service, else NULL. */
static const struct endpoint *requested(const struct view *v, const struct view *w)
{
	const struct endpoint *from = find_frontend(&v->dst, v->dport, v->proto);

	return from && is_backend_of(from, &w->dst, w->dport) ? from : NULL;
}

static bool is_masquerade_port(uint16_t port)
{
	return port >= world.first_port && port <= world.last_port;
}

/* Says if a packet to a backend only gets another source, as where a client is masqueraded. */
static bool is_other_source(const struct ends *before, const struct ends *after)
{
	return find_backend(&before->dst, before->dport, before->proto) &&
	       same_addr(&before->dst, &after->dst) && before->dport == after->dport &&
	       (same_addr(&before->src, &after->src) || is_own(&after->src));
}

/*
 * Says if a reply of one of a Service's backends is translated to a client whose packet has begun
 * the flow, with one of our ports, but did not leave: it was dropped, or has yet to pass the device
 * where it is masqueraded.
 */
static bool answers_early(const struct ends *before, const struct ends *after)
{
	const struct ends request = reversed(after);
	const struct endpoint *from = find_frontend(&request.dst, request.dport, request.proto);

	if (!has_begun(&request) || !is_own(&before->dst) ||
	    (!is_masquerade_port(before->dport) && before->dport != after->dport))
		return false;
	return from ? is_backend_of(from, &before->src, before->sport)
		    : same_addr(&before->src, &after->src) && before->sport == after->sport;
}

/* Says if a request got one of this node's addresses, and not only kept one. */
static bool is_masqueraded(const struct view *v, const struct view *w)
{
	return is_own(&w->src) && (!same_addr(&v->src, &w->src) || v->sport != w->sport);
}

/* Says if a hook may have sent a request on itself, as it did. */
static bool may_send_on(const struct view *v, const struct view *w, const struct endpoint *frontend)
{
	const struct endpoint *to = find_backend(&w->dst, w->dport, w->proto);
	const bool is_tcp_udp = v->proto == TCP || v->proto == UDP;

	if (is_masqueraded(v, w))
		return world.bypasses || (world.has_xdp && is_tcp_udp);
	return world.sends_dsr && is_tcp_udp && same_addr(&v->src, &w->src) &&
	       v->sport == w->sport && frontend->is_outside && to && !to->is_here;
}

/*
 * The ends of a packet that a flow begins with, or that goes the same way, follow from the Services
 * and the options; all others from those.
 */
static void check_ends(struct program *p, const struct view *v, const struct view *w,
		       const struct frame *in, const struct result *r)
{
	const struct ends before = ends_of(v), after = ends_of(w);
	const bool is_known = is_known_translation(&before, &after);
	const bool is_sent_on = r->verdict != (p->kind == KIND_XDP ? 2 : -1);
	const bool keeps_source = same_addr(&v->src, &w->src);
	const struct endpoint *frontend = requested(v, w);

	if (same_addr(&v->src, &w->src) && same_addr(&v->dst, &w->dst) && v->sport == w->sport &&
	    v->dport == w->dport)
		return;
	if (frontend && p->is_ingress) {
		if (is_sent_on ? !may_send_on(v, w, frontend) : !keeps_source)
			violated(RULE_FORWARD, p, in, r);
		if (is_sent_on && !is_masqueraded(v, w)) {
			/* A pod that has another's address follows that one's flow. */
			if (p->is_of_pods && !is_known)
				violated(RULE_FORWARD, p, in, r);
			check_sent_option(p, v, is_known, in, r);
		}
	}
	if (is_known || answers_early(&before, &after))
		return;
	if (!frontend && !is_other_source(&before, &after)) {
		violated(RULE_ENDS, p, in, r);
		return;
	}
	if ((!keeps_source && !is_own(&w->src)) ||
	    (v->sport != w->sport && !is_masquerade_port(w->sport)))
		violated(RULE_SOURCE, p, in, r);
	note_translation(&before, &after);
	note_begun(&after);
}

/* An ICMP error is about a packet of a flow, whose sender gets it. */
static void check_quoted_ends(const struct program *p, const struct view *v, const struct view *w,
			      const struct frame *in, const struct result *r)
{
	const struct ends quoted = quoted_ends(v), becomes = quoted_ends(w);
	const struct ends before = { quoted.dst, quoted.src, quoted.dport, quoted.sport,
				     quoted.proto };
	const struct ends after = { becomes.dst, becomes.src, becomes.dport, becomes.sport,
				    becomes.proto };

	const struct ends reply = reversed(&after), answered = reversed(&before);

	/* Where a client is to be masqueraded, an error may be earlier than the packet. */
	if (!w->is_error ||
	    (!is_known_translation(&before, &after) && !is_other_source(&before, &after) &&
	     !answers_early(&before, &after) && !answers_early(&reply, &answered)) ||
	    (same_addr(&v->dst, &v->inner_src) && !same_addr(&w->dst, &w->inner_src)))
		violated(RULE_ENDS, p, in, r);
}

/* Adds what the packet's Service has to count: its length is that of IP. */
static void count_traffic(const struct view *v, const struct view *w)
{
	const uint32_t length = v->l3_length;
	bool is_unsure;

	if (v->is_error || !is_service_step(v, w, &is_unsure))
		return;
	if (is_unsure) {
		findings.unsure_packets++;
		findings.unsure_bytes += length;
	} else {
		findings.packets++;
		findings.bytes += length;
	}
}

/* What is sent with the option of DSR is translated as without. */
static void check_plain(struct program *p, const struct view *v, const struct frame *in,
			const struct result *r, const struct frame *out)
{
	const uint8_t *b = in->b, *o = out->b;
	const struct view w = read_frame(out, v->l3);
	const bool forwards = r->verdict != -1;
	const uint32_t size = v->version == 4 ? 4 : 16, at = v->l3 + (v->version == 4 ? 12 : 8);
	uint32_t hops = v->l3 + (v->version == 4 ? 8 : 7), check = v->l4;
	uint8_t may[ROOM] = { 0 };

	if (out->length != in->length) {
		violated(RULE_LENGTH, p, in, r);
		return;
	}
	if (!v->has_ports && !v->is_error && !v->is_later) {
		violated(RULE_NOTHING_SERVED, p, in, r);
		return;
	}
	if (forwards && p->kind != KIND_RAW)
		allow(may, 0, 12);
	allow(may, at, 2 * size);
	if (b[hops] != o[hops]) {
		allow(may, hops, 1);
		/* What leaves by the loopback device and is routed once more just passes there. */
		if ((!forwards && p->kind != KIND_LOOPBACK) || o[hops] + 1 != b[hops])
			violated(RULE_HOPS, p, in, r);
	}
	if (v->version == 4) {
		allow(may, v->l3 + 10, 2);
		if (v->l4 <= in->length && header_residue(v, in) != header_residue(v, &r->out))
			violated(RULE_IP_CHECK, p, in, r);
	}
	if (v->is_fragment)
		allow(may, v->version == 4 ? v->l3 + 4 : v->fragment_at + 4,
		      v->version == 4 ? 2 : 4);
	if (v->has_ports)
		allow(may, v->l4, 4);
	if (v->has_ports && v->proto == SCTP) {
		const uint32_t end = end_of(v, in);

		check += 8;
		if (check + 4 <= end) {
			uint32_t old, new;

			memcpy(&old, b + check, 4);
			memcpy(&new, o + check, 4);
			if (!v->is_fragment && old)
				allow(may, check, 4);
			if (!v->is_fragment && old &&
			    (old ^ crc32c(b + v->l4, end - v->l4)) !=
				    (new ^ crc32c(o + v->l4, end - v->l4)))
				violated(RULE_CHECK, p, in, r);
		}
	} else if (v->has_ports) {
		check += v->proto == TCP ? 16 : 6;
		if (v->proto != TCP && is_zero16(b + check)) {
			if (!is_zero16(o + check))
				violated(RULE_NO_CHECK, p, in, r);
		} else {
			allow(may, check, 2);
			if (residue(covered(v, in)) != residue(covered(&w, out)))
				violated(RULE_CHECK, p, in, r);
			if (v->proto != TCP && is_zero16(o + check))
				violated(RULE_NO_CHECK, p, in, r);
		}
	} else if (v->is_error) {
		allow(may, v->l4 + 2, 2);
		check_inner(p, v, in, r, may);
		if (residue(covered(v, in)) != residue(covered(&w, out)))
			violated(RULE_CHECK, p, in, r);
		check_quoted_ends(p, v, &w, in, r);
	}
	for (uint32_t i = 0; i < in->length; i++) {
		if (b[i] != o[i] && !may[i]) {
			violated(RULE_BYTES, p, in, r);
			break;
		}
	}
	if (v->has_ports && w.version)
		check_ends(p, v, &w, in, r);
	count_traffic(v, &w);
}

void check_translation(struct program *p, const struct view *v, const struct frame *in,
		       const struct result *r)
{
	const struct view w = read_frame(&r->out, v->l3);
	struct frame plain;

	/* A test run has a link layer, behind which the kernel makes room. */
	if (p->kind == KIND_RAW && r->out.length == in->length + option_size(v))
		return;
	if (world.sends_dsr && p->is_ingress && r->verdict == 7 && !v->has_option &&
	    strip_option(&w, &r->out, &plain))
		check_plain(p, v, in, r, &plain);
	else
		check_plain(p, v, in, r, &r->out);
}
