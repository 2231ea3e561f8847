/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Two Bloom filters with one hash each and a bitmap of ports: a packet of no Service costs two
 * array reads and no hash lookup. Filters have false positives, never false negatives.
 *
 * The agent writes address_filter, one bit an address: addresses of frontends and of this node. It
 * also writes port_filter, for frontends' ports: a tunnel's packets to this node match none of
 * them. It never clears a bit of backend_ports and backend_filter, which have backends.
 * datapath/services/filter.py computes the same hashes.
 *
 * Programs write flow_filter, one byte a pair of addresses, when they insert an entry, after it is
 * in the map. They set two marks; each sweep sets one of them for every entry that it finds, in
 * turns, and then takes the other one away everywhere. So a byte that no entry needs is 0 after two
 * sweeps. That of an entry never is: either the sweep finds the entry, or it was inserted after the
 * sweep had passed its bucket. Then a program has set both marks, or will once the entry is there,
 * and the one that is left stays until the next sweep has found the entry.
 */
#ifndef EBPFPROXY_FILTER_H
#define EBPFPROXY_FILTER_H

#include "addr.h"
#include "maps.h"

#define ADDRESS_FILTER_BITS 20
#define FLOW_FILTER_BITS    18
#define FLOW_MARKS	    3 /* both */
#define FLOW_FILTER_WORDS   ((1 << FLOW_FILTER_BITS) / 8)

#define GOLDEN 0x9e3779b1U /* 2^32 / the golden ratio */

static __always_inline u32 addr_fold(const struct inet_addr *a)
{
	return a->word[3] + a->word[2] * 0x85ebca6bU + a->word[1] * 0xc2b2ae35U +
	       a->word[0] * 0x27d4eb2fU;
}

static __always_inline bool address_of_interest(const struct inet_addr *a)
{
	u32 hash = (addr_fold(a) * GOLDEN) >> (32 - ADDRESS_FILTER_BITS);
	const u8 *bits = map_value(address_filter);

	return bits[hash >> 3] & (1 << (hash & 7));
}

static __always_inline bool port_is_in(const u8 *bits, __be16 port)
{
	u32 number = bpf_ntohs(port);

	/* The compiler knows that a port has 16 bits; verifiers before Linux 6.2 do not. */
	barrier_var(number);
	return bits[(number >> 3) & 0x1fff] & (1 << (number & 7));
}

static __always_inline bool port_of_interest(__be16 port)
{
	return port_is_in(map_value(port_filter), port);
}

static __always_inline bool may_be_backend_port(__be16 port)
{
	return port_is_in(map_value(backend_ports), port);
}

/*
 * Says if a backend may have the address and port, or may have had them. Its port alone tells most
 * clients: their ports lead to few cache lines.
 */
static __always_inline bool may_be_backend(const struct inet_addr *a, __be16 port)
{
	u32 hash = (addr_fold(a) + bpf_ntohs(port) * 0x165667b1U) * GOLDEN;
	const u8 *bits = map_value(backend_filter);

	if (!may_be_backend_port(port))
		return false;
	hash >>= 32 - ADDRESS_FILTER_BITS;
	return bits[hash >> 3] & (1 << (hash & 7));
}

static __always_inline u8 *flow_filter_byte(const struct inet_addr *src,
					    const struct inet_addr *dst)
{
	const u32 hash = (addr_fold(src) * 3 + addr_fold(dst)) * GOLDEN;

	return (u8 *)map_value(flow_filter) + (hash >> (32 - FLOW_FILTER_BITS));
}

/* Says if conntrack may have an entry for packets from @src to @dst. */
static __always_inline bool flow_of_interest(const struct inet_addr *src,
					     const struct inet_addr *dst)
{
	return *flow_filter_byte(src, dst);
}

/*
 * At the loopback device most packets have one and the same pair of addresses: there the
 * destination port counts as well.
 */
static __always_inline u8 *loopback_filter_byte(const struct flow *flow)
{
	struct inet_addr dst = flow->dst;

	dst.word[0] ^= flow->dport;
	return flow_filter_byte(&flow->src, &dst);
}

static __always_inline bool loopback_flow_of_interest(const struct flow *flow)
{
	return *loopback_filter_byte(flow);
}

/* Notes that conntrack has an entry. It has to be there. */
static __always_inline void flow_note(const struct flow *flow)
{
	struct inet_addr dst = flow->dst;
	u8 *byte;

	if (AT_LOOPBACK && flow->stage == STAGE_EGRESS)
		dst.word[0] ^= flow->dport;
	byte = flow_filter_byte(&flow->src, &dst);
	if (*byte != FLOW_MARKS)
		*byte = FLOW_MARKS;
}

/*
 * Sets a mark of an entry that a sweep has found. The program of the loopback device may have made
 * it if this host is the client. If another program sets both marks meanwhile, one may be lost, but
 * not @mark.
 */
static __always_inline void flow_mark(const struct flow *flow, const struct nat *nat, u8 mark)
{
	u8 *byte = flow_filter_byte(&flow->src, &flow->dst);

	if (!(*byte & mark))
		*byte |= mark;
	if (!(nat->flags & NAT_HOST) || flow->stage != STAGE_EGRESS)
		return;
	byte = loopback_filter_byte(flow);
	if (!(*byte & mark))
		*byte |= mark;
}

#endif
