/* SPDX-License-Identifier: Apache-2.0 */
/* The option of direct server return: who sends it, who may have sent it, and what is left of it.
 */
#include <string.h>

#include "packets.h"

/* Adds an option to a packet that has a plain header, most often one that names a frontend. */
void add_option(const struct view *v, struct frame *f)
{
	const struct endpoint *e = &world.frontends[rnd(world.frontend_count)];
	const uint32_t size = option_size(v), at = v->l3 + (v->version == 4 ? 20 : 40);
	const addr *a = one_in(4) ? &world.addresses[rnd(world.address_count)] : &e->a;
	uint8_t bytes[24] = { 0 };

	if (v->version == 4) {
		if ((f->b[v->l3] & 15) > 13)
			return;
		bytes[0] = 0x9a;
		bytes[1] = 8;
		put16(bytes + 2, e->port);
		memcpy(bytes + 4, a->b + 12, 4);
		f->b[v->l3] += 2;
	} else {
		bytes[0] = f->b[v->l3 + 6];
		bytes[1] = 2;
		bytes[2] = 0x1b;
		bytes[3] = 20;
		memcpy(bytes + 4, a, 16);
		put16(bytes + 20, e->port);
		f->b[v->l3 + 6] = DSTOPTS;
	}
	insert(f, at, bytes, size);
	lengthen(v, f, size);
}

/* Addresses that nothing comes from: RFC 1122, 3.2.1.3; RFC 4291, 2.4. */
static bool is_martian(const addr *a)
{
	static const addr mapped = { { [10] = 0xff, 0xff } }, zero = { { 0 } },
			  one = { { [15] = 1 } };
	const uint8_t first = a->b[12];

	if (memcmp(a, &mapped, 12))
		return a->b[0] == 0xff || same_addr(a, &one) || !memcmp(a, &zero, 12);
	return !first || first == 127 || (first >= 224 && first < 240) ||
	       !memcmp(a->b + 12, "\xff\xff\xff\xff", 4);
}

/* Returns the frontend of an option: that of a NodePort may be another node's. */
static const struct endpoint *named_frontend(const struct view *v)
{
	const struct endpoint *found = find_frontend(&v->option_addr, v->option_port, v->proto);

	if (is_martian(&v->option_addr))
		return NULL;
	for (uint32_t i = 0; !found && i < world.frontend_count; i++)
		if (world.frontends[i].is_node_port && world.frontends[i].port == v->option_port &&
		    world.frontends[i].proto == v->proto)
			found = &world.frontends[i];
	return found && found->is_outside ? found : NULL;
}

enum outcome { PASSES = 1, STRIPPED = 2, DROPPED = 4 };

/* Says what may become of a packet with the option. */
static int right_outcomes(const struct program *p, const struct view *v, const struct frame *in)
{
	const struct endpoint *frontend = named_frontend(v);
	int found = PASSES | STRIPPED;

	if (p->is_of_pods)
		return DROPPED;
	if (memcmp(in->b, p->mac, sizeof(p->mac)) || is_martian(&v->src))
		return PASSES;
	/* Neither is known of others, and nothing routes what a link-local address sends. */
	if (!is_here(&v->dst) || (v->src.b[0] == 0xfe && (v->src.b[1] & 0xc0) == 0x80))
		return is_elsewhere(&v->dst) && v->src.b[0] != 0xfe ? PASSES
								    : PASSES | STRIPPED | DROPPED;
	if (!frontend || !has_backend_port(v->dport))
		return DROPPED;
	/* A filter tells which address has the port, and may be wrong. */
	if (!find_backend(&v->dst, v->dport, v->proto) || frontend->has_ranges)
		found |= DROPPED;
	return found & (v->is_fragment ? ~STRIPPED : ~PASSES);
}

static bool is_same(const struct frame *a, const struct frame *b)
{
	return a->length == b->length && !memcmp(a->b, b->b, a->length);
}

/* The checksum of IPv4's header covers the option: it stays as right or as wrong as it was. */
uint32_t header_residue(const struct view *v, const struct frame *f)
{
	const uint32_t end = v->l3 + (f->b[v->l3] & 15) * 4;

	return v->version == 4 && end <= f->length ? sum16(f->b + v->l3, end - v->l3) % 65535 : 0;
}

/* Notes what replies become, as if the client's packet had come in here. */
static void note_option(const struct view *v)
{
	struct ends in = ends_of(v), out = in;

	in.dst = v->option_addr;
	in.dport = v->option_port;
	note_translation(&in, &out);
}

/*
 * Checks what a program does with a packet that comes in with the option; returns false if that is
 * to be checked as of any other packet.
 */
bool check_option(struct program *p, const struct view *v, const struct frame *in,
		  const struct result *r)
{
	const int right = right_outcomes(p, v, in);
	struct frame plain, out = r->out;

	if (r->verdict == 2 && !(right & DROPPED))
		violated(RULE_DROPPED, p, in, r);
	if (r->verdict == 2) {
		/* Its flow may have begun. */
		if (right & STRIPPED)
			note_option(v);
		return false;
	}
	if (r->verdict == -1 && is_same(in, &r->out)) {
		if (!(right & PASSES))
			violated(right == DROPPED ? RULE_OPTION_REFUSED : RULE_OPTION_TAKEN, p, in,
				 r);
		/* A fragment keeps the option, whether it begins a flow or not. */
		else if (right != PASSES || v->is_fragment)
			note_option(v);
		return false;
	}
	strip_option(v, in, &plain);
	if (v->version == 4 && out.length > v->l3 + 12) {
		if (header_residue(v, in) != header_residue(v, &out))
			violated(RULE_IP_CHECK, p, in, r);
		memcpy(out.b + v->l3 + 10, plain.b + v->l3 + 10, 2);
	}
	if (r->verdict != -1 || !(right & STRIPPED) || !is_same(&plain, &out))
		violated(right == DROPPED ? RULE_OPTION_REFUSED : RULE_OPTION_TAKEN, p, in, r);
	p->option_taken++;
	note_option(v);
	return true;
}

/*
 * Checks the option on what is sent to a backend on another node, with the client's address: what
 * begins a flow has it.
 */
void check_sent_option(struct program *p, const struct view *v, bool is_known,
		       const struct frame *in, const struct result *r)
{
	const struct view w = read_frame(&r->out, v->l3);
	const uint32_t header = v->version == 4 ? 20 : 40;
	const bool begins = v->proto == TCP ? in->b[v->l4 + 13] & SYN : !is_known;
	const bool has_room = v->l4 == v->l3 + header && !v->is_fragment && v->l3_length > header &&
			      v->l3_length + option_size(v) <= world.mtu;

	if (!w.has_option) {
		if (begins && has_room)
			violated(RULE_OPTION_SENT, p, in, r);
		return;
	}
	p->option_sent++;
	if (!has_room || !same_addr(&w.option_addr, &v->dst) || w.option_port != v->dport)
		violated(RULE_OPTION_SENT, p, in, r);
}
