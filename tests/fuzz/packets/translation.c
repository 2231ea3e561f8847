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

static void check_ends(const struct program *p, const struct view *v, const struct view *w,
		       const struct frame *in, const struct result *r)
{
	const struct endpoint *from, *to;

	if (same_addr(&v->src, &w->src) && same_addr(&v->dst, &w->dst) && v->sport == w->sport &&
	    v->dport == w->dport)
		return;
	/* One address may be backend and client, and a frontend's port may be a client's. */
	from = find_frontend(&v->dst, v->dport, v->proto);
	to = find_backend(&w->dst, w->dport, w->proto);
	if (from && to) {
		for (uint32_t i = 0; i < world.backend_count; i++)
			if (world.backends[i].service == from->service &&
			    same_addr(&world.backends[i].a, &w->dst) &&
			    world.backends[i].port == w->dport)
				return;
	}
	if (find_backend(&v->src, v->sport, v->proto))
		return;
	if (find_backend(&v->dst, v->dport, v->proto) && same_addr(&v->dst, &w->dst) &&
	    v->dport == w->dport)
		return;
	violated(RULE_ENDS, p, in, r);
}

void check_translation(const struct program *p, const struct view *v, const struct frame *in,
		       const struct result *r)
{
	const uint8_t *b = in->b, *o = r->out.b;
	const struct view w = read_frame(&r->out, v->l3);
	const bool forwards = r->verdict != -1;
	const uint32_t size = v->version == 4 ? 4 : 16, at = v->l3 + (v->version == 4 ? 12 : 8);
	uint32_t hops = v->l3 + (v->version == 4 ? 8 : 7), check = v->l4;
	uint8_t may[ROOM] = { 0 };

	if (r->out.length != in->length) {
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
		if (v->l4 <= in->length && residue(sum16(b + v->l3, v->l4 - v->l3)) !=
						   residue(sum16(o + v->l3, v->l4 - v->l3)))
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
			if (residue(covered(v, in)) != residue(covered(&w, &r->out)))
				violated(RULE_CHECK, p, in, r);
			if (v->proto != TCP && is_zero16(o + check))
				violated(RULE_NO_CHECK, p, in, r);
		}
	} else if (v->is_error) {
		allow(may, v->l4 + 2, 2);
		check_inner(p, v, in, r, may);
		if (residue(covered(v, in)) != residue(covered(&w, &r->out)))
			violated(RULE_CHECK, p, in, r);
	}
	for (uint32_t i = 0; i < in->length; i++) {
		if (b[i] != o[i] && !may[i]) {
			violated(RULE_BYTES, p, in, r);
			break;
		}
	}
	if (v->has_ports && w.version)
		check_ends(p, v, &w, in, r);
}
