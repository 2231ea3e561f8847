/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Parsing: from a packet's bytes to its flow. IP headers are read in place; the rest is copied,
 * since it may lie in pages that a program cannot point into.
 *
 * L3_OFFSET is where the IP header begins: 14 on Ethernet, 0 on devices without a link layer.
 */
#ifndef EBPFPROXY_PACKET_H
#define EBPFPROXY_PACKET_H

#include "addr.h"
#include "extensions.h"
#include "fragments.h"
#include "headers.h"
#include "maps.h"

/* These are the results of parsing. */
enum parse_result {
	PARSE_OTHER,		 /* no ports: another protocol, or headers that make no sense */
	PARSE_WHOLE,		 /* ports follow the IP header; perhaps a first fragment */
	PARSE_LATER_FRAG,	 /* a fragment without them */
	PARSE_ICMP_ERROR,	 /* they are in the packet that the error is about, reversed */
	PARSE_TRUNCATED,	 /* not enough bytes: less than a header needs, or than IP's says */
	PARSE_FIRST_FRAG_UNSEEN, /* a fragment whose first was not seen */
};

struct packet {
	struct flow flow;
	u32 fragment_id;
	__be32 new_fragment_id; /* if it is rewritten */
	u32 l3_length;		/* IP header and all that follows it */
	u32 end;		/* where the IP packet ends: a short frame has padding */
	u16 l4;
	u16 fragment_at; /* IPv6's header of a fragment */
	u16 inner_l3;
	u16 inner_l4;
	u32 seq; /* TCP's, and the end of the segment: SYN and FIN count as a byte each */
	u32 seq_end;
	u32 ack;
	u32 l4_word; /* TCP's offset, flags and window, or UDP's length, as they lie there */
	__sum16 l4_check;
	__sum16 ipv4_check;
	u16 ipv4_ttl_proto; /* as they lie there */
	u8 hops;
	u8 proto; /* of the packet itself: flow.proto is that of an ICMP error's inner packet */
	u8 inner_proto;
	u8 tcp_flags; /* of ICMP its type */
	bool is_v4;
	bool is_fragment;
	bool is_later_fragment;
	/* Two IP addresses and TCP's or UDP's header lie side by side; see read_transport(). */
	bool is_plain;
};

/* Says if this is ICMP of the packet's family, as far as its headers have been read. */
static __always_inline bool is_icmp(const struct packet *p)
{
	return p->proto == (p->is_v4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* Returns the IP header in place, NULL where the packet is too short for it. */
static __always_inline void *l3_header(struct __sk_buff *skb, u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + L3_OFFSET + size <= end)
		return data + L3_OFFSET;
	if (bpf_skb_pull_data(skb, L3_OFFSET + size))
		return NULL;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	return data + L3_OFFSET + size <= end ? data + L3_OFFSET : NULL;
}

/* Fills in what packets and frames have in common of an IPv4 header. */
static __always_inline void read_ipv4(struct packet *p, const struct ipv4_header *ip)
{
	p->is_v4 = true;
	p->flow.src = addr_of_v4(ip->src);
	p->flow.dst = addr_of_v4(ip->dst);
	p->proto = ip->proto;
	p->l3_length = bpf_ntohs(ip->length);
	p->hops = ip->ttl;
}

/* Fills in what an IPv6 header says, as if no extension header followed it. */
static __always_inline void read_ipv6(struct packet *p, const struct ipv6_header *ip)
{
	p->is_v4 = false;
	p->flow.src = ip->src;
	p->flow.dst = ip->dst;
	p->proto = ip->next;
	p->hops = ip->hops;
	p->l4 = L3_OFFSET + sizeof(*ip);
	p->l3_length = sizeof(*ip) + bpf_ntohs(ip->length);
}

/* Returns where the IP packet ends in the frame. BIG TCP's header has no length. */
static __always_inline u32 packet_end(const struct __sk_buff *skb, const struct packet *p)
{
	const u32 none = p->is_v4 ? 0 : sizeof(struct ipv6_header);

	return p->l3_length == none ? skb->len : L3_OFFSET + p->l3_length;
}

/*
 * Fills in the addresses and the protocol; returns false where this is no IP packet, or too short
 * for one. IPv6's chain of headers is not walked yet.
 */
static __always_inline bool read_addresses(struct __sk_buff *skb, struct packet *p)
{
	const u32 protocol = skb->protocol;

	if (protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4_header *ip = l3_header(skb, sizeof(*ip));

		if (!ip)
			return false;
		if (ip->version_ihl < 0x45 || ip->version_ihl > 0x4f)
			return false;
		read_ipv4(p, ip);
		p->l4 = L3_OFFSET + (ip->version_ihl & 0xf) * 4;
		p->ipv4_check = ip->check;
		p->ipv4_ttl_proto = *(u16 *)&ip->ttl;
		p->fragment_id = ip->id;
		p->is_fragment = ip->fragment & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET);
		p->is_later_fragment = ip->fragment & IPV4_OFFSET;
		return true;
	}
	if (protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6_header *ip = l3_header(skb, sizeof(*ip));

		if (!ip)
			return false;
		if ((bpf_ntohl(ip->version_class_label) >> 28) != 6)
			return false;
		read_ipv6(p, ip);
		p->fragment_id = 0;
		p->is_fragment = false;
		p->is_later_fragment = false;
		return true;
	}
	return false;
}

/*
 * Walks IPv6's extension headers to the transport header; returns false where they make no sense.
 */
static __always_inline bool skip_extensions(struct __sk_buff *skb, struct packet *p)
{
#pragma clang loop unroll(full)
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		struct ipv6_fragment header;

		if (!is_extension(p->proto))
			return true;
		if (bpf_skb_load_bytes(skb, p->l4, &header, sizeof(header)))
			return false;
		if (p->proto == IPPROTO_FRAGMENT) {
			p->fragment_at = p->l4;
			p->fragment_id = header.id;
			p->is_fragment = header.offset & (IPV6_OFFSET | IPV6_MORE_FRAGMENTS);
			p->is_later_fragment = header.offset & IPV6_OFFSET;
		}
		p->l4 += extension_size(p->proto, &header);
		p->proto = header.next;
		if (p->is_later_fragment)
			return true;
	}
	return false;
}

/*
 * Does the same with the packet that an ICMP error is about. Returns false also for a later
 * fragment, which has no ports.
 */
static __always_inline bool skip_inner_extensions(struct __sk_buff *skb, struct packet *p)
{
#pragma clang loop unroll(full)
	for (int i = 0; i < IPV6_EXTENSIONS; i++) {
		struct ipv6_fragment header;

		if (!is_extension(p->inner_proto))
			return true;
		if (bpf_skb_load_bytes(skb, p->inner_l4, &header, sizeof(header)) ||
		    (p->inner_proto == IPPROTO_FRAGMENT && header.offset & IPV6_OFFSET))
			return false;
		p->inner_l4 += extension_size(p->inner_proto, &header);
		p->inner_proto = header.next;
	}
	return false;
}

/*
 * Reads the ports from an ICMP error. The packet inside is one that we have sent on: the flow is
 * that of its reply direction.
 */
static __always_inline enum parse_result read_icmp(struct __sk_buff *skb, struct packet *p)
{
	struct {
		__be16 sport;
		__be16 dport;
		__be32 rest;
	} inner;
	struct inet_addr src, dst;
	struct icmp_header icmp;

	if (p->is_fragment)
		return PARSE_OTHER;
	if (p->l4 + sizeof(icmp) > p->end || bpf_skb_load_bytes(skb, p->l4, &icmp, sizeof(icmp)))
		return PARSE_TRUNCATED;
	p->tcp_flags = icmp.type;
	p->inner_l3 = p->l4 + sizeof(icmp);
	if (p->is_v4) {
		struct ipv4_header ip;

		if (icmp.type != ICMP_UNREACHABLE && icmp.type != ICMP_SOURCE_QUENCH &&
		    icmp.type != ICMP_REDIRECT && icmp.type != ICMP_TIME_EXCEEDED &&
		    icmp.type != ICMP_PARAMETER)
			return PARSE_OTHER;
		if (bpf_skb_load_bytes(skb, p->inner_l3, &ip, sizeof(ip)))
			return PARSE_TRUNCATED;
		if (ip.version_ihl < 0x45 || ip.version_ihl > 0x4f || (ip.fragment & IPV4_OFFSET))
			return PARSE_OTHER;
		p->inner_l4 = p->inner_l3 + (ip.version_ihl & 0xf) * 4;
		p->inner_proto = ip.proto;
		src = addr_of_v4(ip.src);
		dst = addr_of_v4(ip.dst);
	} else {
		struct ipv6_header ip;

		if (icmp.type < ICMPV6_UNREACHABLE || icmp.type > ICMPV6_PARAMETER)
			return PARSE_OTHER;
		if (bpf_skb_load_bytes(skb, p->inner_l3, &ip, sizeof(ip)))
			return PARSE_TRUNCATED;
		if ((bpf_ntohl(ip.version_class_label) >> 28) != 6)
			return PARSE_OTHER;
		p->inner_l4 = p->inner_l3 + sizeof(ip);
		p->inner_proto = ip.next;
		src = ip.src;
		dst = ip.dst;
		if (!skip_inner_extensions(skb, p))
			return PARSE_OTHER;
	}
	if (!has_ports(p->inner_proto))
		return PARSE_OTHER;
	if (p->inner_l4 + sizeof(inner) > p->end ||
	    bpf_skb_load_bytes(skb, p->inner_l4, &inner, sizeof(inner)))
		return PARSE_TRUNCATED;
	/* Until here the flow is that of the error itself, which others decide about. */
	p->flow.proto = p->inner_proto;
	p->flow.src = dst;
	p->flow.dst = src;
	p->flow.sport = inner.dport;
	p->flow.dport = inner.sport;
	return PARSE_ICMP_ERROR;
}

static __always_inline struct fragment_key fragment_key(const struct packet *p)
{
	return (struct fragment_key) {
		.src = p->flow.src,
		.dst = p->flow.dst,
		.id = p->fragment_id,
		.proto = p->proto,
		.stage = p->flow.stage,
	};
}

/* Says if only the first fragment knows the transport protocol: see find_fragment(). */
static __always_inline bool may_begin_with_extension(const struct packet *p)
{
	return !p->is_v4 && p->is_later_fragment && is_extension(p->proto);
}

/* Completes the flow of a later fragment with what the first one has, its protocol too. */
static __always_inline enum parse_result read_later_fragment(struct packet *p)
{
	struct fragment_key key = fragment_key(p);
	struct fragment *known = find_fragment(&key, p->is_v4);

	if (!known)
		return PARSE_FIRST_FRAG_UNSEEN;
	p->proto = p->flow.proto = key.proto;
	p->flow.sport = known->ports.sport;
	p->flow.dport = known->ports.dport;
	p->new_fragment_id = known->new_id;
	return PARSE_LATER_FRAG;
}

/* Records a segment's numbers. */
static __always_inline void read_tcp(struct packet *p, const struct tcp_header *tcp)
{
	p->tcp_flags = tcp->flags;
	p->seq = bpf_ntohl(tcp->seq);
	p->ack = bpf_ntohl(tcp->ack);
	p->seq_end = p->seq + p->end - p->l4 - (tcp->offset >> 4) * 4 + !!(tcp->flags & TCP_SYN) +
		     !!(tcp->flags & TCP_FIN);
}

/* Reads a header of TCP or UDP, or the first words of another, that lies behind an IP header. */
static __always_inline void read_transport_in_place(struct packet *p, const void *at)
{
	const struct tcp_header *tcp = at;
	const struct udp_header *udp = at;

	if (p->proto == IPPROTO_TCP) {
		read_tcp(p, tcp);
		p->l4_word = *(u32 *)&tcp->offset;
		p->l4_check = tcp->check;
	} else {
		p->l4_word = udp->length;
		p->l4_check = udp->check;
	}
}

static __always_inline u32 transport_header_size(u8 proto)
{
	return proto == IPPROTO_TCP    ? sizeof(struct tcp_header)
	       : proto == IPPROTO_SCTP ? SCTP_CHUNK
				       : sizeof(struct udp_header);
}

/*
 * Reads the ports and TCP's fields; returns false where the packet ends before. Behind an IP header
 * without options they are read in place where they are in the linear part, which is the case for
 * nearly all packets.
 */
static __always_inline bool read_transport(struct __sk_buff *skb, struct packet *p,
					   struct ports *ports)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end, *at = NULL;
	struct tcp_header tcp;
	__be32 eight[2]; /* UDP's or UDP-Lite's header; SCTP's first two words */

	if (p->l4 + transport_header_size(p->proto) > p->end)
		return false;
	/* With options IPv4's header may be as long as IPv6's. */
	if (p->is_v4 && p->l4 == L3_OFFSET + sizeof(struct ipv4_header))
		at = data + L3_OFFSET + sizeof(struct ipv4_header);
	else if (!p->is_v4 && p->l4 == L3_OFFSET + sizeof(struct ipv6_header))
		at = data + L3_OFFSET + sizeof(struct ipv6_header);
	if (at && at + sizeof(tcp) <= end) {
		*ports = *(struct ports *)at;
		read_transport_in_place(p, at);
		p->is_plain = p->proto != IPPROTO_SCTP && !p->is_fragment &&
			      L3_OFFSET + p->l3_length > p->l4;
		return true;
	}
	if (p->proto == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)))
			return false;
		ports->sport = tcp.sport;
		ports->dport = tcp.dport;
		read_tcp(p, &tcp);
		return true;
	}
	if (bpf_skb_load_bytes(skb, p->l4, eight, sizeof(eight)))
		return false;
	__builtin_memcpy(ports, eight, sizeof(*ports));
	return true;
}

/* Completes the flow with its ports. */
static __always_inline enum parse_result read_ports(struct __sk_buff *skb, struct packet *p)
{
	struct ports ports = {};

	/* A packet may have neither, and is reported without. */
	p->flow.sport = p->flow.dport = 0;
	p->flow.proto = p->proto;
	p->tcp_flags = 0;
	p->is_plain = false;
	if (!p->is_v4 && !skip_extensions(skb, p))
		return PARSE_OTHER;
	p->flow.proto = p->proto;
	p->end = packet_end(skb, p);
	if (p->l4 > p->end || p->end > skb->len)
		return PARSE_TRUNCATED;
	if (is_icmp(p))
		return read_icmp(skb, p);
	if (!has_ports(p->proto) && !may_begin_with_extension(p))
		return PARSE_OTHER;
	if (p->is_later_fragment)
		return read_later_fragment(p);
	if (!read_transport(skb, p, &ports))
		return PARSE_TRUNCATED;
	p->flow.sport = ports.sport;
	p->flow.dport = ports.dport;
	if (p->is_fragment) {
		struct fragment_key key = fragment_key(p);
		struct fragment fragment = { ports, next_fragment_id(p->is_v4) };

		p->new_fragment_id = fragment.new_id;
		map_update(fragments, &key, &fragment);
	}
	return PARSE_WHOLE;
}

#endif
