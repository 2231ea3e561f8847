/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Conntrack: flows and what they are rewritten to.
 *
 * A client c reaches backend b through frontend f. Netfilter, routing and the CNI's own rules must
 * see c and b, as with kube-proxy: so the frontend is replaced before them, at ingress, and put
 *back after them, at egress. Masquerading (c becomes the node's n) is done the other way round.
 *That is two pairs of entries, each complete in itself:
 *
 *	               key                  becomes
 *	Service        c -> f  at ingress   c -> b
 *	  its reply    b -> c  at egress    f -> c
 *	masquerade     c -> b  at egress    n -> b
 *	  its reply    b -> n  at ingress   b -> c
 *
 * Where this host itself is the client, its packets are seen at egress only, and one pair does all:
 *
 *	host           c -> f  at egress    n -> b
 *	  its reply    b -> n  at ingress   f -> c
 *
 * The loopback device has the same pair, and c may be a loopback address. If b is this host itself,
 * n is b's address, and the reply is looked up as at ingress when it leaves: it comes in there.
 *
 * A pair's other half is always the reverse of what this half writes, at the other stage.
 *
 * With --bypass-netfilter a masqueraded flow needs one pair as well, both at ingress, and is
 * forwarded from there:
 *
 *	bypass         c -> f  at ingress   n -> b
 *	  its reply    b -> n  at ingress   f -> c
 *
 * What this node itself sends from an address and port that is a frontend's has one entry, which
 * translates nothing: the answers are the node's, not a client's.
 *
 *	own            b -> n  at ingress   as it is
 *
 * An outside host with an address of the Service network has one, too: see asker_key().
 *
 * A client that asks a Service and its backend itself from one port, p, asks the latter from
 * another, q: else the answers would be taken for the Service's.
 *
 *	direct         c:p -> b  at ingress   c:q -> b
 *	  its reply    b -> c:q  at egress    b -> c:p
 */
#ifndef EBPFPROXY_CONNTRACK_H
#define EBPFPROXY_CONNTRACK_H

#include "algorithm.h"
#include "events.h"
#include "filter.h"
#include "load.h"
#include "maps.h"
#include "packet.h"

#define NSEC_PER_SEC 1000000000ULL

/*
 * Too large for the stack; and what the verifier reads back from a map it knows nothing of, so that
 * ways through a program that differ only in the packet's values are one way to it. Programs at tc
 * run with bottom halves off: one at a time on a CPU.
 */
struct scratch {
	struct packet packet;
	struct flow key;
	struct nat nat;
	struct service service;
	struct client client;
	u8 bytes[192];
};

_Static_assert(sizeof(struct scratch) <= 512, "SCRATCH_SIZE in layout.py");

static __always_inline struct scratch *scratch(void)
{
	u32 zero = 0;

	return map_lookup(scratch, &zero);
}

/* This CPU's packet, for one at a stage. */
static __always_inline struct packet *packet_of(enum stage stage)
{
	struct scratch *s = scratch();

	if (!s)
		return NULL;
	s->packet.flow.stage = stage;
	s->packet.flow.pad = 0;
	return &s->packet;
}

static __always_inline struct nat *conntrack_lookup(const struct flow *flow)
{
	return map_lookup(conntrack, flow);
}

/* The key of the other half. */
static __always_inline void partner_key(struct flow *key, const struct flow *flow,
					const struct nat *nat)
{
	key->src = nat->dst;
	key->dst = nat->src;
	key->sport = nat->dport;
	key->dport = nat->sport;
	key->proto = flow->proto;
	key->stage = nat->flags & NAT_BYPASS ? flow->stage : !flow->stage;
	key->pad = 0;
}

/* The other half of @s->key and @s->nat, in their place. */
static __always_inline void invert_entry(struct scratch *s, const struct flow *flow)
{
	const u32 end = s->nat.end;

	partner_key(&s->key, flow, &s->nat);
	s->nat.src = flow->dst;
	s->nat.dst = flow->src;
	s->nat.sport = flow->dport;
	s->nat.dport = flow->sport;
	s->nat.flags ^= NAT_REPLY;
	/* What this half has sent is what the other is to acknowledge. */
	s->nat.end = s->nat.acked;
	s->nat.acked = end;
}

/* Whether an entry writes the reverse of what @flow shows: then that is its other half. */
static __always_inline bool is_reverse(const struct nat *nat, const struct flow *flow)
{
	return nat->sport == flow->dport && nat->dport == flow->sport &&
	       addr_equal(&nat->src, &flow->dst) && addr_equal(&nat->dst, &flow->src);
}

/* Says if an entry is of a direct flow: a masquerade's has the stages the other way round. */
static __always_inline bool is_of_direct_flow(const struct nat *nat, const struct flow *flow)
{
	return nat->flags & NAT_SOURCE &&
	       !(nat->flags & NAT_REPLY) == (flow->stage == STAGE_INGRESS);
}

enum insert {
	INSERT_DONE,
	INSERT_TAKEN, /* another flow has the key */
	INSERT_FULL,
};

static __always_inline bool has_closed(u8 seen)
{
	return (seen & SEEN_RST) ||
	       (seen & (SEEN_FIN | SEEN_REPLY_FIN)) == (SEEN_FIN | SEEN_REPLY_FIN);
}

static __always_inline bool is_closed(const struct nat *nat)
{
	return has_closed(nat->seen);
}

/*
 * Inserts @s->key and @s->nat. @replace: a live entry may be overwritten; a closed one always is,
 * in its place: an LRU map takes a new element, and perhaps somebody's old one, before it looks.
 */
static __always_inline enum insert conntrack_insert(struct scratch *s, bool replace)
{
	struct nat *known = conntrack_lookup(&s->key);
	long error;

	if (known) {
		if (!replace && !is_closed(known))
			return INSERT_TAKEN;
		*known = s->nat;
		return INSERT_DONE;
	}
	error = bpf_map_update_elem(MAP(conntrack), &s->key, &s->nat, BPF_NOEXIST);
	if (error)
		return error == -EEXIST ? INSERT_TAKEN : INSERT_FULL;
	count(EVENT_FLOWS_MADE);
	flow_note(&s->key);
	return INSERT_DONE;
}

/* Both halves' packets may be looked at on two CPUs at once. True for the one that closes it. */
static __always_inline bool mark_seen(struct nat *nat, u8 seen)
{
	struct nat bits = { .seen = seen };

	bits.marks = __sync_fetch_and_or(&nat->marks, bits.marks);
	return !has_closed(bits.seen) && has_closed(bits.seen | seen);
}

/* A flow is counted, and its end, by the half of its questions. */
static __always_inline void conntrack_end(struct nat *nat)
{
	if (!(nat->flags & (NAT_SOURCE | NAT_REPLY)) && mark_seen(nat, SEEN_RST))
		load_end_flow(nat->backend_id);
}

static __always_inline void conntrack_forget(const struct flow *flow, struct nat *nat)
{
	struct flow key;

	conntrack_end(nat);
	partner_key(&key, flow, nat);
	if (!map_delete(conntrack, &key))
		count(EVENT_FLOWS_ENDED);
	if (!map_delete(conntrack, flow))
		count(EVENT_FLOWS_ENDED);
}

/* More than any window that a receiver offers in practice, and 1/256 of all sequence numbers. */
#define TCP_WINDOW (1U << 24)

/*
 * Says if the receiver of a RST or FIN takes it for the connection's, as far as the two halves
 * tell; what is stray or forged passes, but ends nothing. A RST counts from what the receiver
 * expects next to where the sender's data ends: elsewhere in the window the receiver challenges it
 * (RFC 5961, 3.2), and is answered by one that fits. Netfilter is stricter.
 */
static __always_inline bool is_believable(const struct packet *p, const struct nat *nat,
					  const struct nat *partner)
{
	const u32 ahead = p->seq - partner->acked, sent = nat->end - partner->acked;

	if (!partner->end && !partner->acked)
		return true;
	/* A FIN that is sent again may begin with data that has been acknowledged. */
	if (!(p->tcp_flags & TCP_RST))
		return !partner->acked || p->end - partner->acked - 1 < TCP_WINDOW;
	/* A RST that answers a SYN shows it by what it acknowledges (RFC 9293, 3.10.7.3). */
	if (!partner->acked)
		return p->tcp_flags & TCP_ACK && p->ack == partner->end;
	return !ahead || (sent <= TCP_WINDOW && ahead <= sent);
}

/* Returns the later of two sequence numbers; one that is nowhere near has replaced the connection.
 */
static __always_inline u32 later(u32 known, u32 seen)
{
	return known && known - seen <= TCP_WINDOW ? known : seen;
}

/* Notes a segment's sequence numbers. Most change one of them, pure repetitions none. */
static __always_inline void note_sequence(const struct packet *p, struct nat *nat)
{
	u32 end = p->end, acked = p->tcp_flags & TCP_ACK ? p->ack : 0;

	if (!(p->tcp_flags & TCP_SYN)) {
		end = later(nat->end, end);
		acked = acked ? later(nat->acked, acked) : nat->acked;
	}
	if (nat->end != end)
		nat->end = end;
	if (nat->acked != acked)
		nat->acked = acked;
}

/*
 * Follows the state of a flow by a packet of it. Both halves learn of its end, for a port that is
 * used again shows in either; that there was an answer is enough for one to know.
 */
static __always_inline void conntrack_track(const struct packet *p, struct nat *nat)
{
	const struct flow *flow = &p->flow;
	const u64 now = bpf_ktime_get_coarse_ns();
	const u8 tcp_flags = p->tcp_flags;
	u8 ended = nat->seen;

	if (now - nat->last > NSEC_PER_SEC)
		nat->last = now;
	if (nat->flags & NAT_REPLY && !(nat->seen & SEEN_REPLY))
		mark_seen(nat, SEEN_REPLY);
	if (tcp_flags & TCP_RST)
		ended |= SEEN_RST;
	else if (tcp_flags & TCP_FIN)
		ended |= nat->flags & NAT_REPLY ? SEEN_REPLY_FIN : SEEN_FIN;
	ended &= ~SEEN_REPLY;
	if (ended & ~nat->seen) {
		struct nat *partner;
		struct flow key;
		bool closes;

		partner_key(&key, flow, nat);
		partner = conntrack_lookup(&key);
		/* Of a flow that has begun anew, the old answers' partner is not theirs any more.
		 */
		if (partner && !is_reverse(partner, flow))
			partner = NULL;
		if (partner && !is_believable(p, nat, partner))
			return;
		closes = mark_seen(nat, ended) && !(nat->flags & NAT_REPLY);
		if (partner) {
			closes |= mark_seen(partner, ended) && nat->flags & NAT_REPLY;
			partner->last = now;
		}
		if (closes && !(nat->flags & NAT_SOURCE))
			load_end_flow(nat->backend_id);
	}
	/* What is of TCP, and no later fragment, has flags. */
	if (tcp_flags && !(tcp_flags & TCP_RST))
		note_sequence(p, nat);
}

/* An id that no Service and no backend has. */
#define NOBODY 0xffffffffU

/* Inserts the entry of @s->key, which translates nothing, or says that it is still in use. */
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
	conntrack_insert(s, false);
}

/*
 * Notes a flow of this node itself by a packet that leaves: its answers come to an address and port
 * that a Service has, and are no client's. A flow of the Service with these ends stays what it is.
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
