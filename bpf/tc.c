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
#include "lib/decision_packet.h"
#include "lib/device.h"
#include "lib/dsr.h"
#include "lib/early_drop.h"
#include "lib/fast_path.h"
#include "lib/filter.h"
#include "lib/flow.h"
#include "lib/frontend.h"
#include "lib/measure_packet.h"
#include "lib/packet.h"
#include "lib/prefilter.h"
#include "lib/reject.h"
#include "lib/rewrite.h"
#include "lib/route.h"
#include "lib/service_cidr.h"
#include "lib/unserved.h"
#include "lib/verdict.h"

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

static __always_inline int forward_flow(struct __sk_buff *skb, const struct packet *p,
					struct nat *in_map)
{
	const struct nat *nat = &scratch_of(p)->entry;

	if (is_left_to_below(skb, p, nat))
		return PASS;
	conntrack_track(p, in_map, nat, !AT_LOOPBACK);
	return nat->flags & NAT_OWN ? PASS : TRANSLATE;
}

/*
 * Handles a packet that has the entry @in_map, and sets @verdict; returns false where it opens
 * another flow instead: then that entry has been deleted, or marked as ended.
 */
static __always_inline bool handle_known_flow(struct __sk_buff *skb, const struct packet *p,
					      struct nat *in_map, int *verdict)
{
	const struct nat *nat = &scratch_of(p)->entry;
	enum flow_verdict found;

	/* A SYN may begin another connection: what is known of the former one goes to conntrack. */
	if (!AT_LOOPBACK && p->tcp_flags & TCP_SYN)
		flow_cache_take(&p->flow, in_map, &scratch_of(p)->entry);
	found = flow_verdict_of(p, in_map);
	/* Data of SCTP begins no association. */
	if (found == FLOW_FORWARD || (found == FLOW_OVER && !can_open_flow(skb, p))) {
		*verdict = forward_flow(skb, p, in_map);
		return true;
	}
	/*
	 * Nothing may be in the way of a direct flow that begins anew: it keeps its port then. What
	 * kube-proxy begins is also kube-proxy's in the packets after this one. Of a flow that is
	 * over, early drop finds a masquerade by the reply's entry, and the port of one pair not.
	 */
	if (found == FLOW_REJECT || is_of_no_service(nat) || defer_to_kube_proxy(p) ||
	    (found == FLOW_OVER && nat->flags & (NAT_BYPASS | NAT_HOST))) {
		conntrack_forget(&p->flow, in_map, nat);
		scratch_of(p)->has_entry = false;
	} else {
		conntrack_end(in_map, nat);
		if (found == FLOW_OVER) {
			conntrack_delete(&p->flow);
			scratch_of(p)->has_entry = false;
		}
	}
	if (found == FLOW_MOVE)
		decision_flow_left(p, nat);
	if (found == FLOW_REJECT)
		*verdict = rejection(EVENT_BACKEND_GONE);
	return found == FLOW_REJECT;
}

/* Says if a translated packet may have to leave by another device than the kernel has chosen. */
static __always_inline bool needs_route(const struct nat *nat, u32 stage)
{
	return !AT_LOOPBACK && stage == STAGE_EGRESS &&
	       (nat->flags & (NAT_ROUTED | NAT_REPLY | NAT_HOST)) == (NAT_ROUTED | NAT_REPLY);
}

static __always_inline int translate_error(struct __sk_buff *skb, const struct packet *p)
{
	const struct nat *nat = &scratch_of(p)->entry;

	if (!conntrack_read(&p->flow, &scratch_of(p)->entry) || nat->flags & NAT_OWN ||
	    is_left_to_below(skb, p, nat))
		return PASS;
	/*
	 * The client has asked for a frontend, and has no use for a better way to the backend. To
	 * drop this is no event: it is mere advice, mostly of this node's kernel.
	 */
	if (p->tcp_flags == ICMP_REDIRECT)
		return DROP;
	if (rewrite_error(skb, p, nat))
		return drop(EVENT_REWRITE);
	/* With DSR this node's netfilter has seen no packet of the flow: it would be invalid there.
	 */
	if ((DSR_SENDS && is_dsr_original(nat)) ||
	    (nat->flags & (NAT_HOST | NAT_REPLY)) == NAT_HOST)
		return send_out(skb, &nat->src, &nat->dst);
	if (needs_route(nat, p->flow.stage))
		return TRANSLATED;
	return nat->flags & NAT_HOST ? deliver_error(skb, nat) : PASS;
}

/* Every path takes packets of this size (RFC 791). */
#define ALWAYS_FITS 576

/*
 * Returns the size of a packet as it leaves, one of its segments where the kernel has several in
 * it. Those of SCTP have any size, which is 0 here.
 */
static __always_inline u32 size_of(struct __sk_buff *skb, const struct packet *p)
{
	u32 size = skb->gso_size;
	u8 words;

	if (!size)
		return p->l3_length;
	size += p->l4 - L3_OFFSET;
	if (p->proto == IPPROTO_UDP)
		return size + sizeof(struct udp_header);
	if (p->proto != IPPROTO_TCP ||
	    bpf_skb_load_bytes(skb, p->l4 + offsetof(struct tcp_header, offset), &words, 1))
		return 0;
	return size + (words >> 4) * 4;
}

/*
 * Returns the MTU of the route to the backend if a packet of this host exceeds it, else 0. The
 * kernel has looked up the route to the frontend only; nothing after this hook makes fragments, or
 * tells the socket.
 */
static __always_inline u32 exceeded_mtu(struct __sk_buff *skb, const struct packet *p)
{
	const struct nat *nat = &scratch_of(p)->entry;
	struct bpf_fib_lookup fib;
	u32 size;

	if ((nat->flags & (NAT_HOST | NAT_REPLY)) != NAT_HOST)
		return 0;
	size = size_of(skb, p);
	if (size <= ALWAYS_FITS || fib_result_of(skb, ifindex_of(skb), &nat->src, &nat->dst, size,
						 &fib) != FIB_MTU_EXCEEDED)
		return 0;
	return fib.tot_len;
}

/* Translates a packet by its entry, and sends it on. */
static __always_inline int translate(struct __sk_buff *skb, const struct packet *p,
				     const enum stage stage)
{
	const struct nat *nat = &scratch_of(p)->entry;
	const bool forwards = nat->flags & NAT_BYPASS;

	if (forwards && p->hops <= 1)
		return drop(EVENT_HOPS);
	if (rewrite(skb, p, nat, forwards) ||
	    (DSR_SENDS && stage == STAGE_INGRESS && add_due_dsr_option(skb, p, nat)))
		return drop(EVENT_REWRITE);
	/* The original direction of a host's flow needs the route of its new destination. */
	if (forwards || (nat->flags & (NAT_HOST | NAT_REPLY)) == NAT_HOST)
		return send_out(skb, &nat->src, &nat->dst);
	if ((nat->flags & (NAT_HOST | NAT_REPLY)) == (NAT_HOST | NAT_REPLY))
		return deliver(skb, nat);
	return needs_route(nat, stage) ? TRANSLATED : PASS;
}

/*
 * Carries out a verdict. This is the one place where packets are translated, rejected or dropped,
 * since the verifier walks through each copy of what does it.
 */
static __always_inline int carry_out(struct __sk_buff *skb, const struct packet *p, int verdict,
				     const enum stage stage)
{
	u32 mtu = 0;

	if (verdict == TRANSLATE && (mtu = exceeded_mtu(skb, p)))
		verdict = TOO_BIG;
	if (verdict == TRANSLATE) {
		verdict = translate(skb, p, stage);
		if (MEASURE_TRAFFIC || (MEASURE_CONNECTIONS && scratch_of(p)->is_first_reply))
			verdict = measure_translated(skb, p, verdict);
	}
	if (verdict == TRANSLATED) {
		verdict = reroute(skb, p, &scratch_of(p)->entry);
	} else if (verdict >= REJECTION && verdict < DROPPING) {
		if (!mtu)
			decision_failed(p, DECISION_REFUSED, verdict - REJECTION);
		if (mtu || !exceeds_icmp_limit(p))
			return reject(skb, p, verdict - REJECTION, mtu);
		count(EVENT_ICMP_RATE_LIMIT);
		decision_limited(p);
		return DROP;
	}
	if (verdict < DROPPING)
		return verdict;
	count(verdict - DROPPING);
	decision_failed(p, DECISION_DROPPED, verdict - DROPPING);
	return DROP;
}

static __always_inline int finish(struct __sk_buff *skb, struct packet *p, int verdict,
				  const enum stage stage)
{
	const u32 ifindex = ifindex_of(skb);
	volatile int *kept = &scratch_of(p)->verdict;

	if (verdict != PASS) {
		/* The verifier forgets the verdict: it walks through what carries it out once. */
		*kept = verdict;
		if (verdict == NOT_INSERTED)
			*kept = insert_anyway(p);
		if (DSR_ACCEPTS && stage == STAGE_INGRESS && verdict == DSR_RECEIVED)
			*kept = receive_dsr(skb, p);
		/* A tag with a priority alone would be on what is sent on from here. */
		if (!AT_LOOPBACK && skb->vlan_present)
			bpf_skb_vlan_pop(skb);
		verdict = carry_out(skb, p, *kept, stage);
	}
	report_decisions(p, ifindex);
	return verdict;
}

/* Decides about a packet that comes in. */
static __always_inline int handle_ingress(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result parsed;
	struct nat *nat = NULL;
	int verdict;

	if (is_of_vlan(skb, STAGE_INGRESS) || !read_addresses(skb, p))
		return PASS;
	if (p->proto != IPPROTO_TCP && may_be_in_service_cidr(&p->flow.src))
		note_outside_client(skb, p);
	if (!concerns_ingress(&p->flow.src, &p->flow.dst, p->proto) &&
	    !(DSR_ACCEPTS && may_have_dsr_option(p)))
		return PASS;
	if (!is_addressed_to_us(skb))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return handle_without_ports(skb, p, parsed);
	if (DSR_ACCEPTS && concerns_dsr(skb, p))
		return DSR_RECEIVED;
	if (flow_of_interest(&p->flow.src, &p->flow.dst))
		nat = conntrack_of(p);
	if (nat && handle_known_flow(skb, p, nat, &verdict))
		return verdict;
	return create_flow(skb, p);
}

/* Decides about a packet that goes out. */
static __always_inline int handle_egress(struct __sk_buff *skb, struct packet *p)
{
	bool is_known, is_mine, may_be_own, may_clash;
	enum parse_result parsed;
	struct nat *nat;
	int verdict;

	if (is_of_vlan(skb, STAGE_EGRESS) || !read_addresses(skb, p))
		return PASS;
	if (!may_concern_egress(&p->flow.src, &p->flow.dst, p->proto, !skb->ingress_ifindex))
		return PASS;
	is_known = flow_of_interest(&p->flow.src, &p->flow.dst);
	/* Only this host's own packets can still have a frontend's address here. */
	is_mine = !skb->ingress_ifindex && address_of_interest(&p->flow.dst);
	/* TCP's flags tell replies apart. */
	may_be_own = p->proto != IPPROTO_TCP && address_of_interest(&p->flow.src);
	/* Others may masquerade by a port of ours. */
	may_clash = !AT_LOOPBACK && flow_of_interest(&p->flow.dst, &p->flow.src);
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR)
		return translate_error(skb, p);
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return is_mine ? handle_without_ports(skb, p, parsed) : drop_unallocated(skb, p);
	nat = is_known ? conntrack_of(p) : NULL;
	if (nat && handle_known_flow(skb, p, nat, &verdict))
		return verdict;
	if (is_mine)
		return create_host_flow(skb, p);
	if (may_be_own)
		note_own(p);
	if (may_clash && is_masquerade_clash(skb, p))
		return create_direct_flow(skb, p);
	return drop_unallocated(skb, p);
}

#if !AT_LOOPBACK
/* Attached to nothing: see lib/in_place.h. */
int write_packet(struct __sk_buff *skb)
{
	if (write_in_place(skb))
		return PASS;
	count(EVENT_REWRITE);
	return DROP;
}

int from_device(struct __sk_buff *skb)
{
	int verdict = PASS;
	struct packet *p;

	if (!may_concern_us(skb, STAGE_INGRESS) || try_fast_path(skb, STAGE_INGRESS, &verdict))
		return verdict;
	p = packet_of(STAGE_INGRESS);
	return p ? finish(skb, p, handle_ingress(skb, p), STAGE_INGRESS) : PASS;
}

int to_device(struct __sk_buff *skb)
{
	int verdict = PASS;
	struct packet *p;

	if (!may_concern_us(skb, STAGE_EGRESS) || try_fast_path(skb, STAGE_EGRESS, &verdict))
		return verdict;
	p = packet_of(STAGE_EGRESS);
	return p ? finish(skb, p, handle_egress(skb, p), STAGE_EGRESS) : PASS;
}
#endif
