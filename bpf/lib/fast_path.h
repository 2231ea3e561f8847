/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The fast path: a packet of TCP or UDP of an established flow, with nothing unusual about either.
 * Most packets of Services are such. What the rest of tc.c does for one of them comes to this: two
 * helpers are called, one that looks the flow up and one that writes, since calls take longer than
 * all else. Any other packet is left as it is, and so is one in a second of each flow, for what is
 * done that often: see conntrack_track().
 */
#ifndef EBPFPROXY_FAST_PATH_H
#define EBPFPROXY_FAST_PATH_H

#include "conntrack.h"
#include "device.h"
#include "filter.h"
#include "options.h"
#include "rewrite.h"
#include "stale.h"

/*
 * Reads a whole packet without options or extension headers that neither opens nor ends a
 * connection; returns false for all others.
 */
static __always_inline bool read_plain(struct __sk_buff *skb, struct packet *p, const bool is_v4)
{
	const u32 l3_size = is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header);
	void *l3 = (void *)(long)skb->data + L3_OFFSET, *end = (void *)(long)skb->data_end;
	const struct ipv4_header *ip = l3;
	const struct ipv6_header *ip6 = l3;
	const struct tcp_header *tcp = l3 + l3_size;

	if ((void *)(tcp + 1) > end)
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
	p->flow.sport = tcp->sport;
	p->flow.dport = tcp->dport;
	p->flow.proto = p->proto;
	if (p->l4 + transport_header_size(p->proto) > p->end || p->end > skb->len)
		return false;
	p->tcp_flags = 0;
	read_transport_in_place(p, tcp);
	return p->proto == IPPROTO_UDP ||
	       (p->proto == IPPROTO_TCP && !(p->tcp_flags & (TCP_SYN | TCP_FIN | TCP_RST)));
}

/*
 * Says if packets of a flow are translated, and no more: it is not of this host itself, nor
 * forwarded from the hook; a reply has been seen; and nothing has left its Service.
 */
static __always_inline bool is_established(struct scratch *s, const struct flow *flow,
					   const struct nat *nat)
{
	if (nat->flags & (NAT_HOST | NAT_BYPASS | NAT_OWN) ||
	    (s64)(coarse_now(s) - nat->last) > (s64)NSEC_PER_SEC ||
	    (nat->flags & NAT_REPLY && !(nat->seen & SEEN_REPLY)))
		return false;
	if (nat->flags & NAT_SOURCE)
		return !is_of_direct_flow(nat, flow);
	return nat->flags & NAT_REPLY || nat->epoch == (u16)epoch_of(nat->service_id);
}

/* Translates a packet, and sets @verdict; returns false for a packet that is not for this path. */
static __always_inline bool translate_plain(struct __sk_buff *skb, const enum stage stage,
					    const bool is_v4, int *verdict)
{
	struct packet packet, *p = &packet;
	struct scratch *s = scratch();
	struct nat *in_map;

	if (!s || !read_plain(skb, p, is_v4) || !flow_of_interest(&p->flow.src, &p->flow.dst) ||
	    (stage == STAGE_INGRESS && !is_addressed_to_us(skb)))
		return false;
	p->flow.stage = stage;
	p->flow.pad = 0;
	/* Helpers get a copy: the compiler keeps in registers what nobody else can see. */
	s->key = p->flow;
	in_map = conntrack_read(&s->key, &s->entry);
	if (!in_map || !is_established(s, &s->key, &s->entry) || !is_still(in_map, &s->entry))
		return false;
	if (p->tcp_flags)
		note_sequence(p, in_map, &s->entry);
	*verdict = PASS;
	if (is_v4 ? rewrite4(skb, p, &s->entry, false) : rewrite6(skb, p, &s->entry, false)) {
		count(EVENT_REWRITE);
		*verdict = DROP;
	}
	return true;
}

static __always_inline bool takes_fast_path(struct __sk_buff *skb, const enum stage stage,
					    int *verdict)
{
	const u32 protocol = skb->protocol;

	/* What the hook forwards would be looked up twice. */
	if (MEASURE_TRAFFIC || is_of_vlan(skb, stage) ||
	    (BYPASS_NETFILTER && stage == STAGE_INGRESS))
		return false;
	if (protocol == bpf_htons(ETH_P_IP))
		return translate_plain(skb, stage, true, verdict);
	return protocol == bpf_htons(ETH_P_IPV6) && translate_plain(skb, stage, false, verdict);
}

#endif
