/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* One entry of conntrack: its element in the map, and the sum by which readers know it. */
#ifndef EBPFPROXY_ENTRY_H
#define EBPFPROXY_ENTRY_H

#include "addr.h"
#include "compat.h"
#include "maps.h"

typedef u64 __attribute__((may_alias)) word;

/* Sums up a key: any odd factors do. */
static __always_inline u64 key_sum(const struct flow *flow)
{
	const word *k = (const word *)flow;

	_Static_assert(sizeof(*flow) == 5 * sizeof(*k), "no word is left out");
	return k[0] * 0x1b873593 + k[1] * 0x2c1b3c6d + k[2] * 0x297a2d39 + k[3] * 0x3c6ef363 +
	       k[4] * 0x5bd1e995;
}

/* Sums up a key and the ends of what its packets become. */
static __always_inline u64 ends_sum(const struct flow *flow, const struct nat *nat)
{
	const word *n = (const word *)nat;

	_Static_assert(offsetof(struct nat, backend_id) == 5 * sizeof(*n), "no word is left out");
	return key_sum(flow) + n[0] * 0x64e6d7b3 + n[1] * 0x6b43a9b5 + n[2] * 0x7feb352d +
	       n[3] * 0x52dce729 + n[4] * 0x38495ab5;
}

/*
 * Sums up what an entry never changes, and its key. with_check() in flow_layout.py computes the
 * same.
 */
static __always_inline u64 check_of(const struct flow *flow, const struct nat *nat)
{
	return ends_sum(flow, nat) + ((u64)nat->backend_id << 8 | nat->flags) +
	       nat->created * 0x45d9f3b1;
}

/* Returns SEEN_RST where a RST, or a FIN of both sides, has closed a flow, else 0. */
static __always_inline u8 has_closed(u8 seen)
{
	_Static_assert(SEEN_FIN << 1 == SEEN_REPLY_FIN && SEEN_FIN << 2 == SEEN_RST,
		       "one shift each");
	/* One branch of the caller tells both, and the verifier walks on from there once less. */
	return (seen | (seen & seen << 1) << 1) & SEEN_RST;
}

static __always_inline bool is_closed(const struct nat *nat)
{
	return has_closed(nat->seen);
}

/* Returns the key of what answers @flow, at another or the same stage. */
static __always_inline struct flow reverse_of(const struct flow *flow, enum stage stage)
{
	return (struct flow) {
		.src = flow->dst,
		.dst = flow->src,
		.sport = flow->dport,
		.dport = flow->sport,
		.proto = flow->proto,
		.stage = stage,
	};
}

static __always_inline struct nat *conntrack_lookup(const struct flow *flow)
{
	return map_lookup(conntrack, flow);
}

#endif
