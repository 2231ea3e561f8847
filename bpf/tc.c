/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services for packets whose backend no local socket has chosen (BPF_PROG_TYPE_SCHED_CLS): clients
 * outside, SCTP, kernel clients, VMs, sandboxed pods.
 *
 * At ingress, before netfilter and routing, a frontend becomes a backend; at egress, after them,
 * the backend's replies become the frontend's. lib/conntrack.h has the picture, lib/flow.h creates
 * flows. A packet of no Service passes unchanged after two reads of a filter.
 *
 * loopback.c includes this file for the loopback device (AT_LOOPBACK).
 */
#include "lib/compat.h"
#include "lib/conntrack.h"
#include "lib/device.h"
#include "lib/filter.h"
#include "lib/flow.h"
#include "lib/frontend.h"
#include "lib/packet.h"
#include "lib/reject.h"
#include "lib/rewrite.h"
#include "lib/route.h"
#include "lib/service_cidr.h"
#include "lib/stale.h"
#include "lib/unserved.h"

/*
 * Says if an entry is for the program below alone, such as at a bridge's port. On the bridge a
 * translated packet of a Service's flow looks like one of the direct flow; and at the port a
 * translated reply of the direct flow would look like one of the Service's flow.
 */
static __always_inline bool is_left_to_below(struct __sk_buff *skb, const struct packet *p,
					     const struct nat *nat)
{
	return is_of_direct_flow(nat, &p->flow) && is_seen_below(skb, p->flow.stage);
}

/*
 * Says if a flow's original direction leads to a backend that has left the Service, or came through
 * a frontend that has.
 */
static __always_inline bool is_stale(const struct flow *flow, struct nat *nat, bool opens)
{
	struct backend *backend = backend_known(nat->backend_id, &nat->dst, nat->dport,
						service_protocol(flow->proto));
	u64 epoch;

	if (!backend)
		return true;
	/*
	 * No new connection goes to a backend that takes none: its client may have lost the old one
	 * unnoticed.
	 */
	if (opens && backend->state != BACKEND_ACTIVE)
		return true;
	epoch = epoch_of(nat->service_id);
	if (nat->epoch == (u16)epoch)
		return false;
	if (has_departed(nat->service_id, nat->backend_id, flow->proto == IPPROTO_TCP && !opens))
		return true;
	if ((opens || service_protocol(flow->proto) == IPPROTO_UDP) &&
	    !is_owner(flow, nat->service_id))
		return true;
	nat->epoch = (u16)epoch;
	return false;
}

enum flow_verdict {
	FLOW_FORWARD,
	FLOW_RESTART, /* handled as the first packet */
	FLOW_REJECT,  /* a connection that has lost its backend */
};

/* Decides about a packet that has an entry. */
static __always_inline enum flow_verdict flow_verdict_of(const struct packet *p, struct nat *nat)
{
	const bool opens = (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	/* A masquerade ends with the flow that it belongs to. */
	if (nat->flags & NAT_REPLY ||
	    (nat->flags & NAT_SOURCE && !is_of_direct_flow(nat, &p->flow)))
		return FLOW_FORWARD;
	if (!(nat->flags & NAT_SOURCE) && is_stale(&p->flow, nat, opens))
		return p->flow.proto != IPPROTO_TCP || opens ? FLOW_RESTART : FLOW_REJECT;
	/* A client that uses its port again opens another connection. */
	return opens && is_closed(nat) ? FLOW_RESTART : FLOW_FORWARD;
}

static __always_inline int forward_flow(struct __sk_buff *skb, const struct packet *p,
					struct nat *nat)
{
	const bool forwards = nat->flags & NAT_BYPASS;

	if (is_left_to_below(skb, p, nat))
		return PASS;
	conntrack_track(p, nat);
	if (nat->flags & NAT_OWN)
		return PASS;
	if (forwards && p->hops <= 1)
		return drop(EVENT_HOPS);
	if (rewrite(skb, p, nat, forwards))
		return drop(EVENT_REWRITE);
	/* The original direction of a host's flow needs the route of its new destination. */
	if (forwards || (nat->flags & (NAT_HOST | NAT_REPLY)) == NAT_HOST)
		return send_out(skb, &nat->src, &nat->dst);
	if ((nat->flags & (NAT_HOST | NAT_REPLY)) == (NAT_HOST | NAT_REPLY))
		return deliver(skb, nat);
	return PASS;
}

/*
 * Returns true where the packet belongs to no known flow; otherwise it is handled, and @verdict is
 * set.
 */
static __always_inline bool is_of_no_flow(struct __sk_buff *skb, const struct packet *p,
					  int *verdict)
{
	struct nat *nat = conntrack_lookup(&p->flow);
	enum flow_verdict found;

	if (!nat)
		return true;
	found = flow_verdict_of(p, nat);
	if (found == FLOW_FORWARD) {
		*verdict = forward_flow(skb, p, nat);
		return false;
	}
	/* Nothing may be in the way of a direct flow that begins anew: it keeps its port then. */
	if (found == FLOW_REJECT || is_of_direct_flow(nat, &p->flow))
		conntrack_forget(&p->flow, nat);
	else
		conntrack_end(nat);
	if (found == FLOW_REJECT)
		*verdict = rejection(EVENT_BACKEND_GONE);
	return found != FLOW_REJECT;
}

static __always_inline int translate_error(struct __sk_buff *skb, const struct packet *p)
{
	struct nat *nat = conntrack_lookup(&p->flow);

	if (!nat || nat->flags & NAT_OWN || is_left_to_below(skb, p, nat))
		return PASS;
	if (rewrite_error(skb, p, nat))
		return drop(EVENT_REWRITE);
	if (!(nat->flags & NAT_HOST))
		return PASS;
	return nat->flags & NAT_REPLY ? deliver_error(skb, nat)
				      : send_out(skb, &nat->src, &nat->dst);
}

static __always_inline int handle_ingress(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result parsed;
	int verdict;

	/* A VLAN's packets come again on the VLAN device itself. */
	if (skb->vlan_present || !read_addresses(skb, p))
		return PASS;
	if (p->proto != IPPROTO_TCP && may_be_in_service_cidr(&p->flow.src))
		note_outside_client(skb, p);
	/*
	 * Direct packets to a backend matter where it may have a Service's replies for the client.
	 * Errors about its replies come from any router.
	 */
	if (!address_of_interest(&p->flow.dst) && !flow_of_interest(&p->flow.dst, &p->flow.src) &&
	    !is_icmp(p))
		return PASS;
	if (!is_addressed_to_us(skb))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return handle_without_ports(skb, p, parsed);
	if (flow_of_interest(&p->flow.src, &p->flow.dst) && !is_of_no_flow(skb, p, &verdict))
		return verdict;
	return create_flow(skb, p);
}

static __always_inline int handle_egress(struct __sk_buff *skb, struct packet *p)
{
	bool is_known, is_mine, may_be_own;
	enum parse_result parsed;
	int verdict;

	if (skb->vlan_present || !read_addresses(skb, p))
		return PASS;
	is_known = flow_of_interest(&p->flow.src, &p->flow.dst);
	/* Only this host's own packets can still have a frontend's address here. */
	is_mine = !skb->ingress_ifindex && address_of_interest(&p->flow.dst);
	/* TCP's flags tell replies apart. */
	may_be_own = p->proto != IPPROTO_TCP && address_of_interest(&p->flow.src);
	if (!is_known && !is_mine && !may_be_own && !may_be_in_service_cidr(&p->flow.dst) &&
	    !is_icmp(p))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return is_mine ? handle_without_ports(skb, p, parsed) : drop_unallocated(skb, p);
	if (is_known && !is_of_no_flow(skb, p, &verdict))
		return verdict;
	if (is_mine)
		return create_host_flow(skb, p);
	if (may_be_own)
		note_own(p);
	return drop_unallocated(skb, p);
}

#if !AT_LOOPBACK
int from_device(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_INGRESS);

	return p ? finish(skb, p, handle_ingress(skb, p)) : PASS;
}

int to_device(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_EGRESS);

	return p ? finish(skb, p, handle_egress(skb, p)) : PASS;
}
#endif
