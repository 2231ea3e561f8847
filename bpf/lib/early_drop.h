/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Early drop: where a new masqueraded flow finds no free port, it gets that of a flow which is not
 * confirmed, or has timed out, and which ends. So a flood from forged addresses ends its own flows,
 * and no port is lost while no agent sweeps. Netfilter does the same where its table is full, but
 * not where ports are short.
 *
 * A flow is confirmed by its first reply; in TCP by the client's ACK of that, since a backend also
 * answers forged SYNs. Of those that are not, and that a packet comes across, the one ends whose
 * client has been silent for longest: one that is just connecting has the time for that, and one
 * that never expects a reply keeps its port while it sends. Flows of this host itself, and those of
 * no Service, stay.
 */
#ifndef EBPFPROXY_EARLY_DROP_H
#define EBPFPROXY_EARLY_DROP_H

#include "conntrack.h"
#include "decision_packet.h"
#include "masquerade.h"
#include "timeout.h"

/* This many ports are looked at. */
#define EARLY_DROP_TRIES 12
/* This is later than any time of an entry. */
#define NEVER (1ULL << 62)

/* Says if a flow is not confirmed, from the two entries of its pair that has the port. */
static __always_inline u64 is_unconfirmed(const struct flow *flow, const struct nat *original,
					  const struct nat *reply)
{
	return is_zero(reply->seen & SEEN_REPLY) | is_half_open(flow, original);
}

/* Says if a flow may end for another one, from the two entries of its pair that has the port. */
static __always_inline u64 may_end(const struct flow *flow, const struct nat *original,
				   const struct nat *reply, u32 row, u64 now)
{
	return is_unconfirmed(flow, original, reply) | is_over(flow, original, reply, row, now);
}

/*
 * Says if an entry is of the reply direction of a client's flow with a port that we have chosen.
 * With DSR a client keeps its own.
 */
static __always_inline u64 has_port_of_ours(const struct nat *nat)
{
	return is_zero((nat->flags & (NAT_REPLY | NAT_OWN | NAT_HOST | NAT_DSR)) ^ NAT_REPLY) &
	       (is_zero(nat->flags & (NAT_SOURCE | NAT_BYPASS)) ^ 1) &
	       (is_zero(nat->service_id ^ NOBODY) ^ 1);
}

/*
 * Looks up the reply direction of the Service's pair, of a masqueraded flow whose reply direction
 * has the entry @nat, and leaves its key in @s. Without it nobody knows the flow's frontend, and
 * not all of the flow would end: its backend would see the client.
 */
static __always_inline struct nat *service_reply(struct scratch *s, const struct nat *nat)
{
	struct nat *found;

	masquerade_key(&s->unconfirmed.reply, nat, s->key.proto);
	found = conntrack_lookup(&s->unconfirmed.reply);
	return found && (found->flags & (NAT_REPLY | NAT_SOURCE | NAT_OWN)) == NAT_REPLY ? found
											 : NULL;
}

/*
 * Looks for the port of a flow that may end, the one whose client has been silent for longest, and
 * leaves it in @s->key. Entries are read in place: end_unconfirmed() makes sure. What it would
 * refuse to end is passed here, or it would be found again and again.
 */
static __always_inline bool find_unconfirmed(struct scratch *s)
{
	const u32 row = timeouts_of(s->key.proto);
	volatile u64 *oldest = &s->unconfirmed.last;
	const u64 now = coarse_now(s);
	u32 start = bpf_get_prandom_u32() % MASQUERADE_RANGE;

	*oldest = NEVER;
#pragma clang loop unroll(disable)
	for (int i = 0; i < EARLY_DROP_TRIES; i++) {
		const struct nat *reply, *original;

		s->key.dport = bpf_htons((u16)(MASQUERADE_FIRST + start));
		start = (start + MASQUERADE_STEP) % MASQUERADE_RANGE;
		reply = conntrack_lookup(&s->key);
		if (!reply || !(has_port_of_ours(reply) & is_zero(reply->seen & SEEN_CLAIMED)))
			continue;
		partner_key(&s->unconfirmed.original, &s->key, reply);
		original = conntrack_lookup(&s->unconfirmed.original);
		if (!original || !is_reverse(original, &s->key))
			continue;
		if (reply->flags & NAT_SOURCE && !service_reply(s, reply))
			continue;
		if (may_end(&s->key, original, reply, row, now) &
		    is_less(original->last, *oldest)) {
			*oldest = original->last;
			s->unconfirmed.port = s->key.dport;
		}
	}
	s->key.dport = s->unconfirmed.port;
	return *oldest != NEVER;
}

/*
 * Ends the flow that has the reply direction @s->key, but for that entry itself, which the caller
 * replaces: so no packet finds the port without an owner. Returns false where the flow has been
 * confirmed, lacks an entry, or is being ended on another CPU. The entry of its frontend may be
 * missing, or another flow's by now: a full table takes that one first, as no packet but the first
 * one need have looked it up.
 *
 * Other entries than the reply's are read in place: each has to write the reverse of the one that
 * led to it. The original direction of the Service's pair goes first: no packet of the client may
 * come to where it is masqueraded any more. If the element that is claimed has got another flow's
 * entry just before, that flow keeps its port even if it is never confirmed.
 */
static __always_inline bool end_unconfirmed(struct scratch *s)
{
	const u32 row = timeouts_of(s->key.proto);
	struct flow *original = &s->unconfirmed.original, *reply = &s->unconfirmed.reply;
	struct nat *in_map, *nat, *counted, *first;

	in_map = conntrack_read(&s->key, &s->other);
	if (!in_map || !has_port_of_ours(&s->other))
		return false;
	partner_key(original, &s->key, &s->other);
	nat = counted = first = conntrack_lookup(original);
	if (!nat || !is_reverse(nat, &s->key) ||
	    !may_end(&s->key, nat, &s->other, row, coarse_now(s)))
		return false;
	if (s->other.flags & NAT_SOURCE) {
		nat = service_reply(s, &s->other);
		if (!nat)
			return false;
		partner_key(&s->unconfirmed.service, reply, nat);
		/* If the element has got another key meanwhile that is not the flow's frontend. */
		if (conntrack_lookup(reply) != nat)
			return false;
		counted = conntrack_lookup(&s->unconfirmed.service);
		if (counted && !is_reverse(counted, reply))
			counted = NULL;
	}
	if (!claim_same_entry(in_map, &s->other))
		return false;
	/* A packet of it may have come, or its client may keep it: see keep_entry(). */
	if (!may_end(&s->key, first, in_map, row, coarse_now(s))) {
		release_entry(in_map);
		return false;
	}
	if (counted && mark_seen(counted, SEEN_RST))
		load_end_flow(s->other.backend_id);
	if (s->other.flags & NAT_SOURCE) {
		if (counted)
			conntrack_delete(&s->unconfirmed.service);
		conntrack_delete(reply);
	}
	conntrack_delete(original);
	count(EVENT_EARLY_DROPS);
	return true;
}

/*
 * Inserts the pair of a new flow for which take_port() has found no port. @s is as that has left
 * it; then @s->nat is the entry of the original direction.
 */
static __always_inline enum insert insert_by_early_drop(struct scratch *s)
{
	struct flow *reply = &s->unconfirmed.reply;
	enum insert done;

	if (!find_unconfirmed(s) || !end_unconfirmed(s))
		return INSERT_TAKEN;
	done = conntrack_put(s, true);
	if (done != INSERT_DONE)
		return done;
	*reply = s->key;
	invert_entry(s, reply);
	done = conntrack_put(s, conntrack_lookup(&s->key));
	if (done != INSERT_DONE)
		conntrack_take_back(reply);
	return done;
}

/*
 * Inserts what insert_failed() has reported, of a flow whose entries @s has, if ending another
 * helps; else drops the packet. finish() calls this, at one place for all kinds of flows: the
 * verifier would walk through it many times where they are created.
 */
static __always_inline int insert_anyway(const struct packet *p)
{
	struct scratch *s = scratch_of(p);
	enum insert done = s->failed;
	bool is_of_service, is_masquerade;
	struct nat *in_map;

	/*
	 * The reply's entry was inserted last: there is no port for it. Where replies come in at
	 * another stage, they do not come to an address of this node.
	 */
	if (!AT_LOOPBACK && done == INSERT_TAKEN && s->nat.flags & NAT_REPLY &&
	    s->key.stage == STAGE_INGRESS)
		done = insert_by_early_drop(s);
	is_of_service = s->nat.service_id != NOBODY;
	is_masquerade = s->nat.flags & NAT_SOURCE && is_of_service;
	if (done != INSERT_DONE) {
		/* Without its masquerade the next packet would show the client to the backend. */
		in_map = !AT_LOOPBACK && is_masquerade ? conntrack_read(&p->flow, &s->entry) : NULL;
		if (in_map)
			conntrack_forget(&p->flow, in_map, &s->entry);
		return drop(done == INSERT_FULL ? EVENT_TABLE_FULL : EVENT_PORTS_TAKEN);
	}
	if (!is_masquerade)
		s->entry = s->nat;
	if (!(s->nat.flags & NAT_SOURCE))
		load_count_flow(s->nat.backend_id);
	if (is_of_service)
		decision_created(p, &s->service, s->nat.backend_id);
	return TRANSLATE;
}

#endif
