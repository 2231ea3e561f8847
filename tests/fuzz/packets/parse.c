/* SPDX-License-Identifier: Apache-2.0 */
/* Packets as a receiver reads them. */
#include <string.h>

#include "packets.h"

static addr mapped(const uint8_t *four)
{
	addr a = { { [10] = 0xff, 0xff } };

	memcpy(a.b + 12, four, 4);
	return a;
}

static addr sixteen(const uint8_t *p)
{
	addr a;

	memcpy(&a, p, sizeof(a));
	return a;
}

static bool has_ports(uint8_t proto)
{
	return proto == TCP || proto == UDP || proto == SCTP || proto == UDPLITE;
}

static uint32_t shortest(uint8_t proto)
{
	return proto == TCP ? 20 : proto == SCTP ? 12 : 8;
}

static bool is_extension(uint8_t type)
{
	return type == 0 || type == ROUTING || type == DSTOPTS || type == AH || type == FRAGMENT;
}

static uint32_t extension_size(uint8_t type, const uint8_t *b)
{
	return type == FRAGMENT ? 8 : type == AH ? (b[1] + 2) * 4 : (b[1] + 1) * 8;
}

/* Finds the ports of a quoted packet; returns false where a later fragment has none. */
static bool walk_quoted_chain(struct view *v, const uint8_t *b, uint32_t end)
{
	for (int i = 0; i < 6; i++) {
		const uint32_t at = v->inner_l4;
		const uint8_t type = v->inner_proto;

		if (!is_extension(type))
			return true;
		if (at + 8 > end || (type == FRAGMENT && get16(b + at + 2) & 0xfff8))
			return false;
		v->inner_proto = b[at];
		v->inner_l4 = at + extension_size(type, b + at);
	}
	return false;
}

static bool read_quoted(struct view *v, const struct frame *f, uint32_t at, uint32_t end)
{
	const uint8_t *b = f->b;

	v->inner_l3 = at;
	if (v->version == 4) {
		if (at + 20 > end || b[at] >> 4 != 4 || (b[at] & 15) < 5 ||
		    get16(b + at + 6) & 0x1fff)
			return false;
		v->inner_l4 = at + (b[at] & 15) * 4;
		v->inner_proto = b[at + 9];
		v->inner_src = mapped(b + at + 12);
		v->inner_dst = mapped(b + at + 16);
	} else {
		if (at + 40 > end || b[at] >> 4 != 6)
			return false;
		v->inner_l4 = at + 40;
		v->inner_proto = b[at + 6];
		v->inner_src = sixteen(b + at + 8);
		v->inner_dst = sixteen(b + at + 24);
		if (!walk_quoted_chain(v, b, end))
			return false;
	}
	if (!has_ports(v->inner_proto) || v->inner_l4 + 8 > end)
		return false;
	v->inner_sport = get16(b + v->inner_l4);
	v->inner_dport = get16(b + v->inner_l4 + 2);
	return true;
}

static void walk_chain(struct view *v, const struct frame *f, uint32_t end)
{
	const uint8_t *b = f->b;

	for (int i = 0; i < 6; i++) {
		const uint32_t at = v->l4;
		const uint8_t next = v->proto;

		if (!is_extension(next)) {
			v->chain_is_known = true;
			return;
		}
		if (at + 8 > end)
			return;
		v->proto = b[at];
		if (next == FRAGMENT) {
			v->fragment_at = at;
			v->is_fragment = get16(b + at + 2) & 0xfff9;
			v->is_later = get16(b + at + 2) & 0xfff8;
		}
		v->l4 = at + extension_size(next, b + at);
		if (v->is_later) {
			v->chain_is_known = true;
			return;
		}
	}
}

/* The option of DSR lies behind the IP header: of IPv4's header, or an extension header. */
static void read_option(struct view *v, const struct frame *f)
{
	const uint8_t *b = f->b + v->l3;

	if (v->proto != TCP && v->proto != UDP)
		return;
	if (v->version == 4) {
		if (!v->l3_length || v->l4 < v->l3 + 28 || b[20] != 0x9a || b[21] != 8)
			return;
		v->option_port = get16(b + 22);
		v->option_addr = mapped(b + 24);
	} else {
		if (v->l3_length == 40 || v->l4 < v->l3 + 64 || b[6] != DSTOPTS || b[41] != 2 ||
		    b[42] != 0x1b || b[43] != 20)
			return;
		v->option_addr = sixteen(b + 44);
		v->option_port = get16(b + 60);
		if (!memcmp(&v->option_addr, mapped(b).b, 12))
			return;
	}
	v->has_option = true;
}

uint32_t option_size(const struct view *v)
{
	return v->version == 4 ? 8 : 24;
}

/* Makes the packet without the option that it has; the checksum of IPv4's header stays. */
bool strip_option(const struct view *v, const struct frame *f, struct frame *plain)
{
	const uint32_t size = option_size(v), at = v->l3 + (v->version == 4 ? 20 : 40);
	uint8_t *b = plain->b + v->l3;

	if (!v->has_option)
		return false;
	plain->length = f->length - size;
	memcpy(plain->b, f->b, at);
	memcpy(plain->b + at, f->b + at + size, f->length - at - size);
	if (v->version == 4) {
		b[0] -= size / 4;
		put16(b + 2, get16(b + 2) - size);
	} else {
		b[6] = f->b[at];
		put16(b + 4, get16(b + 4) - size);
	}
	return true;
}

/* Reads a frame as a receiver does: what lies behind the end of the IP packet is padding. */
struct view read_frame(const struct frame *f, uint32_t l3)
{
	struct view v = { .l3 = l3 };
	const uint8_t *b = f->b;
	uint32_t end;
	uint16_t type = f->length >= ETHERNET ? get16(b + 12) : 0;

	/* A program for raw devices makes packets without it; see to_raw(). */
	if (!l3)
		type = f->length && b[0] >> 4 == 4 ? 0x800 : 0x86dd;
	if (type == 0x800 && f->length >= l3 + 20 && b[l3] >> 4 == 4 && (b[l3] & 15) >= 5) {
		v.version = 4;
		v.l3_length = get16(b + l3 + 2);
		v.l4 = l3 + (b[l3] & 15) * 4;
		v.proto = b[l3 + 9];
		v.src = mapped(b + l3 + 12);
		v.dst = mapped(b + l3 + 16);
		v.is_fragment = get16(b + l3 + 6) & 0x3fff;
		v.is_later = get16(b + l3 + 6) & 0x1fff;
		v.chain_is_known = true;
	} else if (type == 0x86dd && f->length >= l3 + 40 && b[l3] >> 4 == 6) {
		v.version = 6;
		v.l3_length = 40 + get16(b + l3 + 4);
		v.l4 = l3 + 40;
		v.proto = b[l3 + 6];
		v.src = sixteen(b + l3 + 8);
		v.dst = sixteen(b + l3 + 24);
	} else {
		return v;
	}
	/* BIG TCP's header has no length. */
	end = v.l3_length == (v.version == 4 ? 0 : 40) ? f->length : l3 + v.l3_length;
	/* The kernel drops what is not whole. */
	if (end > f->length) {
		v.chain_is_known = false;
		return v;
	}
	if (v.version == 6)
		walk_chain(&v, f, end);
	if (!v.chain_is_known || v.is_later)
		return v;
	if (has_ports(v.proto) && v.l4 + shortest(v.proto) <= end) {
		v.has_ports = true;
		v.sport = get16(b + v.l4);
		v.dport = get16(b + v.l4 + 2);
		read_option(&v, f);
	} else if (v.proto == (v.version == 4 ? ICMP : ICMP6) && v.l4 + 8 <= end &&
		   !v.is_fragment) {
		const uint8_t kind = b[v.l4];

		if (v.version == 4 ? (kind >= 3 && kind <= 5) || kind == 11 || kind == 12
				   : kind >= 1 && kind <= 4)
			v.is_error = read_quoted(&v, f, v.l4 + 8, end);
		v.is_redirect = v.is_error && v.version == 4 && kind == 5;
	}
	return v;
}

uint32_t l3_of(const struct program *p)
{
	return p->kind == KIND_RAW ? 0 : ETHERNET;
}

/* Reads a packet as the program is told to: raw ones have their EtherType within. */
struct view read_input(const struct program *p, const struct frame *f)
{
	const struct view none = { .l3 = 0 };

	if (p->kind == KIND_RAW &&
	    (f->length < ETHERNET || get16(f->b + 12) != (f->b[0] >> 4 == 4 ? 0x800 : 0x86dd)))
		return none;
	return read_frame(f, l3_of(p));
}

/* Returns where the IP packet ends in the frame. */
uint32_t end_of(const struct view *v, const struct frame *f)
{
	const uint32_t end = v->l3 + v->l3_length;

	return end < f->length && v->l3_length > (v->version == 4 ? 0U : 40U) ? end : f->length;
}
