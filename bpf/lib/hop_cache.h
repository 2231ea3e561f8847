/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where XDP sends packets of flows that are in the flow cache: what the look-ups of the route, the
 * next hop and the devices have found. It is good for a tenth of a second, so that packets go the
 * former path for no longer than that after a route, a next hop or a device has changed.
 *
 * An element of flow_hops belongs to the slot with its number. Its sum has that of the slot in it:
 * so it is of the same flow, and of the same copy of its entry.
 */
#ifndef EBPFPROXY_HOP_CACHE_H
#define EBPFPROXY_HOP_CACHE_H

#include "flow_cache.h"

#define FLOW_HOP_NS (NSEC_PER_SEC / 10)

static __always_inline struct flow_hop *flow_hop_of(const struct flow *flow)
{
	const struct flow_place place = flow_place_of(flow);

	return map_lookup(flow_hops, &place.slot);
}

static __always_inline u64 hop_sum(const struct flow_hop *hop, u64 slot_sum)
{
	const word *h = (const word *)hop;

	_Static_assert(offsetof(struct flow_hop, reserved) == 6 * sizeof(*h),
		       "no word is left out");
	return slot_sum + h[1] * 0x1b873593 + h[2] * 0x2c1b3c6d + h[3] * 0x297a2d39 +
	       h[4] * 0x3c6ef363 + h[5] * 0x5bd1e995;
}

/* Copies what is known of the flow in @slot; returns false if that is not good any more. */
static __always_inline bool hop_cache_read(const struct flow *flow, const struct flow_slot *slot,
					   struct flow_hop *copy, u64 now)
{
	const struct flow_hop *hop = flow_hop_of(flow);

	if (!hop)
		return false;
	*copy = *hop;
	/* From here on the compiler has to read the copy. */
	asm volatile("" ::: "memory");
	return copy->sum == hop_sum(copy, slot->sum) && (s64)(now - copy->until) <= 0;
}

/* Keeps @found of the flow in @slot. */
static __always_inline void hop_cache_fill(const struct flow *flow, const struct flow_slot *slot,
					   struct flow_hop *found, u64 now)
{
	struct flow_hop *hop = flow_hop_of(flow);

	if (!hop)
		return;
	found->until = now + FLOW_HOP_NS;
	found->sum = hop_sum(found, slot->sum);
	*hop = *found;
}

#endif
