/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * NodePorts for sockets that only the loopback device serves (BPF_PROG_TYPE_SCHED_CLS, at its
 * egress): those that are bound to it or to its addresses, and those that no socket hook saw.
 *
 * Packets that leave by this device come in by it, so one program sees both directions. A packet to
 * a backend elsewhere leaves from here by the backend's route, and its reply is put back here: see
 * send_to_self().
 */
#define AT_LOOPBACK 1
#include "tc.c"

/*
 * Handles a packet of this host to itself: a client's to a NodePort, or a backend's reply. A reply
 * comes in where it leaves, and is looked up with the ingress stage.
 */
static __always_inline int handle_loopback(struct __sk_buff *skb, struct packet *p)
{
	enum parse_result parsed;
	struct nat *nat = NULL;
	bool is_asked;
	int verdict;

	/* The program of another device has put this packet here already. */
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
	if (loopback_flow_of_interest(&p->flow))
		nat = conntrack_of(p);
	is_asked = port_of_interest(p->flow.dport);
	/* Replies go to a port that stands for the client, or to this host's own. */
	if (!nat && (is_asked || is_masquerade_port(p->flow.dport)) &&
	    flow_of_interest(&p->flow.src, &p->flow.dst)) {
		p->flow.stage = STAGE_INGRESS;
		nat = conntrack_read(&p->flow, &scratch_of(p)->entry);
	}
	if (nat && handle_known_flow(skb, p, nat, &verdict))
		return verdict;
	p->flow.stage = STAGE_EGRESS;
	if (p->proto != IPPROTO_TCP)
		note_own(p);
	if (!is_asked || !can_open_flow(skb, p))
		return PASS;
	return create_host_flow(skb, p);
}

int to_loopback(struct __sk_buff *skb)
{
	struct packet *p = packet_of(STAGE_EGRESS);

	return p ? finish(skb, p, handle_loopback(skb, p), STAGE_EGRESS) : PASS;
}
