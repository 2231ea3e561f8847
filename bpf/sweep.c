/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sweep of conntrack (BPF_PROG_TYPE_SCHED_CLS, attached to nothing): the agent copies entries
 * from the map into sweep_keys and sweep_values, a batch at a time, and runs sweep_entries() until
 * all of them have had their turn (BPF_PROG_TEST_RUN). That ends the flows that have timed out, or
 * whose backend was removed, and counts those that are open. Afterwards sweep_filter() takes out of
 * flow_filter what no entry needs.
 *
 * The kernel copies a bucket under its lock, so that no entry is missed while others come and go.
 * bpf_for_each_map_elem() would take less time, but follows an element that is given to another key
 * into that one's bucket, and misses the rest of its own: then a flow might lose its mark in
 * flow_filter. It also walks the whole map in one go, with bottom halves disabled.
 *
 * A run may be interrupted by packets of its CPU: it uses no memory of theirs.
 */
#include "lib/compat.h"
#include "lib/conntrack.h"
#include "lib/decision_packet.h"
#include "lib/filter.h"
#include "lib/measure.h"
#include "lib/service.h"
#include "lib/stale.h"
#include "lib/timeout.h"

/*
 * A run takes so many entries, or words of flow_filter: calling the program takes longer than one
 * of them. The agent knows both (datapath/flows/sweeper.py).
 */
#define ENTRIES_OF_A_RUN 6
#define WORDS_OF_A_RUN	 128

static __always_inline struct sweep *sweep_of(void)
{
	u32 zero = 0;

	return map_lookup(sweep, &zero);
}

/* Takes the next number; returns false after the last. */
static __always_inline bool next_number(struct sweep *s, u32 *number)
{
	if (!s || s->next >= s->count)
		return false;
	*number = s->next++;
	return true;
}

/* Says if a flow has timed out. @seen is what both of its entries have seen. */
static __always_inline bool is_silent(const struct sweep *s, const struct flow *flow,
				      const struct nat *nat, u8 seen)
{
	const u64 lasted = is_less(nat->created + NSEC_PER_SEC - 1, nat->last);
	const u32 row = timeouts_of(flow->proto);

	return (s64)(s->now - nat->last) > (s64)timeout(s, row, seen, lasted);
}

/* Says if an entry is of a flow that ends now because its backend has left the Service. */
static __always_inline bool is_of_removed(const struct flow *flow, const struct nat *nat)
{
	return has_departed(nat->service_id, nat->backend_id, flow->proto == IPPROTO_TCP);
}

/*
 * Claims the entry of a reply direction, of which @copy is a copy, so that no other flow gets its
 * port before it is deleted by its key: it would be that flow's by then. An entry that a program at
 * a packet has claimed stays until the next sweep: that program has replaced it by then, unless it
 * failed, or claimed an element that just got this entry.
 */
static __always_inline bool claim_reply(const struct sweep *s, struct nat *nat,
					const struct nat *copy)
{
	const u32 marks = s->mark & FLOW_MARKS;

	_Static_assert(SEEN_LEFT_1 << 1 == SEEN_LEFT_2, "one product");
	if (claim_same_entry(nat, copy))
		return true;
	if (!(copy->seen & SEEN_CLAIMED))
		return false;
	if (copy->seen & (marks ^ FLOW_MARKS) * SEEN_LEFT_1)
		return true;
	mark_seen(nat, marks * SEEN_LEFT_1);
	return false;
}

/* Says if an element has the entry that @copy was read from, under @key, and no packet since. */
static __always_inline bool is_untouched(const struct flow *key, const struct nat *nat,
					 const struct nat *copy)
{
	return conntrack_lookup(key) == nat && is_same_entry(nat, copy) &&
	       *(const volatile u64 *)&nat->last == copy->last;
}

/*
 * Says if the entries of a pair, or the one there is, may be deleted by their keys. A client that
 * uses its port again may have replaced them meanwhile, or may keep them: see keep_entry().
 */
static __always_inline bool claim_pair(struct sweep *s, const struct flow *key, struct nat *in_map,
				       struct nat *other)
{
	const bool is_reply = s->nat.flags & NAT_REPLY;
	struct nat *reply = is_reply ? in_map : other;

	if (reply && !claim_reply(s, reply, is_reply ? &s->nat : &s->partner))
		return false;
	if (is_untouched(key, in_map, &s->nat) &&
	    (!other || is_untouched(&s->partner_key, other, &s->partner)))
		return true;
	if (reply)
		release_entry(reply);
	return false;
}

static __always_inline void delete_entry(struct sweep *s, const struct flow *key)
{
	if (!map_delete(conntrack, key))
		s->deleted++;
}

enum outcome {
	GONE,
	KEPT,
	ENDED,
};

/* Counts a TCP connection that got no reply. */
static __always_inline void note_unanswered(const struct flow *key, const struct nat *original,
					    u8 seen)
{
	/* With DSR the node that has chosen the backend counts it. */
	if (MEASURE_CONNECTIONS && key->proto == IPPROTO_TCP && !(seen & FLOW_SEEN) &&
	    !original->acked && !(original->flags & NAT_DSR_BACKEND))
		measure_failure(original->service_id, original->backend_id, FAILURE_TIMEOUT);
}

/*
 * Counts a pair that ends for the backend of its original direction, which has the key @key. @seen
 * is what both directions have seen.
 */
static __always_inline void count_ended(struct sweep *s, const struct flow *key,
					const struct nat *original, u8 seen, bool is_removed)
{
	struct backend *backend;

	if (original->flags & NAT_SOURCE)
		return;
	if (is_removed) {
		s->removed[!addr_is_v4(&key->src)]++;
		flow_decision(key, NULL, PLACE_AGENT, DECISION_BACKEND_LEFT, EVENT_BACKEND_GONE,
			      original->service_id, original->backend_id, 0);
	} else {
		note_unanswered(key, original, seen);
	}
	backend = is_closed(original) ? NULL : backend_of(original->backend_id);
	if (backend)
		backend->flows_seen |= FLOWS_ENDED;
}

/*
 * Ends the pair that has the entry @key if it is over, as the map has it now: both halves go
 * together.
 */
static __always_inline enum outcome end_if_over(struct sweep *s, const struct flow *key)
{
	const struct nat *nat = &s->nat, *partner = &s->partner;
	struct nat *in_map = conntrack_read(key, &s->nat), *other = NULL;
	bool is_removed, has_partner;
	u8 seen, lasting;

	if (!in_map)
		return GONE;
	is_removed = is_of_removed(key, nat);
	if (!is_removed && !is_silent(s, key, nat, nat->seen))
		return KEPT;
	partner_key(&s->partner_key, key, nat);
	if (!(nat->flags & NAT_OWN))
		other = conntrack_read(&s->partner_key, &s->partner);
	has_partner = other && is_reverse(partner, key);
	seen = lasting = nat->seen | partner->seen;
	if (is_half_open(key, nat->flags & NAT_REPLY ? partner : nat))
		lasting &= ~SEEN_REPLY;
	if (!is_removed && has_partner && !is_silent(s, &s->partner_key, partner, lasting))
		return KEPT;
	if (!claim_pair(s, key, in_map, has_partner ? other : NULL)) {
		s->left += is_removed;
		return KEPT;
	}
	/* The original direction goes first: no packet of the client is to find half of a flow. */
	if (nat->flags & NAT_REPLY && has_partner)
		delete_entry(s, &s->partner_key);
	delete_entry(s, key);
	if (!(nat->flags & NAT_REPLY) && has_partner)
		delete_entry(s, &s->partner_key);
	/* Without a partner nobody knows if there was a reply. */
	if (!(nat->flags & NAT_REPLY))
		count_ended(s, key, nat, has_partner ? seen : SEEN_REPLY, is_removed);
	else if (has_partner)
		count_ended(s, &s->partner_key, partner, seen, is_removed);
	return ENDED;
}

/*
 * Ends a Service pair that lacks the masquerade which has just ended: the client may have begun it
 * once more meanwhile, and what it had put in the masquerade's place was deleted by its key. With
 * its next packet it begins anew. @s->other_key is the key of the reply direction.
 */
static __always_inline void end_unmasked(struct sweep *s)
{
	s->partner_key = reverse_of(&s->other_key, STAGE_EGRESS);
	if (conntrack_lookup(&s->partner_key) || !conntrack_read(&s->other_key, &s->nat))
		return;
	partner_key(&s->partner_key, &s->other_key, &s->nat);
	delete_entry(s, &s->partner_key);
	delete_entry(s, &s->other_key);
}

/*
 * Ends the flow of an entry if it is over. A masquerade stays as long as its flow, and goes after
 * it: without it the backend would see the client. So does a direct flow with a port of its own,
 * while its Service's flow is in the way.
 */
static __always_inline enum outcome end_flow_if_over(struct sweep *s, const struct flow *key,
						     const struct nat *nat)
{
	const bool is_source = nat->flags & NAT_SOURCE;
	enum outcome outcome;

	/* This is the key of the reply direction, of the Service's flow; then of the masquerade. */
	if (is_source == !(nat->flags & NAT_REPLY))
		s->other_key = *key;
	else
		partner_key(&s->other_key, key, nat);
	s->other_key = reverse_of(&s->other_key, STAGE_EGRESS);
	s->key = *key;
	if (!is_source) {
		outcome = end_if_over(s, &s->key);
		if (outcome == ENDED && conntrack_read(&s->other_key, &s->nat) &&
		    (s->nat.flags & (NAT_SOURCE | NAT_REPLY)) == NAT_SOURCE &&
		    end_if_over(s, &s->other_key) == ENDED) {
			s->other_key = reverse_of(&s->other_key, STAGE_EGRESS);
			end_unmasked(s);
		}
		return outcome;
	}
	if (end_if_over(s, &s->other_key) == KEPT)
		return KEPT;
	outcome = end_if_over(s, &s->key);
	if (outcome == ENDED && nat->service_id != NOBODY)
		end_unmasked(s);
	return outcome;
}

/* Handles the entry of the batch that has this number. */
static __always_inline void sweep_entry(struct sweep *s, u32 number)
{
	const struct flow *key = map_lookup(sweep_keys, &number);
	const struct nat *nat = map_lookup(sweep_values, &number);
	struct backend *backend;

	if (!key || !nat)
		return;
	flow_mark(key, nat, s->mark);
	/* For most entries the copy alone is looked at, and the shorter time. */
	if ((is_of_removed(key, nat) || is_silent(s, key, nat, nat->seen)) &&
	    end_flow_if_over(s, key, nat) != KEPT)
		return;
	s->kept++;
	if (nat->flags & (NAT_SOURCE | NAT_REPLY) || is_closed(nat))
		return;
	backend = backend_of(nat->backend_id);
	if (backend)
		backend->flows_seen++;
}

int sweep_entries(struct __sk_buff *skb)
{
	struct sweep *s = sweep_of();
	u32 number;

	(void)skb;
#pragma clang loop unroll(disable)
	for (int i = 0; i < ENTRIES_OF_A_RUN; i++) {
		if (!next_number(s, &number))
			break;
		sweep_entry(s, number);
	}
	return 0;
}

int sweep_filter(struct __sk_buff *skb)
{
	struct sweep *s = sweep_of();
	u64 *words = map_value(flow_filter), others;
	u32 number;

	(void)skb;
	if (!next_number(s, &number))
		return 0;
	words += number % (FLOW_FILTER_WORDS / WORDS_OF_A_RUN) * WORDS_OF_A_RUN;
	others = ~(s->mark * 0x0101010101010101ULL);
#pragma clang loop unroll(disable)
	for (int i = 0; i < WORDS_OF_A_RUN; i++) {
		if (words[i] & others)
			__sync_fetch_and_and(&words[i], ~others);
	}
	return 0;
}
