/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Packets that no Service serves: those that pass, those that are rejected or dropped, and those
 * that are recorded.
 */
#ifndef EBPFPROXY_UNSERVED_H
#define EBPFPROXY_UNSERVED_H

#include "conntrack.h"
#include "device.h"
#include "frontend.h"
#include "masquerade.h"
#include "service_cidr.h"

/*
 * Says if a packet is a reply. Networks outside may overlap with Service CIDRs (10.96.0.0/12): a
 * host there that connects to this node, or to a pod by its own address, gets its replies, but
 * nobody may connect to it. kube-proxy has the same rule (ct state new).
 */
static __always_inline bool is_reply(const struct packet *p)
{
	return p->proto == IPPROTO_TCP ? (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN
				       : is_outside_client(&p->flow.dst);
}

/*
 * Records a client outside whose address is in a Service CIDR. TCP needs no record: its flags show
 * the direction.
 */
static __always_inline void note_outside_client(struct __sk_buff *skb, const struct packet *p)
{
	struct scratch *s = scratch();

	if (!s || skb->pkt_type != PACKET_HOST || !in_service_cidr(&p->flow.src) ||
	    is_at_local_device(skb))
		return;
	outside_client_key(&s->key, &p->flow.src);
	conntrack_note(s, SEEN_REPLY);
}

/*
 * Drops a packet to an unallocated address. The check is at egress and not where the packet came
 * in, so that another proxy's rules in netfilter come first, and routing finds what the node itself
 * has.
 */
static __always_inline int drop_unallocated(struct __sk_buff *skb, const struct packet *p)
{
	if (!in_service_cidr(&p->flow.dst) || is_at_local_device(skb) || is_reply(p))
		return PASS;
	count_unallocated(&p->flow.dst, UNALLOCATED_PACKET);
	return drop(EVENT_NO_SUCH_SERVICE);
}

/* Handles a packet to an address that we know, with no Service at its port. */
static __always_inline int no_service(struct __sk_buff *skb, const struct packet *p)
{
	if (is_cluster_ip(&p->flow.dst))
		return rejection(EVENT_NO_SUCH_PORT);
	if (p->flow.stage == STAGE_EGRESS)
		return drop_unallocated(skb, p);
	/* The host would reset a connection that is masqueraded. */
	return is_masquerade_port(p->flow.dport) && may_be_migrating(p) &&
			       may_be_backend(&p->flow.src, p->flow.sport)
		       ? drop(EVENT_NO_FLOW)
		       : PASS;
}

/* Handles a packet whose ports are unknown. */
static __always_inline int handle_without_ports(struct __sk_buff *skb, const struct packet *p,
						enum parse_result parsed)
{
	switch (parsed) {
	case PARSE_TRUNCATED:
		return pass(EVENT_MALFORMED);
	case PARSE_FIRST_FRAG_UNSEEN:
		return is_cluster_ip(&p->flow.dst) ? drop(EVENT_FRAGMENT) : no_service(skb, p);
	case PARSE_OTHER:
		/* Among ICMP messages only an echo request may be answered by an error. */
		if (is_icmp(p) && p->tcp_flags != (p->is_v4 ? ICMP_ECHO : ICMPV6_ECHO))
			return PASS;
		return no_service(skb, p);
	default:
		return PASS;
	}
}

/*
 * Records a flow of the node's own: the packet has passed netfilter, comes from a frontend's
 * address and port, and belongs to no flow of ours. A socket of this host has the port, or
 * netfilter's NAT took it for a pod. While kube-proxy's connections live on behind us it may also
 * be the reply in one of those, which begins anew with us.
 */
static __always_inline void note_own(const struct packet *p)
{
	const struct target from = { p->flow.src, p->flow.sport, service_protocol(p->flow.proto) };
	struct scratch *s = scratch();
	struct service *svc;
	struct device *node;
	u32 any = 0;

	if (!s || !port_of_interest(from.port))
		return;
	svc = AT_LOOPBACK ? service_of_host(&from) : find_service(&from);
	if (!svc || svc->flags & SERVICE_OWN)
		return;
	node = map_at(devices, any);
	if (!node || !(node->flags & (HANDOVER_MODE | NO_NEW_FLOWS)))
		conntrack_note_own(s, &p->flow);
}

#endif
