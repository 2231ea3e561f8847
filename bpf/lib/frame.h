/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Frames before the kernel has made a packet buffer of them: reading them, and rewriting them in
 * place. There is nothing to tell whether a checksum is still to be computed, so this is found out.
 */
#ifndef EBPFPROXY_FRAME_H
#define EBPFPROXY_FRAME_H

#include "packet.h"
#include "rewrite.h"

struct ethernet_header {
	u8 dst[6];
	u8 src[6];
	__be16 protocol;
} __attribute__((packed));

static __always_inline void *frame_at(struct xdp_md *ctx, u32 offset)
{
	return (void *)(long)ctx->data + offset;
}

static __always_inline bool reaches_beyond(struct xdp_md *ctx, const void *end)
{
	return end > (void *)(long)ctx->data_end;
}

/*
 * Reads the addresses of a packet without options or extension headers that is no fragment; returns
 * false for all others.
 */
static __always_inline bool frame_read_addresses(struct xdp_md *ctx, struct packet *p)
{
	const struct ethernet_header *ethernet = frame_at(ctx, 0);

	if (reaches_beyond(ctx, ethernet + 1))
		return false;
	p->is_fragment = p->is_later_fragment = false;
	if (ethernet->protocol == bpf_htons(ETH_P_IP)) {
		const struct ipv4_header *ip = frame_at(ctx, L3_OFFSET);

		if (reaches_beyond(ctx, ip + 1) || ip->version_ihl != 0x45 ||
		    ip->fragment & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET))
			return false;
		read_ipv4(p, ip);
		p->l4 = L3_OFFSET + sizeof(*ip);
		return true;
	}
	if (ethernet->protocol == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6_header *ip = frame_at(ctx, L3_OFFSET);

		if (reaches_beyond(ctx, ip + 1) || (ip->version_class_label & 0xf0) != 0x60)
			return false;
		read_ipv6(p, ip);
		return true;
	}
	return false;
}

/* Sums up the pseudo-header of TCP or UDP (RFC 9293, 3.1; RFC 8200, 8.1). */
static __always_inline u64 pseudo_header_sum(const struct packet *p)
{
	const u32 length = p->l3_length - (p->l4 - L3_OFFSET);
	u64 sum = bpf_htonl(length) + (u64)bpf_htonl(p->proto);

	sum += (u64)p->flow.src.word[3] + p->flow.dst.word[3];
	if (p->is_v4)
		return sum;
#pragma clang loop unroll(full)
	for (int i = 0; i < 3; i++)
		sum += (u64)p->flow.src.word[i] + p->flow.dst.word[i];
	return sum;
}

/* Returns the transport checksum in place, NULL where the frame ends before it. */
static __always_inline __sum16 *frame_check(struct xdp_md *ctx, const struct packet *p)
{
	void *l4 = frame_at(ctx, p->is_v4 ? L3_OFFSET + sizeof(struct ipv4_header)
					  : L3_OFFSET + sizeof(struct ipv6_header));

	if (p->proto == IPPROTO_TCP)
		return reaches_beyond(ctx, l4 + sizeof(struct tcp_header)) ? NULL : l4 + TCP_CHECK;
	return reaches_beyond(ctx, l4 + UDP_CHECK + 2) ? NULL : l4 + UDP_CHECK;
}

/*
 * Completes the flow with the ports of TCP and UDP, and reads TCP's fields. Returns false for other
 * protocols, for a packet that is not whole, and for one whose checksum is not computed yet: a
 * virtual device carries it like that (CHECKSUM_PARTIAL: so far the field has the pseudo-header's
 * sum), and only a packet buffer knows. Of other packets one in 65,536 looks the same.
 */
static __always_inline bool frame_read_ports(struct xdp_md *ctx, struct packet *p)
{
	const struct tcp_header *l4 =
		frame_at(ctx, p->is_v4 ? L3_OFFSET + sizeof(struct ipv4_header)
				       : L3_OFFSET + sizeof(struct ipv6_header));
	const u16 header = p->proto == IPPROTO_TCP ? sizeof(struct tcp_header) : 8;
	const __sum16 *check;

	if ((p->proto != IPPROTO_TCP && p->proto != IPPROTO_UDP) ||
	    p->l3_length < p->l4 - L3_OFFSET + header ||
	    L3_OFFSET + p->l3_length > ctx->data_end - ctx->data)
		return false;
	check = frame_check(ctx, p);
	if (!check || *check == (u16)~csum_fold(pseudo_header_sum(p)) ||
	    reaches_beyond(ctx, (void *)l4 + 8))
		return false;
	p->flow.proto = p->proto;
	p->flow.sport = l4->sport;
	p->flow.dport = l4->dport;
	p->tcp_flags = 0;
	if (p->proto == IPPROTO_TCP) {
		if (reaches_beyond(ctx, l4 + 1))
			return false;
		p->end = L3_OFFSET + p->l3_length;
		read_tcp(p, l4);
	}
	return true;
}

/* Says if a frame is addressed to the device that has @link_address. */
static __always_inline bool frame_is_to(struct xdp_md *ctx, const u8 *link_address)
{
	const u16 *dst = frame_at(ctx, 0), *own = (const u16 *)link_address;

	return !reaches_beyond(ctx, dst + 3) &&
	       !((dst[0] ^ own[0]) | (dst[1] ^ own[1]) | (dst[2] ^ own[2]));
}

static __always_inline u64 addr_sum(const struct inet_addr *a)
{
	return (u64)a->word[0] + a->word[1] + a->word[2] + a->word[3];
}

/* Sums up the complement of an address: what is added where the address is taken away. */
static __always_inline u64 addr_inverse_sum(const struct inet_addr *a)
{
	return (u64)~a->word[0] + (u32)~a->word[1] + (u32)~a->word[2] + (u32)~a->word[3];
}

/*
 * Rewrites addresses and ports to those of @nat, and counts a hop, as rewrite() does at tc. Returns
 * false where the frame is too short, before it has changed anything.
 */
static __always_inline bool frame_rewrite(struct xdp_md *ctx, const struct packet *p,
					  const struct nat *nat)
{
	const u32 old_ports = p->flow.sport | (u32)p->flow.dport << 16;
	const u32 new_ports = nat->sport | (u32)nat->dport << 16;
	__sum16 *check = frame_check(ctx, p);
	struct ports *ports;
	u64 difference;

	if (!check)
		return false;
	if (p->is_v4) {
		struct ipv4_header *ip = frame_at(ctx, L3_OFFSET);
		u64 header;

		ports = (struct ports *)(ip + 1);
		if (reaches_beyond(ctx, ports + 1))
			return false;
		/* The other words of the two addresses are the same: they are IPv4-mapped. */
		difference =
			(u64)(u32)~ip->src + (u32)~ip->dst + nat->src.word[3] + nat->dst.word[3];
		header = (u64)(u16)~ip->check + (u16) ~*(u16 *)&ip->ttl;
		ip->src = nat->src.word[3];
		ip->dst = nat->dst.word[3];
		ip->ttl--;
		ip->check = csum_fold(header + *(u16 *)&ip->ttl + difference);
	} else {
		struct ipv6_header *ip = frame_at(ctx, L3_OFFSET);

		ports = (struct ports *)(ip + 1);
		if (reaches_beyond(ctx, ports + 1))
			return false;
		difference = addr_inverse_sum(&p->flow.src) + addr_inverse_sum(&p->flow.dst) +
			     addr_sum(&nat->src) + addr_sum(&nat->dst);
		ip->src = nat->src;
		ip->dst = nat->dst;
		ip->hops--;
	}
	ports->sport = nat->sport;
	ports->dport = nat->dport;
	/* A datagram without a checksum has 0 there, and stays without. */
	if (p->proto == IPPROTO_UDP && !*check)
		return true;
	*check = csum_fold((u64)(u16) ~*check + difference + (u32)~old_ports + new_ports);
	if (p->proto == IPPROTO_UDP && !*check)
		*check = 0xffff;
	return true;
}

#endif
