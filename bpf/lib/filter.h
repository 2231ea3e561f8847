/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Two Bloom filters with one hash each and a bitmap of ports: a packet of no Service costs two
 * array reads and no hash lookup. Filters have false positives, never false negatives.
 *
 * The agent writes address_filter, one bit an address: addresses of frontends and of this node. It
 * also writes port_filter, for frontends' ports: a tunnel's packets to this node match none of
 * them. Programs write flow_filter, one byte a pair of addresses, when they insert an entry.
 * datapath/services/filter.py computes the same hash.
 */
#ifndef EBPFPROXY_FILTER_H
#define EBPFPROXY_FILTER_H

#include "addr.h"
#include "maps.h"

#define ADDRESS_FILTER_BITS 20
#define FLOW_FILTER_BITS    18

#define GOLDEN 0x9e3779b1U /* 2^32 / the golden ratio */

static __always_inline u32 addr_fold(const struct inet_addr *a)
{
	return a->word[3] + a->word[2] * 0x85ebca6bU + a->word[1] * 0xc2b2ae35U +
	       a->word[0] * 0x27d4eb2fU;
}

static __always_inline bool address_of_interest(const struct inet_addr *a)
{
	u32 hash = (addr_fold(a) * GOLDEN) >> (32 - ADDRESS_FILTER_BITS), zero = 0;
	u8 *bits = map_lookup(address_filter, &zero);

	return bits && bits[hash >> 3] & (1 << (hash & 7));
}

static __always_inline bool port_of_interest(__be16 port)
{
	u32 number = bpf_ntohs(port), zero = 0;
	u8 *bits = map_lookup(port_filter, &zero);

	/* The compiler knows that a port has 16 bits; verifiers before Linux 6.2 do not. */
	barrier_var(number);
	return bits && bits[(number >> 3) & 0x1fff] & (1 << (number & 7));
}

static __always_inline u8 *flow_filter_byte(const struct inet_addr *src,
					    const struct inet_addr *dst)
{
	u32 hash = (addr_fold(src) * 3 + addr_fold(dst)) * GOLDEN, zero = 0;
	u8 *bytes = map_lookup(flow_filter, &zero);

	return bytes ? bytes + (hash >> (32 - FLOW_FILTER_BITS)) : NULL;
}

/* Says if conntrack may have an entry for packets from @src to @dst. */
static __always_inline bool flow_of_interest(const struct inet_addr *src,
					     const struct inet_addr *dst)
{
	u8 *byte = flow_filter_byte(src, dst);

	return byte && *byte;
}

/*
 * Does the same at the loopback device, where most packets have one and the same pair of addresses:
 * there the destination port counts as well.
 */
static __always_inline bool loopback_flow_of_interest(const struct flow *flow)
{
	struct inet_addr dst = flow->dst;
	u8 *byte;

	dst.word[0] ^= flow->dport;
	byte = flow_filter_byte(&flow->src, &dst);
	return byte && *byte;
}

static __always_inline void flow_note(const struct flow *flow)
{
	struct inet_addr dst = flow->dst;
	u8 *byte;

	if (AT_LOOPBACK && flow->stage == STAGE_EGRESS)
		dst.word[0] ^= flow->dport;
	byte = flow_filter_byte(&flow->src, &dst);

	if (byte && !*byte)
		*byte = 1;
}

#endif
