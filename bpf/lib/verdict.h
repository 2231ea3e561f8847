/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Verdicts about packets of known flows: a packet follows its flow, or the flow has ended. */
#ifndef EBPFPROXY_VERDICT_H
#define EBPFPROXY_VERDICT_H

#include "conntrack.h"
#include "device.h"
#include "frontend.h"
#include "masquerade.h"
#include "stale.h"
#include "timeout.h"

/*
 * Says if a SYN is the one that the flow has begun with, sent again: it may end before data that
 * the first one had (TCP Fast Open), or that has been sent since.
 */
static __always_inline bool is_repeated(const struct packet *syn, const struct nat *nat)
{
	return nat->end && nat->end - syn->seq_end <= 0xffff;
}

/*
 * Says if a flow's original direction leads to a backend that has left the Service, or came through
 * a frontend that has. @nat is a copy of the entry @in_map.
 */
static __always_inline bool is_stale(const struct packet *p, const struct nat *nat,
				     struct nat *in_map, bool opens)
{
	const u64 epoch = epoch_of(nat->service_id);
	const struct flow *flow = &p->flow;
	struct backend *backend;

	/* Nothing has left the Service since. Most packets need no more than this. */
	if (!opens && nat->epoch == (u16)epoch)
		return false;
	/* The client's own packets come to this node now: another one has chosen the backend. */
	if (DSR_ACCEPTS && nat->flags & NAT_DSR_BACKEND)
		return false;
	backend = backend_known(nat->backend_id, &nat->dst, nat->dport,
				service_protocol(flow->proto));
	if (!backend)
		return true;
	/*
	 * No new connection goes to a backend that takes none: its client may have lost the old one
	 * unnoticed. One that is being opened stays, as with netfilter, while its Service chooses
	 * the backend: another one may not answer before this one does.
	 */
	if (opens && backend->state != BACKEND_ACTIVE && !is_repeated(p, nat))
		return true;
	if (nat->epoch == (u16)epoch)
		return false;
	if (has_departed(nat->service_id, nat->backend_id, flow->proto == IPPROTO_TCP && !opens))
		return true;
	if ((opens || service_protocol(flow->proto) == IPPROTO_UDP) &&
	    !is_owner(flow, nat->service_id))
		return true;
	if (is_same_entry(in_map, nat))
		in_map->epoch = (u16)epoch;
	return false;
}

/*
 * Says if a packet that may begin a flow has the entry of one that has timed out, and that no sweep
 * has ended yet, as while no agent runs. It begins anew, as with netfilter. So does one of which
 * the map has evicted what it needs: its replies would go astray, or its backend would see the
 * client. Where the option of DSR makes the entries its sender decides.
 */
static __always_inline bool is_over_or_lost(const struct packet *p, const struct nat *nat,
					    bool opens)
{
	const struct flow *flow = &p->flow;
	struct scratch *s = scratch_of(p);
	const u64 now = coarse_now(s);
	const struct nat *reply;

	if ((s64)(now - nat->last) <= (s64)NSEC_PER_SEC || (flow->proto == IPPROTO_TCP && !opens) ||
	    (DSR_ACCEPTS && nat->flags & NAT_DSR_BACKEND))
		return false;
	partner_key(&s->key, flow, nat);
	reply = conntrack_lookup(&s->key);
	if (!reply || (DSR_SENDS && is_dsr_original(nat)))
		reply = nat;
	else if (!is_reverse(reply, flow))
		return true;
	/* The time of a flow's last packet is known to a second. */
	if (is_over(flow, nat, reply, timeouts_of(flow->proto), now - NSEC_PER_SEC))
		return true;
	return nat->seen & SEEN_MASKED && !has_its_masquerade(s, nat, flow->proto);
}

enum flow_verdict {
	FLOW_FORWARD,
	FLOW_RESTART, /* handled as the first packet */
	FLOW_MOVE,    /* the same, because its backend has left */
	FLOW_OVER,    /* the same, because it has timed out, or lost an entry */
	FLOW_REJECT,  /* a connection that has lost its backend */
};

/* Decides about a packet that has the entry @in_map. */
static __always_inline enum flow_verdict flow_verdict_of(const struct packet *p, struct nat *in_map)
{
	const struct nat *nat = &scratch_of(p)->entry;
	const u8 handshake = p->tcp_flags & (TCP_SYN | TCP_ACK);
	const bool opens = handshake == TCP_SYN;

	/*
	 * kube-proxy masquerades by any port, also by that of a closed flow: this is the reply that
	 * it waits for.
	 */
	if (nat->flags & NAT_REPLY && handshake == (TCP_SYN | TCP_ACK) && is_closed(nat) &&
	    defer_to_kube_proxy(p))
		return FLOW_RESTART;
	/* A masquerade ends with the flow that it belongs to. */
	if (nat->flags & NAT_REPLY || (nat->flags & NAT_SOURCE && !is_of_no_service(nat)))
		return FLOW_FORWARD;
	if (!(nat->flags & NAT_SOURCE) && is_stale(p, nat, in_map, opens))
		return p->flow.proto != IPPROTO_TCP || opens ? FLOW_MOVE : FLOW_REJECT;
	/* A client that uses its port again opens another connection. */
	if (opens && is_closed(nat))
		return FLOW_RESTART;
	return !(nat->flags & NAT_SOURCE) && is_over_or_lost(p, nat, opens) ? FLOW_OVER
									    : FLOW_FORWARD;
}

#endif
