/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Direct flows, to no Service: one whose replies would be taken for those of a Service's flow gets
 * a port of its own. lib/conntrack.h describes its entries.
 */
#ifndef EBPFPROXY_DIRECT_FLOW_H
#define EBPFPROXY_DIRECT_FLOW_H

#include "conntrack.h"
#include "device.h"
#include "masquerade.h"

/*
 * Says if a packet may be the first of a flow. Another packet of no known flow may be the reply to
 * a connection of this node's own. SCTP peers send a HEARTBEAT every 30 s: with it an association
 * whose flow was lost goes on, as with netfilter's conntrack.
 */
static __always_inline bool can_open_flow(struct __sk_buff *skb, const struct packet *p)
{
	u8 chunk;

	if (p->flow.proto == IPPROTO_TCP)
		return (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	if (p->flow.proto == IPPROTO_SCTP)
		return !p->is_later_fragment &&
		       !bpf_skb_load_bytes(skb, p->l4 + SCTP_CHUNK, &chunk, sizeof(chunk)) &&
		       (chunk == SCTP_INIT || chunk == SCTP_HEARTBEAT);
	return true;
}

/*
 * Says if a packet to no frontend opens a direct flow whose replies would be taken for a Service's:
 * its client reaches the same backend through a Service from the same port. What a program below
 * has translated looks the same, so only that one decides.
 */
static __always_inline bool is_direct_clash(struct __sk_buff *skb, const struct packet *p)
{
	const struct flow *flow = &p->flow;
	const struct flow key = reverse_of(flow, STAGE_EGRESS);
	struct scratch *s = scratch_of(p);

	if (!flow_of_interest(&key.src, &key.dst) || is_seen_below(skb, STAGE_INGRESS) ||
	    !can_open_flow(skb, p))
		return false;
	/* An entry without NAT_REPLY is of a connection that this host itself has opened. */
	return conntrack_read(&key, &s->other) && s->other.flags & NAT_REPLY &&
	       !is_reverse(&s->other, flow);
}

/*
 * Says if a packet that leaves opens a flow whose replies would be taken for those of a client that
 * we masquerade. Netfilter's MASQUERADE chooses any port, as do CNIs with --random-fully, and so
 * may sockets of this node. Where another device has our program as well, what is masqueraded there
 * looks the same; and backends on this node are masqueraded to by nobody else.
 */
static __always_inline bool is_masquerade_clash(struct __sk_buff *skb, const struct packet *p)
{
	const struct flow *flow = &p->flow;
	const struct flow key = reverse_of(flow, STAGE_INGRESS);
	struct scratch *s = scratch_of(p);

	return conntrack_read(&key, &s->other) &&
	       (s->other.flags & (NAT_SOURCE | NAT_REPLY)) == (NAT_SOURCE | NAT_REPLY) &&
	       !is_reverse(&s->other, flow) && can_open_flow(skb, p) && is_only_way_out(skb);
}

/* Gives a direct flow another port, as netfilter's NAT does for the later of two (null binding). */
static __always_inline int create_direct_flow(struct __sk_buff *skb, const struct packet *p)
{
	struct scratch *s = scratch();
	enum insert done;

	if (!s)
		return PASS;
	s->nat.src = p->flow.src;
	s->nat.dst = p->flow.dst;
	s->nat.sport = p->flow.sport;
	s->nat.dport = p->flow.dport;
	s->nat.service_id = s->nat.backend_id = NOBODY;
	s->nat.seen = 0;
	s->nat.epoch = 0;
	s->nat.end = s->nat.acked = 0;
	s->nat.last = s->nat.created = coarse_now(s);
	if (p->tcp_flags)
		note_sequence(p, &s->nat, &s->nat);
	s->is_known = s->has_entry;
	done = insert_source(skb, s, &p->flow, entry_of(s));
	s->entry = s->nat;
	return done == INSERT_DONE ? TRANSLATE : insert_failed(s, done);
}

#endif
