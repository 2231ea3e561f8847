/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The flow cache: copies of conntrack's entries for flows that have many packets, in an array that
 * programs read without a helper. Conntrack stays the truth; a copy is good for a quarter of a
 * second, and then the next packet looks the flow up again. Nobody but programs at packets knows
 * the cache, and an empty one is always right.
 *
 * Each flow has one slot, by a hash; flow_tags has a tag of the flow that is in it, from the same
 * hash. Tags stay in a CPU's own cache: a packet of a flow that is not in its slot does not read
 * that. Flows are in groups, of which flow_tags has a time until which the slot of one may be good.
 * Few flows last, and most groups have none: what packets of short connections read is few lines.
 *
 * A slot is written word by word, and two CPUs may do so at once. So a reader copies it, compares
 * the key, and believes the copy if slot_sum() of it is right, as conntrack_read() does.
 *
 * While a flow is in its slot, its sequence numbers are there, and those in conntrack are older.
 * Whoever reads the entry from conntrack takes them out of the slot (flow_cache_take()), and that
 * ends the copy: the fast path does so at each of a flow's packets that it does not translate by
 * the copy. Fragments and packets with IP options pass it by, and what XDP leaves to tc
 * where that has no fast path; the numbers of these may be overwritten by older ones from the slot.
 * A RST or FIN takes the other direction's numbers from there, whichever path it takes. A slot that
 * another flow used within the last second is left to it; from one that is idle the numbers go back
 * to conntrack.
 *
 * A program that replaces or deletes an entry clears the tag of its slot afterwards, if that is of
 * the flow (flow_cache_clear()), if its group may have a slot that is good. A slot that was filled
 * is not used yet: a packet that comes a while later looks the flow up again, and makes the slot
 * valid if it still has that entry. By then all CPUs have seen the tag, and this one sees what they
 * have stored before: either that look-up finds that the entry was replaced, or who replaces it
 * finds the tag. Only filling sets a tag. So neither needs a memory barrier, and however they meet,
 * a slot with the flow's tag is right in the end. The agent and its sweep clear no slots. They
 * delete what is idle, and flows of backends that have left, whose original direction knows by the
 * Service's epoch at once; replies are translated for a quarter of a second more, as are flows that
 * a command deletes. An entry that is taken back while its flow is being made was never copied.
 */
#ifndef EBPFPROXY_FLOW_CACHE_H
#define EBPFPROXY_FLOW_CACHE_H

#include "entry.h"
#include "filter.h"
#include "options.h"

/* A copy is good for this long. */
#define FLOW_CACHE_NS (NSEC_PER_SEC / 4)
/*
 * A flow comes in when it has lasted a second, and a packet follows so soon after the one that
 * conntrack has noted as the first of its second: a flow with few packets would be copied for each.
 */
#define FLOW_CACHE_GAP_NS (NSEC_PER_SEC / 16)
/* A slot may become valid this long after it was filled: no CPU keeps a store to itself as long. */
#define FLOW_CACHE_WAIT_NS (20 * NSEC_PER_MSEC)

/* Flows are in groups by this many bits of a hash of their ports. */
#define FLOW_GROUP_BITS 10
/*
 * A group counts as having a slot that is good for this long after one was filled or renewed. That
 * one may be good, or become so again, for half of it; the rest is for a CPU that is late.
 */
#define FLOW_GROUP_NS NSEC_PER_SEC
/* No group's time is further ahead, of 2^32: one that is has passed long ago. */
#define FLOW_GROUP_AHEAD (1 << 20)

struct flow_tags {
	u32 until[1 << FLOW_GROUP_BITS]; /* of each group: flow_group_time() */
	u16 tags[];
};

struct flow_place {
	u32 slot;
	u16 tag; /* not 0 */
};

static __always_inline struct flow_place flow_place_of(const struct flow *flow)
{
	u64 hash = key_sum(flow);
	struct flow_place place;

	hash = (hash ^ hash >> 32) * 0xd6e8feb86659fd93ULL;
	place.slot = hash >> 43 & FLOW_SLOT_MASK;
	place.tag = (u16)(hash >> 27) | 1;
	return place;
}

static __always_inline volatile u16 *flow_tag_at(struct flow_place place)
{
	return ((struct flow_tags *)map_value(flow_tags))->tags + place.slot;
}

static __always_inline volatile u32 *flow_group_of(const struct flow *flow)
{
	const u32 ports = *(const u32 __attribute__((may_alias)) *)&flow->sport;

	return ((struct flow_tags *)map_value(flow_tags))->until +
	       (ports * GOLDEN >> (32 - FLOW_GROUP_BITS));
}

/* Returns a time, ns, in about milliseconds. */
static __always_inline u32 flow_group_time(u64 now)
{
	return (u32)(now >> 20);
}

/* Says if the slot of a flow may be good. In most groups none is: few flows have many packets. */
static __always_inline bool may_be_cached(const struct flow *flow, u64 now)
{
	return *flow_group_of(flow) - flow_group_time(now) < FLOW_GROUP_AHEAD;
}

/*
 * Notes that the slot of a flow is being filled or renewed; the line is written to now and then. A
 * CPU that is late may set the time back, by as much as it is late; FLOW_GROUP_NS has room for half
 * a second of that. If it is later, who replaces an entry meanwhile may leave the copy in its slot,
 * which is then used for as long as it is good: no longer than a quarter of a second.
 */
static __always_inline void flow_group_note(const struct flow *flow, u64 now)
{
	volatile u32 *until = flow_group_of(flow);

	if (*until - flow_group_time(now + FLOW_GROUP_NS) > flow_group_time(FLOW_CACHE_WAIT_NS))
		*until = flow_group_time(now + FLOW_GROUP_NS + FLOW_CACHE_WAIT_NS);
}

static __always_inline struct flow_slot *flow_slot_at(struct flow_place place)
{
	return map_at(flow_cache, place.slot);
}

/* Sums up all of a slot that is good until @until, but for the sequence numbers. */
static __always_inline u64 slot_sum(const struct flow *flow, const struct nat *nat, u64 until)
{
	return ends_sum(flow, nat) + nat->marks * 0x2545f491 + until * 0x1d872b41 +
	       nat->created * 0x45d9f3b1;
}

static __always_inline bool is_same_flow(const struct flow *a, const struct flow *b)
{
	const word *x = (const word *)a, *y = (const word *)b;

	return !((x[0] ^ y[0]) | (x[1] ^ y[1]) | (x[2] ^ y[2]) | (x[3] ^ y[3]) | (x[4] ^ y[4]));
}

/* Returns the slot of a flow, if it is there. */
static __always_inline struct flow_slot *flow_slot_of(const struct flow *flow,
						      struct flow_place place)
{
	struct flow_slot *slot;

	if (*flow_tag_at(place) != place.tag)
		return NULL;
	slot = flow_slot_at(place);
	return slot && is_same_flow(&slot->flow, flow) ? slot : NULL;
}

/*
 * Copies the slot of a flow, if it is there; nat.last of the copy is the time until which it is
 * good. Returns the slot.
 */
static __always_inline struct flow_slot *flow_cache_read(const struct flow *flow, struct nat *copy,
							 u64 now)
{
	struct flow_slot *slot;

	if (!may_be_cached(flow, now))
		return NULL;
	slot = flow_slot_of(flow, flow_place_of(flow));
	if (!slot)
		return NULL;
	*copy = slot->nat;
	/* From here on the compiler has to read the copy. */
	asm volatile("" ::: "memory");
	return slot->sum == slot_sum(flow, copy, copy->last) ? slot : NULL;
}

/*
 * Clears the slot of a flow whose entry has just been replaced or deleted. If it is another's with
 * the same tag, that one's next packet looks it up.
 */
static __always_inline void flow_cache_clear(const struct flow *flow, u64 now)
{
	struct flow_place place;

	if (!may_be_cached(flow, now))
		return;
	place = flow_place_of(flow);
	if (*flow_tag_at(place) == place.tag)
		*flow_tag_at(place) = 0;
}

/* Says if a flow may be in its slot. Most flows are none that last. */
static __always_inline bool has_lasted(const struct nat *entry)
{
	return (s64)(entry->last - entry->created) >= (s64)NSEC_PER_SEC;
}

/* Says if a slot is of the entry @entry, and moves the sequence numbers from there, if it is valid.
 */
static __always_inline bool take_numbers(const struct flow_slot *slot, struct nat *in_map,
					 struct nat *entry)
{
	if (slot->nat.check != entry->check)
		return false;
	if (slot->sum) {
		in_map->end = entry->end = slot->nat.end;
		in_map->acked = entry->acked = slot->nat.acked;
	}
	return true;
}

/* Ends the copy of a flow, of whose element @in_map @entry is a copy, too. */
static __always_inline void flow_cache_take(const struct flow *flow, struct nat *in_map,
					    struct nat *entry)
{
	struct flow_place place;
	const struct flow_slot *slot;

	if (!has_lasted(entry))
		return;
	place = flow_place_of(flow);
	slot = flow_slot_of(flow, place);
	if (!slot)
		return;
	take_numbers(slot, in_map, entry);
	*flow_tag_at(place) = 0;
}

/* Fills the slot of a flow with its entry, unless another flow uses it. */
static __always_inline void flow_cache_fill(const struct flow *flow, struct flow_place place,
					    const struct nat *entry, u64 now)
{
	struct flow_slot *slot = flow_slot_at(place);
	struct nat *other;

	if (!slot)
		return;
	if (*flow_tag_at(place)) {
		if ((s64)(now - slot->nat.last) < (s64)NSEC_PER_SEC)
			return;
		other = slot->sum ? conntrack_lookup(&slot->flow) : NULL;
		if (other && other->check == slot->nat.check) {
			other->end = slot->nat.end;
			other->acked = slot->nat.acked;
		}
	}
	*flow_tag_at(place) = 0;
	slot->sum = 0;
	slot->flow = *flow;
	slot->nat = *entry;
	slot->nat.last = now;
	flow_group_note(flow, now);
	/* The compiler may not store the tag earlier. */
	asm volatile("" ::: "memory");
	*flow_tag_at(place) = place.tag;
}

/*
 * Makes the slot of a flow valid, or good for another while, or fills it, if the flow has many
 * packets. @entry is a copy of its element @in_map. Returns the slot if it is valid.
 */
static __always_inline struct flow_slot *
flow_cache_renew(const struct flow *flow, struct nat *in_map, struct nat *entry, u64 now)
{
	struct flow_place place;
	struct flow_slot *slot;
	s64 ago;

	if (!has_lasted(entry))
		return NULL;
	place = flow_place_of(flow);
	slot = flow_slot_of(flow, place);
	if (!slot) {
		if ((s64)(now - entry->last) < (s64)FLOW_CACHE_GAP_NS)
			flow_cache_fill(flow, place, entry, now);
		return NULL;
	}
	/* Since it was filled, or was good for the last time. */
	ago = now - slot->nat.last;
	if (!take_numbers(slot, in_map, entry) || ago >= (s64)FLOW_CACHE_NS) {
		*flow_tag_at(place) = 0;
		return NULL;
	}
	if (!slot->sum) {
		if (ago < (s64)FLOW_CACHE_WAIT_NS)
			return NULL;
		/* Two CPUs may have filled it at once. */
		if (check_of(flow, &slot->nat) != entry->check) {
			*flow_tag_at(place) = 0;
			return NULL;
		}
		slot->nat.end = entry->end;
		slot->nat.acked = entry->acked;
	}
	flow_group_note(flow, now);
	slot->nat.marks = entry->marks;
	slot->nat.last = now + FLOW_CACHE_NS;
	slot->sum = slot_sum(flow, entry, now + FLOW_CACHE_NS);
	return slot;
}

#endif
