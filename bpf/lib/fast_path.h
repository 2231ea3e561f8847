/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path: a packet of TCP or UDP of an established flow, with nothing unusual about either.
 * Most packets of Services are such. What the rest of tc.c does for one of them comes to a look-up
 * and a write, which are two helpers, and take longer than all else. A flow with many packets is in
 * the flow cache, which is read without a helper, and its packets are written to in place. Any
 * other packet is left as it is, and so is one in a second of each flow, for what is done that
 * often: see conntrack_track().
 */
#ifndef EBPFPROXY_FAST_PATH_H
#define EBPFPROXY_FAST_PATH_H

#include "conntrack.h"
#include "device.h"
#include "filter.h"
#include "in_place.h"
#include "options.h"
#include "rewrite.h"
#include "stale.h"

/* Reads a whole packet without options or extension headers; returns false for all others. */
static __always_inline bool read_plain(struct __sk_buff *skb, struct packet *p, const bool is_v4,
				       const enum stage stage)
{
	word *key = (word *)&p->flow;
	const u32 l3_size = is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);
	void *l3 = (void *)(long)skb->data + L3_OFFSET, *end = (void *)(long)skb->data_end;
	const struct ipv4_header *ip = l3;
	const struct ipv6_header *ip6 = l3;
	const struct tcp_header *tcp = l3 + l3_size;

	/* What a SYN needs is not here, and nothing of it is read twice then. */
	if ((void *)(tcp + 1) > end ||
	    ((is_v4 ? ip->proto : ip6->next) == IPPROTO_TCP && tcp->flags & TCP_SYN))
		return false;
	if (is_v4) {
		if (ip->version_ihl != 0x45 || ip->fragment & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET))
			return false;
		read_ipv4(p, ip);
		p->ipv4_check = ip->check;
		p->ipv4_ttl_proto = *(u16 *)&ip->ttl;
	} else {
		if ((bpf_ntohl(ip6->version_class_label) >> 28) != 6)
			return false;
		read_ipv6(p, ip6);
	}
	p->l4 = L3_OFFSET + l3_size;
	p->end = L3_OFFSET + p->l3_length;
	p->is_plain = true;
	p->is_fragment = p->is_later_fragment = false;
	/*
	 * A processor waits for what was stored in parts when it is read as a whole, as by all that
	 * looks for the flow.
	 */
	if (is_v4) {
		key[0] = key[2] = 0;
		key[1] = two_words(bpf_htonl(0xffff), ip->src);
		key[3] = two_words(bpf_htonl(0xffff), ip->dst);
	}
	key[4] = two_words(*(u32 *)tcp, bpf_htonl(p->proto << 24 | stage << 16));
	if (p->l4 + transport_header_size(p->proto) > p->end || p->end > skb->len)
		return false;
	p->tcp_flags = 0;
	read_transport_in_place(p, tcp);
	return p->proto == IPPROTO_UDP || p->proto == IPPROTO_TCP;
}

/*
 * Says if packets of a flow are translated, and no more: it is not of this host itself, nor
 * forwarded from the hook, nor by another route; a reply has been seen; and nothing has left its
 * Service.
 */
static __always_inline bool is_established(struct scratch *s, const struct flow *flow,
					   const struct nat *nat)
{
	if (nat->flags & (NAT_HOST | NAT_BYPASS | NAT_OWN) ||
	    (s64)(coarse_now(s) - nat->last) > (s64)NSEC_PER_SEC ||
	    (nat->flags & NAT_REPLY && (!(nat->seen & SEEN_REPLY) || nat->flags & NAT_ROUTED)) ||
	    !has_its_backend(nat))
		return false;
	return !(nat->flags & NAT_SOURCE) || !is_of_direct_flow(nat, flow);
}

/* Finds the entry of a packet in conntrack, and leaves it in @s->entry. */
static __always_inline bool find_established(struct scratch *s)
{
	const struct packet *p = &s->packet;
	struct nat *nat = &s->entry, *in_map;
	struct flow_slot *slot;
	bool is_usual;

	in_map = conntrack_read(&p->flow, nat);
	if (!in_map || !is_same_entry(in_map, nat))
		return false;
	is_usual = is_established(s, &p->flow, nat);
	if (!is_usual || p->tcp_flags & (TCP_FIN | TCP_RST)) {
		flow_cache_take(&p->flow, in_map, nat);
		if (is_usual && conntrack_track_end(p, in_map, nat, true) &&
		    !(p->tcp_flags & TCP_RST))
			note_sequence(p, in_map, nat);
		return is_usual;
	}
	slot = flow_cache_renew(&p->flow, in_map, nat, coarse_now(s));
	if (p->tcp_flags)
		note_sequence(p, slot ? &slot->nat : in_map, nat);
	return true;
}

/* Finds it in the flow cache. */
static __always_inline bool find_cached_entry(struct scratch *s)
{
	const struct packet *p = &s->packet;
	const struct nat *nat = &s->entry;
	struct flow_slot *slot = flow_cache_read(&p->flow, &s->entry, coarse_now(s));

	if (!slot || (s64)(coarse_now(s) - nat->last) > 0 || nat->flags & NAT_BYPASS ||
	    p->tcp_flags & (TCP_FIN | TCP_RST) || !has_its_backend(nat))
		return false;
	if (p->tcp_flags)
		note_sequence(p, &slot->nat, nat);
	return true;
}

/* Translates a packet, and sets @verdict; returns false for one that is not for this path. */
static __always_inline bool try_fast_path(struct __sk_buff *skb, const enum stage stage,
					  int *verdict)
{
	const u32 protocol = skb->protocol;
	bool is_plain;
	struct scratch *s;
	struct packet *p;

	/* What the hook forwards would be looked up twice. */
	if (MEASURE_TRAFFIC || is_of_vlan(skb, stage) ||
	    (BYPASS_NETFILTER && stage == STAGE_INGRESS))
		return false;
	s = scratch();
	if (!s)
		return false;
	p = &s->packet;
	if (protocol == bpf_htons(ETH_P_IP))
		is_plain = read_plain(skb, p, true, stage);
	else
		is_plain = protocol == bpf_htons(ETH_P_IPV6) && read_plain(skb, p, false, stage);
	if (!is_plain || !flow_of_interest(&p->flow.src, &p->flow.dst) ||
	    (stage == STAGE_INGRESS && !is_addressed_to_us(skb)))
		return false;
	/* The verifier knows nothing of the packet from here on. */
	asm volatile("" ::: "memory");
	if (find_cached_entry(s)) {
		/* For flows with few packets the writer would not be in the CPU's caches. */
		if (may_write_in_place(p))
			tail_call(skb, MAP(writers), 0);
	} else if (!find_established(s)) {
		return false;
	}
	*verdict = PASS;
	if (rewrite(skb, p, &s->entry, false)) {
		count(EVENT_REWRITE);
		*verdict = DROP;
	}
	return true;
}

#endif
