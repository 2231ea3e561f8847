/* SPDX-License-Identifier: Apache-2.0 */
/* Packets to be sent: seeds and what programs have made of packets, changed. */
#include <string.h>

#include "packets.h"

/* xorshift64* */
static uint64_t state;

void seed_random(uint64_t seed)
{
	state = seed * 2 + 1;
}

uint32_t rnd(uint32_t below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 2685821657736338717ULL >> 32) * below >> 32);
}

bool one_in(uint32_t n)
{
	return !rnd(n);
}

static const uint32_t interesting[] = {
	0,  1,	2,  4,	5,  6,	7,  8,	13, 14,	 15,  16,  19,	20,  21,   24,	 27,   28,
	39, 40, 41, 44, 48, 60, 64, 79, 80, 127, 128, 255, 256, 511, 1023, 1280, 1500, 65535
};

static uint32_t any_number(void)
{
	return one_in(3) ? rnd(65536)
			 : interesting[rnd(sizeof(interesting) / sizeof(*interesting))];
}

static void set_address(const struct view *v, struct frame *f, uint32_t at, const addr *a)
{
	static const uint8_t prefix[12] = { [10] = 0xff, 0xff };
	const bool is_v4 = !memcmp(a, prefix, sizeof(prefix));

	if (is_v4 != (v->version == 4) || at + (is_v4 ? 4 : 16) > f->length)
		return;
	memcpy(f->b + at, a->b + (is_v4 ? 12 : 0), is_v4 ? 4 : 16);
}

void insert(struct frame *f, uint32_t at, const uint8_t *bytes, uint32_t size)
{
	if (at > f->length || f->length + size > LARGEST)
		return;
	memmove(f->b + at + size, f->b + at, f->length - at);
	memcpy(f->b + at, bytes, size);
	f->length += size;
}

void lengthen(const struct view *v, struct frame *f, int by)
{
	uint8_t *at = f->b + v->l3 + (v->version == 4 ? 2 : 4);

	put16(at, get16(at) + by);
}

static void add_options(const struct view *v, struct frame *f)
{
	uint8_t bytes[40];
	const uint32_t size = 4 + 4 * rnd(10);

	for (uint32_t i = 0; i < size; i++)
		bytes[i] = one_in(4) ? rnd(256) : 1;
	if ((f->b[v->l3] & 15) * 4 + size > 60)
		return;
	insert(f, v->l4, bytes, size);
	f->b[v->l3] += size / 4;
	lengthen(v, f, size);
}

static void add_extension(const struct view *v, struct frame *f)
{
	static const uint8_t kinds[] = { 0, ROUTING, DSTOPTS, AH, FRAGMENT, 135, 59 };
	const uint8_t kind = kinds[rnd(sizeof(kinds))], units = one_in(2) ? 0 : rnd(4);
	uint8_t bytes[64] = { f->b[v->l3 + 6], units };
	uint32_t size = 8 + 8 * units;

	if (kind == AH) {
		size = 8 + 4 * units;
		size = (size + 7) & ~7U;
		bytes[1] = size / 4 - 2;
	} else if (kind == FRAGMENT) {
		size = 8;
		bytes[1] = 0;
		put16(bytes + 2, one_in(2) ? 1 : one_in(2) ? 0 : any_number());
		put32(bytes + 4, rnd(8));
	} else {
		bytes[2] = 1;
		bytes[3] = size - 4;
	}
	insert(f, v->l3 + 40, bytes, size);
	f->b[v->l3 + 6] = kind;
	lengthen(v, f, size);
}

/* Makes an ICMP error about the packet, as its receiver or a router sends one. */
static void quote(const struct view *v, struct frame *f)
{
	const bool is_v4 = v->version == 4;
	const uint32_t header = is_v4 ? 20 : 40, quoted_most = one_in(3) ? rnd(100) : 1200;
	uint32_t quoted = f->length - v->l3;
	uint8_t bytes[48] = { 0 };
	static const uint8_t kinds4[] = { 3, 4, 11, 12, 5, 8 }, kinds6[] = { 1, 2, 3, 4, 128, 135 };

	if (quoted > quoted_most) {
		quoted = quoted_most;
		f->length = v->l3 + quoted;
	}
	if (is_v4) {
		bytes[0] = 0x45;
		put16(bytes + 2, header + 8 + quoted);
		bytes[8] = 64;
		bytes[9] = ICMP;
		memcpy(bytes + 12, f->b + v->l3 + 16, 4);
		memcpy(bytes + 16, f->b + v->l3 + 12, 4);
		bytes[header] = kinds4[rnd(sizeof(kinds4))];
	} else {
		bytes[0] = 0x60;
		put16(bytes + 4, 8 + quoted);
		bytes[6] = ICMP6;
		bytes[7] = 64;
		memcpy(bytes + 8, f->b + v->l3 + 24, 16);
		memcpy(bytes + 24, f->b + v->l3 + 8, 16);
		bytes[header] = kinds6[rnd(sizeof(kinds6))];
	}
	bytes[header + 1] = rnd(6);
	insert(f, v->l3, bytes, header + 8);
	if (one_in(2) && world.address_count)
		set_address(v, f, v->l3 + (is_v4 ? 12 : 8),
			    &world.addresses[rnd(world.address_count)]);
}

/* Exchanges the two ends, as a reply has them. */
void answer(const struct view *v, struct frame *f)
{
	const uint32_t size = v->version == 4 ? 4 : 16, at = v->l3 + (v->version == 4 ? 12 : 8);
	uint8_t *b = f->b, kept[16];

	memcpy(kept, b + at, size);
	memmove(b + at, b + at + size, size);
	memcpy(b + at + size, kept, size);
	if (!v->has_ports)
		return;
	put16(b + v->l4, v->dport);
	put16(b + v->l4 + 2, v->sport);
	if (v->proto == TCP) {
		const uint32_t seq = get32(b + v->l4 + 4);

		put32(b + v->l4 + 4, get32(b + v->l4 + 8));
		put32(b + v->l4 + 8, seq + 1);
		b[v->l4 + 13] = (b[v->l4 + 13] | ACK) ^ (one_in(8) ? FIN : 0);
	}
}

void fix_checksums(struct frame *f, uint32_t l3)
{
	const struct view v = read_frame(f, l3);
	const uint32_t end = end_of(&v, f);
	uint8_t *b = f->b;

	if (!v.version)
		return;
	if (v.version == 4 && v.l4 <= f->length) {
		put16(b + l3 + 10, 0);
		put16(b + l3 + 10, checksum(sum16(b + l3, v.l4 - l3)));
	}
	if (v.is_later || v.l4 + 8 > end)
		return;
	if (v.proto == UDP && one_in(4))
		put16(b + v.l4 + 4, end - v.l4);
	if ((v.proto == TCP && v.l4 + 20 <= end) || v.proto == UDP || v.proto == UDPLITE) {
		const uint32_t at = v.l4 + (v.proto == TCP ? 16 : 6);
		uint16_t made;

		put16(b + at, 0);
		made = checksum(pseudo(&v, b, end - v.l4, v.proto) + sum16(b + v.l4, end - v.l4));
		put16(b + at, v.proto == TCP || made ? made : 0xffff);
		if (v.proto == UDP && one_in(8))
			put16(b + at, 0);
	} else if (v.proto == SCTP && v.l4 + 12 <= end) {
		const uint32_t crc = one_in(8) ? 0 : crc32c(b + v.l4, end - v.l4);

		memcpy(b + v.l4 + 8, &crc, 4);
	} else if (v.proto == ICMP || v.proto == ICMP6) {
		put16(b + v.l4 + 2, 0);
		put16(b + v.l4 + 2,
		      checksum(sum16(b + v.l4, end - v.l4) +
			       (v.proto == ICMP ? 0 : pseudo(&v, b, end - v.l4, ICMP6))));
	}
}

static void mutate_once(struct frame *f, uint32_t l3)
{
	const struct view v = read_frame(f, l3);
	const uint32_t size = v.version == 4 ? 4 : 16, at = l3 + (v.version == 4 ? 12 : 8);
	uint8_t *b = f->b;

	if (!v.version) {
		if (f->length)
			b[rnd(f->length)] ^= 1 << rnd(8);
		return;
	}
	switch (rnd(world.accepts_dsr ? 26 : 24)) {
	case 0:
		b[rnd(f->length < 120 ? f->length : 120)] ^= 1 << rnd(8);
		break;
	case 1:
		b[rnd(f->length < 120 ? f->length : 120)] = rnd(256);
		break;
	case 2:
	case 3:
		set_address(&v, f, at, &world.addresses[rnd(world.address_count)]);
		break;
	case 4:
	case 5:
		set_address(&v, f, at + size, &world.addresses[rnd(world.address_count)]);
		break;
	case 6:
	case 7:
		if (v.l4 + 4 <= f->length)
			put16(b + v.l4 + (one_in(3) ? 2 : 0),
			      one_in(2) ? world.frontends[rnd(world.frontend_count)].port
					: 20000 + rnd(4096));
		break;
	case 8:
		put16(b + l3 + (v.version == 4 ? 2 : 4),
		      one_in(2) ? any_number() : f->length - l3 - rnd(24));
		break;
	case 9:
		if (v.version == 4)
			put16(b + l3 + 6, one_in(3)   ? any_number()
					  : one_in(2) ? 0x2000
						      : rnd(8) << (one_in(2) ? 0 : 13));
		else if (v.fragment_at)
			put16(b + v.fragment_at + 2, any_number());
		break;
	case 10:
		if (v.version == 4)
			put16(b + l3 + 4, rnd(8));
		else
			add_extension(&v, f);
		break;
	case 11:
		if (v.version == 4)
			add_options(&v, f);
		else
			add_extension(&v, f);
		break;
	case 12:
		if (v.version == 4)
			b[l3] = one_in(2) ? 0x40 + rnd(16) : rnd(256);
		else
			b[l3 + 6] = one_in(2) ? rnd(256) : FRAGMENT;
		break;
	case 13: {
		static const uint8_t protos[] = { TCP, UDP, SCTP, UDPLITE, ICMP, ICMP6, 47, 4 };

		b[l3 + (v.version == 4 ? 9 : 6)] = protos[rnd(sizeof(protos))];
		break;
	}
	case 14:
		b[l3 + (v.version == 4 ? 8 : 7)] = one_in(2) ? rnd(4) : rnd(256);
		break;
	case 15:
		f->length =
			one_in(2) ? rnd(f->length + 1) : f->length - rnd(f->length < 24 ? 1 : 24);
		break;
	case 16:
		for (uint32_t more = 1 + rnd(40); more && f->length < LARGEST; more--)
			b[f->length++] = rnd(256);
		break;
	case 17:
	case 18:
		if (v.proto == TCP && v.has_ports)
			b[v.l4 + 13] = one_in(3)   ? rnd(256)
				       : one_in(2) ? SYN
				       : one_in(2) ? RST | ACK
						   : FIN | ACK;
		break;
	case 19:
		if (v.proto == TCP && v.has_ports)
			b[v.l4 + 12] = rnd(256);
		else if (v.has_ports)
			put16(b + v.l4 + 4, any_number());
		break;
	case 20:
		if (v.proto == TCP && v.has_ports)
			put32(b + v.l4 + (one_in(2) ? 4 : 8), rnd(4) ? rnd(70000) : rnd(~0U));
		break;
	case 21:
	case 22:
		quote(&v, f);
		break;
	case 23:
		answer(&v, f);
		break;
	default:
		if (v.has_ports)
			add_option(&v, f);
		break;
	}
}

/* Raw devices have no link layer; the kernel reads the protocol of a test run from there. */
static void to_raw(struct frame *f)
{
	const uint16_t type = get16(f->b + 12);

	if (f->length < ETHERNET + 20 || (type != 0x800 && type != 0x86dd))
		return;
	memmove(f->b, f->b + ETHERNET, f->length - ETHERNET);
	f->length -= ETHERNET;
	put16(f->b + 12, type);
}

struct frame mutated(const struct program *p)
{
	const uint32_t l3 = l3_of(p);
	struct frame f;
	uint32_t steps = one_in(4) ? 0 : 1 + rnd(one_in(3) ? 8 : 3);

	if (one_in(p->kind == KIND_XDP ? 2 : 4) && frame_of_flow(p, &f) && !one_in(4))
		return f;
	f = any_frame();
	if (p->kind == KIND_RAW)
		to_raw(&f);
	else if (!one_in(16))
		memcpy(f.b, p->mac, sizeof(p->mac));
	while (steps-- && f.length)
		mutate_once(&f, l3);
	if (one_in(8)) {
		const struct view v = read_frame(&f, l3);

		/* Another client port: another flow. */
		if (v.has_ports)
			put16(f.b + v.l4, rnd(65536));
	}
	if (!one_in(3))
		fix_checksums(&f, l3);
	return f;
}
