/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * NodePorts for sockets that only the loopback device serves (BPF_PROG_TYPE_SCHED_CLS, at its
 * egress): those that are bound to it or to its addresses, and those that no socket hook saw.
 *
 * What leaves by this device comes in by it, so one program sees both directions. A packet to a
 * backend elsewhere leaves from here by that one's own route, and its answer is put back here: see
 * send_to_self().
 */
#define AT_LOOPBACK 1
#include "tc.c"

/*
 * A packet of this host to itself: the client's to a NodePort, or a backend's answer. The answer
 * has come in where it leaves, and is looked for at that stage.
 */
static __always_inline int handle_loopback(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result parsed;
	bool is_asked;
	int verdict;

	/* What came by another device was put back there already. */
	if (skb->ingress_ifindex || !read_addresses(skb, p))
		return PASS;
	parsed = read_ports(skb, p);
	if (parsed == PARSE_ICMP_ERROR) {
		if (!conntrack_lookup(&p->flow))
			p->flow.stage = STAGE_INGRESS;
		return translate_error(skb, p);
	}
	if (parsed != PARSE_WHOLE && parsed != PARSE_LATER_FRAG)
		return PASS;
	if (loopback_flow_of_interest(&p->flow) && !opens_flow(skb, p, &verdict))
		return verdict;
	is_asked = port_of_interest(p->flow.dport);
	/* Answers come to a port that stands for the client, or to this host's own. */
	if ((is_asked || is_masquerade_port(p->flow.dport)) &&
	    flow_of_interest(&p->flow.src, &p->flow.dst)) {
		p->flow.stage = STAGE_INGRESS;
		if (!opens_flow(skb, p, &verdict))
			return verdict;
		p->flow.stage = STAGE_EGRESS;
	}
	if (p->proto != IPPROTO_TCP)
		note_own(p);
	if (!is_asked || !can_open_flow(skb, p))
		return PASS;
	return create_host_flow(skb, p);
}

int to_loopback(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_EGRESS);

	return p ? finish(skb, p, handle_loopback(skb, p)) : PASS;
}
