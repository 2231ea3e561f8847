/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rewriting addresses and ports, and every checksum that covers them.
 *
 * All changes are incremental (RFC 1624), so a damaged packet stays damaged, and a packet whose
 * checksum the device computes later (CHECKSUM_PARTIAL: only the pseudo-header is summed up yet)
 * stays right: BPF_F_PSEUDO_HDR tells the helper to allow for that.
 *
 * Calls of helpers take most of the time. Where the checksum is finished, addresses, ports and
 * checksum are written by one.
 */
#ifndef EBPFPROXY_REWRITE_H
#define EBPFPROXY_REWRITE_H

#include "branchless.h"
#include "packet.h"

#define IPV4_ID	    offsetof(struct ipv4_header, id)
#define IPV4_CHECK  offsetof(struct ipv4_header, check)
#define IPV4_SRC    offsetof(struct ipv4_header, src)
#define IPV4_TTL    offsetof(struct ipv4_header, ttl)
#define IPV6_SRC    offsetof(struct ipv6_header, src)
#define IPV6_LENGTH offsetof(struct ipv6_header, length)
#define IPV6_ID	    offsetof(struct ipv6_fragment, id)
#define TCP_CHECK   offsetof(struct tcp_header, check)
#define UDP_CHECK   offsetof(struct udp_header, check)
#define SCTP_CHECK  8
#define ICMP_CHECK  offsetof(struct icmp_header, check)

/* The tables give how a CRC32c changes when 2^k bytes of zeros follow: four tables for each k. */
#define CRC_STEPS 17

static __always_inline u32 crc32c_zeros(u32 crc, u32 length)
{
	const u32 *table = map_value(crc32c);

#pragma clang loop unroll(disable)
	for (u32 k = 0; k < CRC_STEPS; k++) {
		const u32 *step = table + k * 1024;
		u64 is_set = length >> k & 1;
		u32 moved = step[crc & 0xff] ^ step[256 + (crc >> 8 & 0xff)] ^
			    step[512 + (crc >> 16 & 0xff)] ^ step[768 + (crc >> 24)];

		/* With a branch the verifier would walk all 2^17 paths. */
		barrier_var(is_set);
		crc = select(is_set, moved, crc);
	}
	return crc;
}

/*
 * Updates SCTP's CRC32c (RFC 9260, appendix A), which covers the ports but no address. It is
 * linear: the new one differs from the old by the CRC of the difference followed by as many zeros
 * as the packet has bytes. A checksum of 0 is not computed yet: the device, or the last hop on this
 * host, does that.
 */
static __always_inline int replace_sctp_check(struct __sk_buff *skb, const struct packet *p,
					      u32 difference)
{
	u32 check;

	if (bpf_skb_load_bytes(skb, p->l4 + SCTP_CHECK, &check, sizeof(check)))
		return -1;
	if (!check)
		return 0;
	check ^= crc32c_zeros(difference, p->end - p->l4);
	return bpf_skb_store_bytes(skb, p->l4 + SCTP_CHECK, &check, sizeof(check), 0);
}

/* @sum is below 2^48, as that of few words is. */
static __always_inline u16 csum_fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/*
 * Says if the checksum at @offset, which bpf_l4_csum_replace() has just changed by @difference, is
 * left to the device (CHECKSUM_PARTIAL): the helper adds to a sum, and subtracts from a finished
 * checksum. Most packets of this host's own sockets and pods are such.
 */
static __always_inline bool is_check_partial(struct __sk_buff *skb, const struct packet *p,
					     u32 offset, u32 difference)
{
	const void *end = (void *)(long)skb->data_end;
	/* So near are the headers of a plain packet; the verifier knows a bound by it. */
	const __sum16 *check = (void *)(long)skb->data + (offset & 127);

	return p->is_plain && (void *)(check + 1) <= end && *check != p->l4_check &&
	       *check == (u16)~csum_fold((u64)p->l4_check + difference);
}

/* Updates the transport checksum where the ports have been rewritten already. */
static __always_inline int replace_transport_check(struct __sk_buff *skb, const struct packet *p,
						   u32 old_ports, u32 new_ports,
						   u32 addr_difference)
{
	u32 offset, flags = 0;

	if (p->proto == IPPROTO_SCTP)
		/* A fragment lacks part of the packet, and the CRC covers all of it. */
		return old_ports == new_ports ? 0
		       : p->is_fragment	      ? -1
					      : replace_sctp_check(skb, p, old_ports ^ new_ports);
	if (p->proto == IPPROTO_TCP) {
		offset = p->l4 + TCP_CHECK;
	} else {
		offset = p->l4 + UDP_CHECK;
		flags = BPF_F_MARK_MANGLED_0; /* 0 is "none" and stays */
	}
	if (bpf_l4_csum_replace(skb, offset, 0, addr_difference, flags | BPF_F_PSEUDO_HDR))
		return -1;
	/* The sum of a pseudo-header has no ports. */
	if (old_ports == new_ports || is_check_partial(skb, p, offset, addr_difference))
		return 0;
	return bpf_l4_csum_replace(skb, offset, old_ports, new_ports, flags | sizeof(new_ports));
}

/*
 * Says if the transport checksum is finished, of a packet that is plain. For CHECKSUM_PARTIAL its
 * field has the sum of the pseudo-header (RFC 9293, 3.1), of which @sum is that of the addresses. A
 * finished one may have the same value by chance; then it takes the slow path.
 */
static __always_inline bool is_check_finished(const struct packet *p, u64 sum)
{
	const u16 length = p->l3_length - (p->l4 - L3_OFFSET);

	return csum_fold(sum + bpf_htons(p->proto) + bpf_htons(length) + (u16)~p->l4_check);
}

/* Writes the transport header up to its checksum; returns the number of words of 16 bits. */
static __always_inline u32 transport_of(const struct packet *p, const struct nat *nat,
					u64 difference, u16 *to)
{
	const u32 old_ports = p->flow.sport | (u32)p->flow.dport << 16;
	const u32 new_ports = nat->sport | (u32)nat->dport << 16;
	const u32 seq = bpf_htonl(p->seq), ack = bpf_htonl(p->ack);
	const u16 check = csum_fold((u16)~p->l4_check + difference + (u32)~old_ports + new_ports);

	to[0] = (u16)new_ports;
	to[1] = new_ports >> 16;
	if (p->proto != IPPROTO_TCP) {
		to[2] = (u16)p->l4_word;
		/* 0 is "none" and stays. */
		to[3] = !p->l4_check ? 0 : check ? check : 0xffff;
		return 4;
	}
	to[2] = (u16)seq;
	to[3] = seq >> 16;
	to[4] = (u16)ack;
	to[5] = ack >> 16;
	to[6] = (u16)p->l4_word;
	to[7] = p->l4_word >> 16;
	to[8] = check;
	return 9;
}

/*
 * Rewrites IPv4's header from the TTL on and, where no options follow, the ports in one store; with
 * a finished checksum that as well. BPF_F_RECOMPUTE_CSUM adds up what changes for
 * CHECKSUM_COMPLETE.
 */
static __always_inline int rewrite4(struct __sk_buff *skb, const struct packet *p,
				    const struct nat *nat, bool forwards)
{
	const u32 old_ports = p->flow.sport | (u32)p->flow.dport << 16;
	const u32 new_ports = nat->sport | (u32)nat->dport << 16;
	const u32 src = nat->src.word[3], dst = nat->dst.word[3];
	u64 header = (u64)(u16)~p->ipv4_check + (u16)~p->ipv4_ttl_proto;
	u64 difference = (u64)(u32)~p->flow.src.word[3] + (u32)~p->flow.dst.word[3] + src + dst;
	struct {
		u16 ttl_proto;
		__sum16 check;
		u16 addr[4];
		u16 transport[9];
	} new = { .ttl_proto = p->ipv4_ttl_proto };
	const u32 with_addr = offsetof(typeof(new), transport);

	if (p->is_fragment) {
		u16 id = p->new_fragment_id;

		if (bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_ID, &id, sizeof(id), 0))
			return -1;
		header += (u16)~p->fragment_id + id;
	}
	if (forwards)
		((u8 *)&new.ttl_proto)[0]--;
	new.check = csum_fold(header + new.ttl_proto + difference);
	new.addr[0] = (u16)src;
	new.addr[1] = src >> 16;
	new.addr[2] = (u16)dst;
	new.addr[3] = dst >> 16;
	if (p->is_plain && is_check_finished(p, (u64)p->flow.src.word[3] + p->flow.dst.word[3])) {
		u32 words = transport_of(p, nat, difference, new.transport);

		return bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_TTL, &new, with_addr + 2 * words,
					   BPF_F_RECOMPUTE_CSUM);
	}
	new.transport[0] = (u16)new_ports;
	new.transport[1] = new_ports >> 16;
	if (p->is_later_fragment)
		return bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_TTL, &new, with_addr, 0);
	if (p->l4 == L3_OFFSET + sizeof(struct ipv4_header)) {
		if (bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_TTL, &new, with_addr + 4, 0))
			return -1;
	} else if (bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_TTL, &new, with_addr, 0) ||
		   bpf_skb_store_bytes(skb, p->l4, (void *)&new_ports, sizeof(new_ports), 0)) {
		return -1;
	}
	difference = (difference & 0xffffffff) + (difference >> 32);
	difference = (difference & 0xffffffff) + (difference >> 32);
	return replace_transport_check(skb, p, old_ports, new_ports, difference);
}

static __always_inline int count_hop6(struct __sk_buff *skb)
{
	u8 four[4]; /* length, next header, hops: in pairs, for the sum of the whole */

	if (bpf_skb_load_bytes(skb, L3_OFFSET + IPV6_LENGTH, four, sizeof(four)))
		return -1;
	four[3]--;
	return bpf_skb_store_bytes(skb, L3_OFFSET + IPV6_LENGTH, four, sizeof(four),
				   BPF_F_RECOMPUTE_CSUM);
}

/* Rewrites a plain packet with a finished checksum, @difference being that of the addresses. */
static __always_inline int rewrite_plain6(struct __sk_buff *skb, const struct packet *p,
					  const struct nat *nat, bool forwards, u64 difference)
{
	struct {
		__be16 length;
		u8 next;
		u8 hops;
		struct inet_addr src;
		struct inet_addr dst;
		u16 transport[9];
	} new = {
		.length = bpf_htons(p->l3_length - sizeof(struct ipv6_header)),
		.next = p->proto,
		.hops = p->hops - forwards,
		.src = nat->src,
		.dst = nat->dst,
	};
	u32 words = transport_of(p, nat, difference, new.transport);

	return bpf_skb_store_bytes(skb, L3_OFFSET + IPV6_LENGTH, &new,
				   offsetof(typeof(new), transport) + 2 * words,
				   BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int rewrite6(struct __sk_buff *skb, const struct packet *p,
				    const struct nat *nat, bool forwards)
{
	const u32 old_ports = p->flow.sport | (u32)p->flow.dport << 16;
	const u32 new_ports = nat->sport | (u32)nat->dport << 16;
	const u32 size = 2 * sizeof(struct inet_addr);
	const u32 *old = p->flow.src.word, *new = nat->src.word;
	u64 sum = 0, difference = 0;

#pragma clang loop unroll(full)
	for (u32 i = 0; i < size / sizeof(*old); i++) {
		sum += old[i];
		difference += (u64)(u32)~old[i] + new[i];
	}
	if (p->is_plain && is_check_finished(p, sum))
		return rewrite_plain6(skb, p, nat, forwards, difference);
	difference = (difference & 0xffffffff) + (difference >> 32);
	difference = (difference & 0xffffffff) + (difference >> 32);
	if (forwards && count_hop6(skb))
		return -1;
	if (p->is_fragment &&
	    bpf_skb_store_bytes(skb, p->fragment_at + IPV6_ID, (void *)&p->new_fragment_id,
				sizeof(p->new_fragment_id), BPF_F_RECOMPUTE_CSUM))
		return -1;
	/* IPv6 has no header checksum that would compensate in skb->csum (CHECKSUM_COMPLETE). */
	if (bpf_skb_store_bytes(skb, L3_OFFSET + IPV6_SRC, (void *)&nat->src, size,
				BPF_F_RECOMPUTE_CSUM))
		return -1;
	if (p->is_later_fragment)
		return 0;
	if (old_ports != new_ports &&
	    bpf_skb_store_bytes(skb, p->l4, (void *)&new_ports, sizeof(new_ports), 0))
		return -1;
	return replace_transport_check(skb, p, old_ports, new_ports, difference);
}

/*
 * Rewrites the packet's addresses, and its ports where it has them, to those of @nat. With
 * @forwards the hop is counted here, since the kernel does not.
 */
static __always_inline int rewrite(struct __sk_buff *skb, const struct packet *p,
				   const struct nat *nat, bool forwards)
{
	return p->is_v4 ? rewrite4(skb, p, nat, forwards) : rewrite6(skb, p, nat, forwards);
}

/* Updates a checksum inside an ICMP error's payload; the sum of all changes goes into @total. */
static __always_inline int replace_inner_check(struct __sk_buff *skb, const struct packet *p,
					       u32 offset, u32 difference, u32 *total,
					       bool zero_is_none)
{
	u16 old, new;

	if (offset + sizeof(old) > p->end || bpf_skb_load_bytes(skb, offset, &old, sizeof(old)))
		return 0; /* routers may quote less */
	if (!old && zero_is_none)
		return 0;
	new = csum_fold((u64)(u16)~old + difference);
	*total = csum_fold((u64)*total + (u16)~old + new) ^ 0xffff;
	return bpf_skb_store_bytes(skb, offset, &new, sizeof(new), 0);
}

/*
 * Rewrites an ICMP error about a packet of a flow. Inside, that packet gets the addresses and ports
 * that it had when its sender sent it. Outside, an address that the flow translates is translated;
 * a router's is not.
 */
static __always_inline int rewrite_error(struct __sk_buff *skb, const struct packet *p,
					 const struct nat *nat)
{
	__be32 ports[2] = { p->flow.dport | (u32)p->flow.sport << 16,
			    nat->dport | (u32)nat->sport << 16 };
	struct inet_addr src, dst, new_src, new_dst;
	u32 inner, outer, total;

	if (p->is_v4) {
		__be32 outside[2], was[2] = { p->flow.dst.word[3], p->flow.src.word[3] };
		__be32 becomes[2] = { nat->dst.word[3], nat->src.word[3] }, new[2];

		if (bpf_skb_load_bytes(skb, L3_OFFSET + IPV4_SRC, outside, sizeof(outside)))
			return -1;
		new[0] = outside[0] == was[1] ? becomes[1] : outside[0];
		new[1] = outside[1] == was[0] ? becomes[0] : outside[1];
		outer = bpf_csum_diff(outside, sizeof(outside), new, sizeof(new), 0);
		inner = bpf_csum_diff(was, sizeof(was), becomes, sizeof(becomes), 0);
		total = inner;
		if (bpf_l3_csum_replace(skb, L3_OFFSET + IPV4_CHECK, 0, outer, 0) ||
		    bpf_skb_store_bytes(skb, L3_OFFSET + IPV4_SRC, new, sizeof(new), 0) ||
		    bpf_skb_store_bytes(skb, p->inner_l3 + IPV4_SRC, becomes, sizeof(becomes), 0) ||
		    replace_inner_check(skb, p, p->inner_l3 + IPV4_CHECK, inner, &total, false))
			return -1;
	} else {
		const u32 size = sizeof(struct inet_addr);

		if (bpf_skb_load_bytes(skb, L3_OFFSET + IPV6_SRC, &src, size) ||
		    bpf_skb_load_bytes(skb, L3_OFFSET + IPV6_SRC + size, &dst, size))
			return -1;
		new_src = addr_equal(&src, &p->flow.src) ? nat->src : src;
		new_dst = addr_equal(&dst, &p->flow.dst) ? nat->dst : dst;
		outer = bpf_csum_diff(&src, size, &new_src, size, 0);
		outer = bpf_csum_diff(&dst, size, &new_dst, size, outer);
		inner = bpf_csum_diff((void *)&p->flow.dst, size, (void *)&nat->dst, size, 0);
		inner = bpf_csum_diff((void *)&p->flow.src, size, (void *)&nat->src, size, inner);
		total = inner;
		if (bpf_skb_store_bytes(skb, L3_OFFSET + IPV6_SRC, &new_src, size,
					BPF_F_RECOMPUTE_CSUM) ||
		    bpf_skb_store_bytes(skb, L3_OFFSET + IPV6_SRC + size, &new_dst, size,
					BPF_F_RECOMPUTE_CSUM) ||
		    bpf_skb_store_bytes(skb, p->inner_l3 + IPV6_SRC, (void *)&nat->dst, size, 0) ||
		    bpf_skb_store_bytes(skb, p->inner_l3 + IPV6_SRC + size, (void *)&nat->src, size,
					0))
			return -1;
	}
	{
		u32 moved = bpf_csum_diff(&ports[0], 4, &ports[1], 4, 0);

		total = csum_fold((u64)total + moved) ^ 0xffff;
		inner = csum_fold((u64)inner + moved) ^ 0xffff;
	}
	if (bpf_skb_store_bytes(skb, p->inner_l4, &ports[1], 4, 0))
		return -1;
	if (p->flow.proto == IPPROTO_TCP) {
		if (replace_inner_check(skb, p, p->inner_l4 + TCP_CHECK, inner, &total, false))
			return -1;
	} else if (p->flow.proto != IPPROTO_SCTP) {
		if (replace_inner_check(skb, p, p->inner_l4 + UDP_CHECK, inner, &total, true))
			return -1;
	}
	if (bpf_l4_csum_replace(skb, p->l4 + ICMP_CHECK, 0, total, 0))
		return -1;
	/* ICMPv6 has a pseudo-header, ICMP has none. */
	return p->is_v4 ? 0
			: bpf_l4_csum_replace(skb, p->l4 + ICMP_CHECK, 0, outer, BPF_F_PSEUDO_HDR);
}

#endif
