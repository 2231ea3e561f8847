/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Conntrack: flows, and what their packets are rewritten to.
 *
 * A client c reaches backend b through frontend f. Netfilter, routing and the CNI's own rules must
 * see c and b, as with kube-proxy: the frontend is replaced before them, at ingress, and put back
 * after them, at egress. Masquerading (c becomes the node's n) happens the other way round. That
 * makes two pairs of entries, each complete in itself. In each pair the first entry is of the
 * original direction, the second of the reply direction:
 *
 *	               key                  becomes
 *	Service        c -> f  at ingress   c -> b
 *	  its reply    b -> c  at egress    f -> c
 *	masquerade     c -> b  at egress    n -> b
 *	  its reply    b -> n  at ingress   b -> c
 *
 * Where this host itself is the client, its packets appear at egress only, and one pair does all:
 *
 *	host           c -> f  at egress    n -> b
 *	  its reply    b -> n  at ingress   f -> c
 *
 * The loopback device uses the same pair, and c may be a loopback address. If b is this host
 * itself, n is b's address, and the reply is looked up with the ingress stage when it leaves by lo:
 * it comes in there.
 *
 * The key of a pair's other entry is always the reverse of what this entry writes, at the other
 * stage.
 *
 * With --bypass-netfilter, or where XDP forwards, a masqueraded flow needs one pair, too, both at
 * ingress, and is forwarded from there:
 *
 *	bypass         c -> f  at ingress   n -> b
 *	  its reply    b -> n  at ingress   f -> c
 *
 * A flow that this node itself sends from a frontend's address and port has one entry, which
 * translates nothing: the replies belong to the node, not to a client.
 *
 *	own            b -> n  at ingress   unchanged
 *
 * A host outside that has an address of the Service network has such an entry, too: see
 * outside_client_key().
 *
 * If a client connects to a Service and directly to its backend from one port p, the direct flow
 * gets another port q: otherwise its replies would be taken for the Service's.
 *
 *	direct         c:p -> b  at ingress   c:q -> b
 *	  its reply    b -> c:q  at egress    b -> c:p
 *
 * And if netfilter, for a CNI, masquerades a packet by the port p that stands for a client of ours,
 * the packet gets another port where it leaves:
 *
 *	others'        n:p -> b  at egress    n:q -> b
 *	  its reply    b -> n:q  at ingress   b -> n:p
 */
#ifndef EBPFPROXY_CONNTRACK_H
#define EBPFPROXY_CONNTRACK_H

#include "branchless.h"
#include "dsr_state.h"
#include "entry.h"
#include "events.h"
#include "filter.h"
#include "flow_cache.h"
#include "load.h"
#include "maps.h"
#include "options.h"
#include "scratch.h"
#include "tcp_state.h"

/*
 * Looks up an entry and copies it. An LRU map may give an element to another key while it is being
 * read: only the copy may be believed, and only if its check says that it is whole, and of this
 * key. Else the entry has just been evicted, deleted or replaced, which the second look-up tells.
 *
 * Returns the element, which packets write to: see conntrack_track().
 */
static __always_inline struct nat *conntrack_read(const struct flow *flow, struct nat *copy)
{
#pragma clang loop unroll(full)
	for (int i = 0; i < 2; i++) {
		struct nat *nat = conntrack_lookup(flow);

		if (!nat)
			return NULL;
		*copy = *nat;
		/* From here on the compiler has to read the copy. */
		asm volatile("" ::: "memory");
		if (copy->check == check_of(flow, copy))
			return nat;
	}
	return NULL;
}

/* Looks up the entry of a packet's flow, and leaves its copy where entry_of() finds it. */
static __always_inline struct nat *conntrack_of(const struct packet *p)
{
	struct scratch *s = scratch_of(p);
	struct nat *nat = conntrack_read(&p->flow, &s->entry);

	s->has_entry = nat != NULL;
	return nat;
}

/* Returns the copy of the entry that the packet's flow has had so far, NULL where it has none. */
static __always_inline const struct nat *entry_of(const struct scratch *s)
{
	return s->has_entry ? &s->entry : NULL;
}

/* Computes the key of the other entry of the pair. */
static __always_inline void partner_key(struct flow *key, const struct flow *flow,
					const struct nat *nat)
{
	key->src = nat->dst;
	key->dst = nat->src;
	key->sport = nat->dport;
	key->dport = nat->sport;
	key->proto = flow->proto;
	key->stage = flow->stage ^ is_zero(nat->flags & NAT_BYPASS);
	key->pad = 0;
}

/* Turns @s->key and @s->nat into the other entry of the pair. */
static __always_inline void invert_entry(struct scratch *s, const struct flow *flow)
{
	const u32 end = s->nat.end;

	partner_key(&s->key, flow, &s->nat);
	s->nat.src = flow->dst;
	s->nat.dst = flow->src;
	s->nat.sport = flow->dport;
	s->nat.dport = flow->sport;
	s->nat.flags ^= NAT_REPLY;
	/* What one direction has sent is what the other one acknowledges. */
	s->nat.end = s->nat.acked;
	s->nat.acked = end;
}

/* Says if an entry writes the reverse of @flow: then it is the other entry of that pair. */
static __always_inline bool is_reverse(const struct nat *nat, const struct flow *flow)
{
	return nat->sport == flow->dport && nat->dport == flow->sport &&
	       addr_equal(&nat->src, &flow->dst) && addr_equal(&nat->dst, &flow->src);
}

/* Says if an entry belongs to a direct flow; a masquerade's stages are the other way round. */
static __always_inline bool is_of_direct_flow(const struct nat *nat, const struct flow *flow)
{
	return nat->flags & NAT_SOURCE &&
	       !(nat->flags & NAT_REPLY) == (flow->stage == STAGE_INGRESS);
}

/* Says if an entry has given another port to a flow that is no Service's. */
static __always_inline bool is_of_no_service(const struct nat *nat)
{
	return nat->flags & NAT_SOURCE && nat->service_id == NOBODY;
}

enum insert {
	INSERT_DONE,
	INSERT_TAKEN, /* another flow has the key */
	INSERT_FULL,
};

/* Inserts @s->key and @s->nat if there is no such key. */
static __always_inline enum insert conntrack_add(struct scratch *s)
{
	long error;

	s->nat.check = check_of(&s->key, &s->nat);
	error = bpf_map_update_elem(MAP(conntrack), &s->key, &s->nat, BPF_NOEXIST);
	if (error)
		return error == -EEXIST ? INSERT_TAKEN : INSERT_FULL;
	count(EVENT_FLOWS_MADE);
	flow_note(&s->key);
	return INSERT_DONE;
}

/*
 * Inserts @s->key and @s->nat. Where the key is @known the entry is replaced by another element:
 * readers on other CPUs have the old one or the new one. What the map or the agent has taken out
 * may have a copy in the flow cache, too.
 */
static __always_inline enum insert conntrack_put(struct scratch *s, bool known)
{
	enum insert done = INSERT_DONE;
	long error = -ENOENT;

	s->nat.check = check_of(&s->key, &s->nat);
	if (known)
		error = bpf_map_update_elem(MAP(conntrack), &s->key, &s->nat, BPF_EXIST);
	if (error)
		done = error == -ENOENT ? conntrack_add(s) : INSERT_FULL;
	if (done == INSERT_DONE)
		flow_cache_clear(&s->key, coarse_now(s));
	return done;
}

/*
 * Sets bits in nat.seen; packets of both directions may arrive on two CPUs at once. Returns true
 * for the caller that closes the flow.
 */
static __always_inline bool mark_seen(struct nat *nat, u8 seen)
{
	struct nat bits = { .seen = seen };

	bits.marks = __sync_fetch_and_or(&nat->marks, bits.marks);
	return has_closed(bits.seen | seen) & ~has_closed(bits.seen);
}

/*
 * Claims an entry whose port another flow is to have, or that is to be deleted: returns true for
 * one caller, on whichever CPU.
 */
static __always_inline bool claim_entry(struct nat *nat)
{
	struct nat bits = { .seen = SEEN_CLAIMED };

	bits.marks = __sync_fetch_and_or(&nat->marks, bits.marks);
	return !(bits.seen & SEEN_CLAIMED);
}

/* Gives back what claim_entry() has returned true for, or a sweep has found claimed. */
static __always_inline void release_entry(struct nat *nat)
{
	const struct nat bits = { .seen = SEEN_CLAIMED | SEEN_LEFT_1 | SEEN_LEFT_2 };

	__sync_fetch_and_and(&nat->marks, ~bits.marks);
}

/* Says if the element that @copy was read from still has that entry. */
static __always_inline bool is_same_entry(const struct nat *nat, const struct nat *copy)
{
	return *(const volatile u64 *)&nat->check == copy->check;
}

/* Claims the entry that @copy was read from, and no other that its element may have got since. */
static __always_inline bool claim_same_entry(struct nat *nat, const struct nat *copy)
{
	if (!claim_entry(nat))
		return false;
	if (is_same_entry(nat, copy))
		return true;
	release_entry(nat);
	return false;
}

/* Marks a flow as ended. The entry of the original direction counts it. */
static __always_inline void conntrack_end(struct nat *nat, const struct nat *copy)
{
	if (!(copy->flags & (NAT_SOURCE | NAT_REPLY)) && is_same_entry(nat, copy) &&
	    mark_seen(nat, SEEN_RST))
		load_end_flow(copy->backend_id);
}

/* Takes back an entry that was never used. */
static __always_inline void conntrack_take_back(const struct flow *flow)
{
	if (!map_delete(conntrack, flow))
		count(EVENT_FLOWS_ENDED);
}

/* Deletes an entry. */
static __always_inline void conntrack_delete(const struct flow *flow)
{
	conntrack_take_back(flow);
	flow_cache_clear(flow, bpf_ktime_get_coarse_ns());
}

/* Deletes both entries of a pair. The partner's key may be a later flow's, which took its port. */
static __always_inline void conntrack_forget(const struct flow *flow, struct nat *nat,
					     const struct nat *copy)
{
	struct scratch *s = scratch();
	struct nat *partner;
	struct flow key;

	conntrack_end(nat, copy);
	partner_key(&key, flow, copy);
	partner = s ? conntrack_read(&key, &s->other) : NULL;
	/* Another CPU may be giving its port to another flow. */
	if (partner && is_reverse(&s->other, flow) && claim_same_entry(partner, &s->other))
		conntrack_delete(&key);
	conntrack_delete(flow);
}

/*
 * Puts the other entry of the pair back if the LRU map took it: it may choose the entry of a
 * direction that is silent, or that nobody has looked up for long. This look-up also tells the map
 * that the other entry is in use. Nobody knows then if there was a reply: the flow is taken for one
 * that had, so that it does not lose its port as one that was never answered. A backend that sends
 * its SYN-ACK once more says that the client has not acknowledged it.
 */
static __always_inline void conntrack_keep_partner(struct scratch *s, const struct packet *p,
						   const struct nat *entry)
{
	const struct flow *flow = &p->flow;

	if (entry->flags & NAT_OWN || is_closed(entry))
		return;
	partner_key(&s->key, flow, entry);
	if (conntrack_lookup(&s->key))
		return;
	s->nat = *entry;
	s->nat.seen &= FLOW_SEEN | SEEN_MASKED;
	invert_entry(s, flow);
	if (s->nat.flags & NAT_REPLY) {
		s->nat.seen |= SEEN_REPLY;
	} else if (p->tcp_flags & TCP_SYN) {
		s->nat.acked = 0;
		s->nat.seen &= ~SEEN_REPLY;
	}
	/* A copy of it is as good as before. */
	conntrack_add(s);
}

/*
 * Updates the state of a flow from a RST or FIN, in both entries, since a port that is used again
 * may show up in either direction. Returns false for one that ends nothing.
 *
 * @may_be_cached: the flow cache may have the newest sequence numbers of the other direction.
 */
static __always_inline bool conntrack_track_end(const struct packet *p, struct nat *nat,
						const struct nat *entry, const bool may_be_cached)
{
	const struct flow *flow = &p->flow;
	struct scratch *s = scratch_of(p);
	u8 ended = (entry->seen & FLOW_SEEN & ~SEEN_REPLY) | ended_by(p->tcp_flags, entry->flags);
	struct nat *partner;
	bool closes;

	if (DSR_SENDS)
		ended = dsr_seen(entry, ended);
	if (!(ended & ~entry->seen))
		return true;
	partner_key(&s->key, flow, entry);
	partner = conntrack_read(&s->key, &s->other);
	/* When a flow has begun anew, the former reply's partner is no longer its own. */
	if (partner && !is_reverse(&s->other, flow))
		partner = NULL;
	if (partner && may_be_cached)
		flow_cache_take(&s->key, partner, &s->other);
	if (DSR_SENDS && is_dsr_original(entry) ? !is_near_end(p, entry)
						: partner && !is_believable(p, entry, &s->other))
		return false;
	closes = is_same_entry(nat, entry) && mark_seen(nat, ended) && !(entry->flags & NAT_REPLY);
	if (partner && is_same_entry(partner, &s->other)) {
		closes |= mark_seen(partner, ended) && entry->flags & NAT_REPLY;
		partner->last = coarse_now(s);
	}
	if (closes && !(entry->flags & NAT_SOURCE))
		load_end_flow(entry->backend_id);
	return true;
}

/*
 * Updates the state of a flow from a packet of it.
 *
 * @entry is a copy of @nat. An element that another flow has got since is left alone. If that
 * happens between this look and a write, the other flow gets a time or a sequence number which its
 * next packet puts right.
 */
static __always_inline void conntrack_track(const struct packet *p, struct nat *nat,
					    const struct nat *entry, const bool may_be_cached)
{
	struct scratch *s = scratch_of(p);
	const u64 now = coarse_now(s);

	if (!is_same_entry(nat, entry))
		return;
	if ((s64)(now - entry->last) > (s64)NSEC_PER_SEC) {
		nat->last = now;
		conntrack_keep_partner(s, p, entry);
	}
	/* Only one entry needs to know that there was a reply. */
	if (entry->flags & NAT_REPLY && !(entry->seen & SEEN_REPLY)) {
		mark_seen(nat, SEEN_REPLY);
		if (MEASURE_CONNECTIONS)
			s->is_first_reply = true;
	}
	/* A SYN has other numbers: by them nobody would know that the connection is open. */
	if ((DSR_SENDS && is_dsr_confirmation(p, entry)) ||
	    (p->tcp_flags & TCP_SYN && entry->acked))
		mark_seen(nat, SEEN_REPLY);
	/* TCP packets have flags, except later fragments. */
	if (conntrack_track_end(p, nat, entry, may_be_cached) && p->tcp_flags &&
	    !(p->tcp_flags & TCP_RST))
		note_sequence(p, nat, entry);
}

/* Inserts the entry @s->key, which translates nothing, or refreshes it. */
static __always_inline void conntrack_note(struct scratch *s, u8 seen)
{
	const u64 now = bpf_ktime_get_coarse_ns();
	struct nat *known = conntrack_lookup(&s->key);

	if (known) {
		if (known->flags & NAT_OWN && now - known->last > NSEC_PER_SEC)
			known->last = now;
		return;
	}
	s->nat.src = s->key.src;
	s->nat.dst = s->key.dst;
	s->nat.sport = s->key.sport;
	s->nat.dport = s->key.dport;
	s->nat.service_id = s->nat.backend_id = NOBODY;
	s->nat.flags = NAT_OWN | NAT_REPLY;
	s->nat.seen = seen;
	s->nat.epoch = 0;
	s->nat.end = s->nat.acked = 0;
	s->nat.last = s->nat.created = now;
	conntrack_put(s, false);
}

/*
 * Records a flow of this node itself from a packet that leaves: its replies come to an address and
 * port that a Service has, but belong to no client. A Service's flow with the same ends is left as
 * it is.
 */
static __always_inline void conntrack_note_own(struct scratch *s, const struct flow *flow)
{
	s->key.src = flow->dst;
	s->key.dst = flow->src;
	s->key.sport = flow->dport;
	s->key.dport = flow->sport;
	s->key.proto = flow->proto;
	s->key.stage = STAGE_INGRESS;
	s->key.pad = 0;
	conntrack_note(s, 0);
}

#endif
