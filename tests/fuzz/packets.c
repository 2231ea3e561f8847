/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Mutated packets through loaded packet programs (BPF_PROG_TEST_RUN), and a check of each result.
 *
 *   packets WORLD COUNT SEED VIOLATIONS
 *
 * WORLD is a text of lines: programs, frontends, backends, networks, seeds; see read_world(). Its
 * frames are changed, and what programs make of them is sent again and answered, so that flows come
 * into being. Nothing here shares code with the programs under test. What must hold is in check().
 *
 * Prints counts as JSON. Each packet whose result is wrong goes to VIOLATIONS, as a line of rule,
 * program, verdict, packet before and after.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define ETHERNET 14
#define ROOM	 2048
#define LARGEST	 1600
#define POOL	 4096
#define WORST	 1000 /* so many violations end a run */

enum {
	ICMP = 1,
	TCP = 6,
	UDP = 17,
	ROUTING = 43,
	FRAGMENT = 44,
	AH = 51,
	ICMP6 = 58,
	DSTOPTS = 60,
	SCTP = 132,
	UDPLITE = 136
};

enum { FIN = 1, SYN = 2, RST = 4, ACK = 16 };

typedef struct {
	uint8_t b[16];
} addr;

struct frame {
	uint32_t length;
	uint8_t b[ROOM];
};

enum kind { KIND_TC, KIND_RAW, KIND_XDP, KIND_LOOPBACK };

struct program {
	char name[32];
	enum kind kind;
	int fd;
	uint32_t ifindex, ingress;
	uint8_t mac[6];
	uint64_t runs, passed, dropped, rejected, translated, forwarded, refused;
};

struct endpoint {
	addr a;
	uint16_t port;
	uint8_t proto;
	int service;
};

struct network {
	addr a;
	int length;
};

/* A packet as it is read here. */
struct view {
	int version; /* 0: no IP packet that makes sense */
	uint32_t l3, l3_length, l4;
	uint8_t proto;
	bool is_fragment, is_later, has_ports, is_error, chain_is_known;
	uint32_t fragment_at;
	addr src, dst;
	uint16_t sport, dport;
	/* An ICMP error quotes a packet. */
	uint32_t inner_l3, inner_l4;
	uint8_t inner_proto;
	addr inner_src, inner_dst;
	uint16_t inner_sport, inner_dport;
};

static struct program programs[32];
static struct endpoint frontends[1024], backends[256];
static struct network networks[16];
static addr addresses[256];
static struct frame *seeds, pool[POOL];
static uint32_t program_count, frontend_count, backend_count, network_count, address_count,
	seed_count, pooled;
static uint64_t violations, unserved, by_rule[64];
static FILE *report;

static void die(const char *what)
{
	perror(what);
	exit(2);
}

/* xorshift64* */
static uint64_t state;

static uint32_t rnd(uint32_t below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (uint32_t)((state * 2685821657736338717ULL >> 32) * below >> 32);
}

static bool one_in(uint32_t n)
{
	return !rnd(n);
}

static uint16_t get16(const uint8_t *p)
{
	return p[0] << 8 | p[1];
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)get16(p) << 16 | get16(p + 2);
}

static void put16(uint8_t *p, uint32_t v)
{
	p[0] = v >> 8;
	p[1] = v;
}

static void put32(uint8_t *p, uint32_t v)
{
	put16(p, v >> 16);
	put16(p + 2, v);
}

static bool same(const addr *a, const addr *b)
{
	return !memcmp(a, b, sizeof(*a));
}

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

/* ---- checksums, from RFC 1071 and RFC 9260, appendix A */

static uint64_t sum16(const uint8_t *p, uint32_t length)
{
	uint64_t sum = 0;

	for (; length > 1; p += 2, length -= 2)
		sum += get16(p);
	return length ? sum + (p[0] << 8) : sum;
}

static uint64_t pseudo(const struct view *v, const uint8_t *b, uint32_t length, uint8_t proto)
{
	const uint32_t size = v->version == 4 ? 4 : 16, at = v->l3 + (v->version == 4 ? 12 : 8);

	return sum16(b + at, 2 * size) + proto + (length >> 16) + (length & 0xffff);
}

static uint16_t folded(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static uint16_t checksum(uint64_t sum)
{
	return ~folded(sum);
}

static uint32_t crc_table[256];

static void make_crc_table(void)
{
	for (uint32_t i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (int bit = 0; bit < 8; bit++)
			crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
		crc_table[i] = crc;
	}
}

/* The CRC of an SCTP packet whose checksum counts as 0, in the order of its bytes. */
static uint32_t crc32c(const uint8_t *p, uint32_t length)
{
	uint32_t crc = ~0U;

	for (uint32_t i = 0; i < length; i++)
		crc = crc >> 8 ^ crc_table[(crc ^ (i >= 8 && i < 12 ? 0 : p[i])) & 0xff];
	return htonl(__builtin_bswap32(~crc));
}

/* ---- reading */

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

		if (next != 0 && next != ROUTING && next != DSTOPTS && next != AH &&
		    next != FRAGMENT) {
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
			v->l4 = at + 8;
			if (v->is_later) {
				v->chain_is_known = true;
				return;
			}
		} else {
			v->l4 = at + (next == AH ? (b[at + 1] + 2) * 4 : (b[at + 1] + 1) * 8);
		}
	}
}

/* Reads a frame as a receiver does: what lies behind the end of the IP packet is padding. */
static struct view read_frame(const struct frame *f, uint32_t l3)
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
	} else if (v.proto == (v.version == 4 ? ICMP : ICMP6) && v.l4 + 8 <= end &&
		   !v.is_fragment) {
		const uint8_t kind = b[v.l4];

		if (v.version == 4 ? kind == 3 || kind == 4 || kind == 11 || kind == 12
				   : kind >= 1 && kind <= 4)
			v.is_error = read_quoted(&v, f, v.l4 + 8, end);
	}
	return v;
}

static uint32_t l3_of(const struct program *p)
{
	return p->kind == KIND_RAW ? 0 : ETHERNET;
}

/* Reads a packet as the program is told to: raw ones have their EtherType within. */
static struct view read_input(const struct program *p, const struct frame *f)
{
	const struct view none = { .l3 = 0 };

	if (p->kind == KIND_RAW &&
	    (f->length < ETHERNET || get16(f->b + 12) != (f->b[0] >> 4 == 4 ? 0x800 : 0x86dd)))
		return none;
	return read_frame(f, l3_of(p));
}

/* Returns where the IP packet ends in the frame. */
static uint32_t end_of(const struct view *v, const struct frame *f)
{
	const uint32_t end = v->l3 + v->l3_length;

	return end < f->length && v->l3_length > (v->version == 4 ? 0U : 40U) ? end : f->length;
}

/* ---- the model: which packets can be a Service's */

/* NodePorts answer on all of 127.0.0.0/8, and the unspecified address means the loopback's. */
static bool is_address(const addr *a, const addr *b)
{
	static const addr one = { { [15] = 1 } }, any = { { 0 } };

	return same(a, b) || (a->b[10] == 0xff && !memcmp(a, b, 13) && a->b[12] == 127) ||
	       (same(a, &one) && same(b, &any));
}

static const struct endpoint *find(const struct endpoint *in, uint32_t count, const addr *a,
				   uint16_t port, uint8_t proto)
{
	if (proto == UDPLITE)
		proto = UDP;
	for (uint32_t i = 0; i < count; i++)
		if (in[i].port == port && in[i].proto == proto && is_address(&in[i].a, a))
			return &in[i];
	return NULL;
}

static bool has_address(const struct endpoint *in, uint32_t count, const addr *a)
{
	for (uint32_t i = 0; i < count; i++)
		if (is_address(&in[i].a, a))
			return true;
	return false;
}

static bool in_networks(const addr *a)
{
	for (uint32_t i = 0; i < network_count; i++) {
		const uint32_t whole = networks[i].length / 8, rest = networks[i].length % 8;

		if (!memcmp(a, &networks[i].a, whole) &&
		    (!rest || !((a->b[whole] ^ networks[i].a.b[whole]) >> (8 - rest))))
			return true;
	}
	return false;
}

static bool is_end(const addr *a, uint16_t port, uint8_t proto)
{
	return find(frontends, frontend_count, a, port, proto) ||
	       find(backends, backend_count, a, port, proto);
}

static bool has_end(const addr *a)
{
	return has_address(frontends, frontend_count, a) || has_address(backends, backend_count, a);
}

static bool may_be_served(const struct view *v)
{
	if (!v->version)
		return false;
	if (in_networks(&v->dst))
		return true;
	if (v->is_error)
		return is_end(&v->inner_src, v->inner_sport, v->inner_proto) ||
		       is_end(&v->inner_dst, v->inner_dport, v->inner_proto);
	if (v->is_later && v->chain_is_known)
		return has_end(&v->src) || has_end(&v->dst);
	return v->has_ports &&
	       (is_end(&v->src, v->sport, v->proto) || is_end(&v->dst, v->dport, v->proto));
}

/* ---- changing packets */

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

static void insert(struct frame *f, uint32_t at, const uint8_t *bytes, uint32_t size)
{
	if (at > f->length || f->length + size > LARGEST)
		return;
	memmove(f->b + at + size, f->b + at, f->length - at);
	memcpy(f->b + at, bytes, size);
	f->length += size;
}

static void lengthen(const struct view *v, struct frame *f, int by)
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
	if (one_in(2) && address_count)
		set_address(v, f, v->l3 + (is_v4 ? 12 : 8), &addresses[rnd(address_count)]);
}

/* Exchanges the two ends, as a reply has them. */
static void answer(const struct view *v, struct frame *f)
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

static void fix_checksums(struct frame *f, uint32_t l3)
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
	switch (rnd(24)) {
	case 0:
		b[rnd(f->length < 120 ? f->length : 120)] ^= 1 << rnd(8);
		break;
	case 1:
		b[rnd(f->length < 120 ? f->length : 120)] = rnd(256);
		break;
	case 2:
	case 3:
		set_address(&v, f, at, &addresses[rnd(address_count)]);
		break;
	case 4:
	case 5:
		set_address(&v, f, at + size, &addresses[rnd(address_count)]);
		break;
	case 6:
	case 7:
		if (v.l4 + 4 <= f->length)
			put16(b + v.l4 + (one_in(3) ? 2 : 0),
			      one_in(2) ? frontends[rnd(frontend_count)].port : 20000 + rnd(4096));
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

static struct frame mutated(const struct program *p)
{
	const uint32_t l3 = l3_of(p);
	struct frame f;
	uint32_t steps = one_in(4) ? 0 : 1 + rnd(one_in(3) ? 8 : 3);

	if (pooled && one_in(2))
		f = pool[rnd(pooled < POOL ? pooled : POOL)];
	else
		f = seeds[rnd(seed_count)];
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

/* ---- what must hold */

struct result {
	int verdict;
	struct frame out;
};

static void violated(int rule, const struct program *p, const struct frame *in,
		     const struct result *r)
{
	violations++;
	by_rule[rule]++;
	if (by_rule[rule] > 10)
		return;
	fprintf(report, "%d %s %d ", rule, p->name, r->verdict);
	for (uint32_t i = 0; i < in->length; i++)
		fprintf(report, "%02x", in->b[i]);
	fputc(' ', report);
	for (uint32_t i = 0; i < r->out.length; i++)
		fprintf(report, "%02x", r->out.b[i]);
	fputc('\n', report);
	fflush(report);
}

enum {
	RULE_VERDICT = 1, /* no other verdicts */
	RULE_NO_SERVICE,  /* a packet that no Service has passes unchanged */
	RULE_DROPPED,	  /* a packet that no Service has is not dropped */
	RULE_LENGTH,	  /* a translated packet keeps its length */
	RULE_BYTES,	  /* nothing else is changed: payload, padding, options */
	RULE_IP_CHECK,	  /* IPv4's checksum stays as right or as wrong as it was */
	RULE_CHECK,	  /* so do TCP's, UDP's, SCTP's and ICMP's */
	RULE_NO_CHECK,	  /* a datagram without a checksum stays without, others get none of 0 */
	RULE_INNER_IP,	  /* and those inside ICMP's errors */
	RULE_INNER_CHECK,
	RULE_ENDS,	/* a frontend becomes a backend of its Service, a backend a frontend */
	RULE_HOPS,	/* a hop is counted where the program forwards, at most once */
	RULE_REJECT_IP, /* rejections are packets of their own */
	RULE_REJECT_ENDS,
	RULE_REJECT_CHECK,
	RULE_REJECT_NUMBERS,
	RULE_REJECT_QUOTE,
	RULE_REJECT_REJECTED, /* neither resets nor errors nor fragments are rejected */
	RULE_NOTHING_SERVED,  /* what has no ports within it is not translated */
	RULE_RUN,	      /* the kernel runs it */
	RULE_REJECT_LIMIT,    /* no more ICMP errors than the kernel would send */
};

/* ---- the limit of ICMP errors: net.ipv4.icmp_msgs_burst, and one each millisecond */

#define ERRORS_AT_ONCE 50
#define ERROR_EVERY    1000000ULL
#define FILL_EVERY     4000 /* packets: more of them are rejected than the limit allows */

static int limit_map = -1;
static uint64_t limited_since, errors_since;

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

/* Gives the programs all tokens back, so that errors go on being checked. */
static void fill_limit(void)
{
	const uint32_t zero = 0;
	const uint64_t never = 0;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = limit_map;
	attr.key = (uintptr_t)&zero;
	attr.value = (uintptr_t)&never;
	limited_since = now_ns();
	errors_since = 0;
	if (syscall(__NR_bpf, BPF_MAP_UPDATE_ELEM, &attr, sizeof(attr)))
		die("the limit of ICMP errors");
}

/* Counts an error; returns false where it is one too many. The programs' clock goes by steps. */
static bool within_limit(void)
{
	struct timespec step;

	clock_getres(CLOCK_MONOTONIC_COARSE, &step);
	return ++errors_since <=
	       ERRORS_AT_ONCE + 1 + (now_ns() - limited_since + step.tv_nsec) / ERROR_EVERY;
}

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

	if (same(&v->src, &w->src) && same(&v->dst, &w->dst) && v->sport == w->sport &&
	    v->dport == w->dport)
		return;
	/* One address may be backend and client, and a frontend's port may be a client's. */
	from = find(frontends, frontend_count, &v->dst, v->dport, v->proto);
	to = find(backends, backend_count, &w->dst, w->dport, w->proto);
	if (from && to) {
		for (uint32_t i = 0; i < backend_count; i++)
			if (backends[i].service == from->service && same(&backends[i].a, &w->dst) &&
			    backends[i].port == w->dport)
				return;
	}
	if (find(backends, backend_count, &v->src, v->sport, v->proto))
		return;
	if (find(backends, backend_count, &v->dst, v->dport, v->proto) && same(&v->dst, &w->dst) &&
	    v->dport == w->dport)
		return;
	violated(RULE_ENDS, p, in, r);
}

static void check_translation(const struct program *p, const struct view *v, const struct frame *in,
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

static bool is_rejection(const struct view *v, const struct frame *in, const struct view *w,
			 const struct frame *out)
{
	if (!w->version || w->version != v->version || !same(&v->src, &w->dst) ||
	    !same(&v->dst, &w->src))
		return false;
	if (v->proto == TCP)
		return w->proto == TCP && w->l4 + 20 == out->length && out->b[w->l4 + 13] & RST &&
		       v->l4 + 20 <= in->length && !(in->b[v->l4 + 13] & RST);
	if (w->proto != (v->version == 4 ? ICMP : ICMP6) || out->length < w->l4 + 8)
		return false;
	if (out->b[w->l4] != (v->version == 4 ? 3 : 1) ||
	    out->b[w->l4 + 1] != (v->version == 4 ? 3 : 4))
		return false;
	return v->proto != w->proto || out->length != in->length || !v->is_error;
}

static void check_rejection(const struct program *p, const struct view *v, const struct view *w,
			    const struct frame *in, const struct result *r)
{
	const uint8_t *b = in->b, *o = r->out.b;
	const uint32_t length = r->out.length - w->l4;

	if (w->l3 + w->l3_length != r->out.length ||
	    (w->version == 4 && checksum(sum16(o + w->l3, 20))))
		violated(RULE_REJECT_IP, p, in, r);
	/* A test run's packet has a link layer, behind which the kernel would make room. */
	if (p->kind == KIND_RAW && w->proto != TCP)
		return;
	if (checksum(sum16(o + w->l4, length) +
		     (w->proto == ICMP ? 0 : pseudo(w, o, length, w->proto))))
		violated(RULE_REJECT_CHECK, p, in, r);
	if (v->is_error || v->is_later)
		violated(RULE_REJECT_REJECTED, p, in, r);
	if (w->proto == TCP) {
		const uint8_t flags = b[v->l4 + 13];
		const uint32_t data = end_of(v, in) - v->l4 - (b[v->l4 + 12] >> 4) * 4;
		const bool acks = flags & ACK;

		if (get16(o + w->l4) != get16(b + v->l4 + 2) ||
		    get16(o + w->l4 + 2) != get16(b + v->l4))
			violated(RULE_REJECT_ENDS, p, in, r);
		if (acks ? get32(o + w->l4 + 4) != get32(b + v->l4 + 8)
			 : get32(o + w->l4 + 8) !=
				    get32(b + v->l4 + 4) + data + !!(flags & SYN) + !!(flags & FIN))
			violated(RULE_REJECT_NUMBERS, p, in, r);
	} else {
		const uint32_t quoted = v->l3_length < 128 ? v->l3_length : 128;

		if (length != 8 + quoted || memcmp(o + w->l4 + 8, b + v->l3, quoted))
			violated(RULE_REJECT_QUOTE, p, in, r);
	}
}

static void check(struct program *p, const struct frame *in, const struct result *r)
{
	const struct view v = read_input(p, in), w = read_frame(&r->out, l3_of(p));
	const bool is_changed = r->out.length != in->length || memcmp(in->b, r->out.b, in->length);
	const int pass = p->kind == KIND_XDP ? 2 : -1;

	if (p->kind == KIND_XDP ? r->verdict < 2 || r->verdict > 4
				: r->verdict != -1 && r->verdict != 2 && r->verdict != 7) {
		violated(RULE_VERDICT, p, in, r);
		return;
	}
	if (!may_be_served(&v)) {
		unserved++;
		if (r->verdict != pass)
			violated(RULE_DROPPED, p, in, r);
		else if (is_changed)
			violated(RULE_NO_SERVICE, p, in, r);
	}
	if (p->kind != KIND_XDP && r->verdict == 2) {
		p->dropped++;
		return;
	}
	if (!is_changed) {
		p->passed++;
		return;
	}
	if (p->kind != KIND_XDP && is_rejection(&v, in, &w, &r->out)) {
		p->rejected++;
		check_rejection(p, &v, &w, in, r);
		if (w.proto != TCP && p->kind != KIND_LOOPBACK && !within_limit())
			violated(RULE_REJECT_LIMIT, p, in, r);
		return;
	}
	p->translated++;
	p->forwarded += r->verdict != pass;
	if (v.version)
		check_translation(p, &v, in, r);
	pool[rnd(POOL) % (++pooled < POOL ? pooled : POOL)] = r->out;
}

/* ---- running */

static bool run(struct program *p, const struct frame *in, struct result *r)
{
	static const uint8_t none[ETHERNET];
	static uint8_t out[4 * ROOM];
	uint32_t start = 0;
	uint8_t context[192] = { 0 };
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.test.prog_fd = p->fd;
	attr.test.data_in = (uintptr_t)in->b;
	attr.test.data_size_in = in->length;
	attr.test.data_out = (uintptr_t)out;
	attr.test.data_size_out = sizeof(out);
	attr.test.ctx_in = (uintptr_t)context;
	attr.test.ctx_size_in = sizeof(context);
	attr.test.repeat = 1;
	if (p->kind == KIND_XDP) {
		attr.test.ctx_size_in = 24;
		memcpy(context + 4, &in->length, 4);
		memcpy(context + 12, &p->ifindex, 4);
	} else {
		memcpy(context + 36, &p->ingress, 4);
		memcpy(context + 40, &p->ifindex, 4);
	}
	p->runs++;
	if (syscall(__NR_bpf, BPF_PROG_TEST_RUN, &attr, sizeof(attr)) < 0) {
		p->refused++;
		r->verdict = errno;
		r->out.length = 0;
		/* The kernel makes no packet of less than an IP header behind a link layer's. */
		if (errno != EINVAL || in->length >= ETHERNET + 40 ||
		    (in->length >= ETHERNET + 20 && get16(in->b + 12) != 0x86dd))
			violated(RULE_RUN, p, in, r);
		return false;
	}
	r->verdict = (int)attr.test.retval;
	if (attr.test.data_size_out > ROOM) {
		fprintf(stderr, "%s made %u bytes of %u\n", p->name, attr.test.data_size_out,
			in->length);
		exit(2);
	}
	r->out.length = attr.test.data_size_out;
	/* What goes from a raw device to the loopback device gets a link layer. */
	if (p->kind == KIND_RAW && r->verdict == 7 && r->out.length == in->length + ETHERNET &&
	    !memcmp(out, none, ETHERNET)) {
		start = ETHERNET;
		r->out.length -= ETHERNET;
	}
	memcpy(r->out.b, out + start, r->out.length);
	return true;
}

static uint32_t from_hex(const char *text, uint8_t *to, uint32_t room)
{
	uint32_t count = 0, byte;

	for (; count < room && sscanf(text, "%2x", &byte) == 1; text += 2)
		to[count++] = byte;
	return count;
}

/*
 * Reads the lines of the world: P kind name fd ifindex ingress mac; F and B address port protocol
 * service; N address length of a Service network; A address to be used in packets; S seed; L fd of
 * the map with the limit of ICMP errors.
 * Addresses are 16 bytes, those of IPv4 as IPv4-mapped; addresses and seeds are hexadecimal.
 */
static void read_world(const char *path)
{
	FILE *file = fopen(path, "r");
	char *line = NULL, a[64], mac[16];
	size_t size = 0;

	if (!file)
		die(path);
	while (getline(&line, &size, file) > 0) {
		struct program *p = &programs[program_count];
		struct endpoint e;
		int kind, length;
		unsigned int port, proto;

		switch (line[0]) {
		case 'P':
			if (sscanf(line, "P %d %31s %d %u %u %15s", &kind, p->name, &p->fd,
				   &p->ifindex, &p->ingress, mac) != 6)
				goto wrong;
			p->kind = kind;
			from_hex(mac, p->mac, sizeof(p->mac));
			program_count++;
			break;
		case 'F':
		case 'B':
			if (sscanf(line + 1, " %63s %u %u %d", a, &port, &proto, &e.service) != 4)
				goto wrong;
			from_hex(a, e.a.b, sizeof(e.a));
			e.port = port;
			e.proto = proto;
			if (line[0] == 'F')
				frontends[frontend_count++] = e;
			else
				backends[backend_count++] = e;
			break;
		case 'N':
			if (sscanf(line + 1, " %63s %d", a, &length) != 2)
				goto wrong;
			from_hex(a, networks[network_count].a.b, sizeof(addr));
			networks[network_count++].length = length;
			break;
		case 'A':
			from_hex(line + 2, addresses[address_count++].b, sizeof(addr));
			break;
		case 'L':
			limit_map = atoi(line + 2);
			break;
		case 'S':
			seeds = realloc(seeds, (seed_count + 1) * sizeof(*seeds));
			if (!seeds)
				die("seeds");
			seeds[seed_count].length = from_hex(line + 2, seeds[seed_count].b, LARGEST);
			seed_count++;
			break;
		default:
			goto wrong;
		}
	}
	free(line);
	fclose(file);
	return;
wrong:
	fprintf(stderr, "not understood: %s", line);
	exit(2);
}

static void print_counts(void)
{
	printf("{\"unserved\": %lu, \"violations\": {", unserved);
	for (int i = 0, any = 0; i < 64; i++)
		if (by_rule[i])
			printf("%s\"%d\": %lu", any++ ? ", " : "", i, by_rule[i]);
	printf("}, \"programs\": [");
	for (uint32_t i = 0; i < program_count; i++) {
		const struct program *p = &programs[i];

		printf("%s{\"name\": \"%s\", \"runs\": %lu, \"passed\": %lu, \"dropped\": %lu, "
		       "\"rejected\": %lu, \"translated\": %lu, \"forwarded\": %lu, "
		       "\"refused\": %lu}",
		       i ? ", " : "", p->name, p->runs, p->passed, p->dropped, p->rejected,
		       p->translated, p->forwarded, p->refused);
	}
	printf("]}\n");
}

int main(int count, char **words)
{
	uint64_t runs;

	if (count != 5) {
		fprintf(stderr, "packets WORLD COUNT SEED VIOLATIONS\n");
		return 2;
	}
	make_crc_table();
	read_world(words[1]);
	runs = strtoull(words[2], NULL, 10);
	state = strtoull(words[3], NULL, 10) * 2 + 1;
	report = fopen(words[4], "w");
	if (!report)
		die(words[4]);
	fill_limit();
	for (uint64_t i = 0; i < runs && violations < WORST; i++) {
		struct program *p = &programs[rnd(program_count)];
		const struct frame in = mutated(p);
		struct result r;

		if (one_in(FILL_EVERY))
			fill_limit();
		if (run(p, &in, &r))
			check(p, &in, &r);
	}
	fclose(report);
	print_counts();
	return 0;
}
