/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rejecting: a TCP reset (RFC 9293, 3.10.7.1), an ICMP port unreachable (RFC 792; RFC 4443, 3.1) or
 * an ICMP error that the packet is too big (RFC 1191; RFC 4443, 3.2), made of the packet itself and
 * sent back to where it came from.
 */
#ifndef EBPFPROXY_REJECT_H
#define EBPFPROXY_REJECT_H

#include "conntrack.h"
#include "icmp_limit.h"
#include "rewrite.h"

#define REJECT_HOPS 64
/* A checksum that is left to the device begins within so many bytes. */
#define FORGOTTEN 256

static __always_inline int swap_link_addresses(struct __sk_buff *skb)
{
#if L3_OFFSET == ETH_HLEN
	u16 old[6], new[6];

	if (bpf_skb_load_bytes(skb, 0, old, sizeof(old)))
		return -1;
	__builtin_memcpy(new, old + 3, 6);
	__builtin_memcpy(new + 3, old, 6);
	return bpf_skb_store_bytes(skb, 0, new, sizeof(new), 0);
#else
	(void)skb;
	return 0;
#endif
}

/* Sums up TCP's or ICMPv6's pseudo-header for a packet back to the source of @p. */
static __always_inline u32 pseudo_header(const struct packet *p, u8 proto, u16 length)
{
	__be32 rest = bpf_htonl((u32)proto + length);

	if (p->is_v4) {
		__be32 both[2] = { p->flow.src.word[3], p->flow.dst.word[3] };

		rest = bpf_csum_diff(NULL, 0, &rest, sizeof(rest), 0);
		return bpf_csum_diff(NULL, 0, both, sizeof(both), rest);
	}
	rest = bpf_csum_diff(NULL, 0, &rest, sizeof(rest), 0);
	return bpf_csum_diff(NULL, 0, (void *)&p->flow.src, 2 * sizeof(struct inet_addr), rest);
}

/* Writes the IP header of a reply with @length bytes after that header. */
static __always_inline int write_ip_header(struct __sk_buff *skb, const struct packet *p, u8 proto,
					   u16 length)
{
	if (p->is_v4) {
		struct ipv4_header ip = {
			.version_ihl = 0x45,
			.length = bpf_htons(sizeof(ip) + length),
			.fragment = bpf_htons(0x4000),
			.ttl = REJECT_HOPS,
			.proto = proto,
			.src = p->flow.dst.word[3],
			.dst = p->flow.src.word[3],
		};

		ip.check = csum_fold((u32)bpf_csum_diff(NULL, 0, &ip, sizeof(ip), 0));
		return bpf_skb_store_bytes(skb, L3_OFFSET, &ip, sizeof(ip), 0);
	} else {
		struct ipv6_header ip = {
			.version_class_label = bpf_htonl(6U << 28),
			.length = bpf_htons(length),
			.next = proto,
			.hops = REJECT_HOPS,
			.src = p->flow.dst,
			.dst = p->flow.src,
		};

		return bpf_skb_store_bytes(skb, L3_OFFSET, &ip, sizeof(ip), 0);
	}
}

/* Where a packet's header ends that has no options. */
static __always_inline u32 plain_l4(const struct packet *p)
{
	return L3_OFFSET + (p->is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header));
}

/*
 * Makes a packet @size bytes long, which is then written anew from the IP header on. Where its
 * checksum is left to the device (CHECKSUM_PARTIAL), the kernel keeps in mind what has to be summed
 * up, whatever is written there: it forgets that where a packet loses the bytes at which the sum
 * begins. So they are taken away, and as many are added again.
 */
static __always_inline int make_blank(struct __sk_buff *skb, u32 l4, u32 size)
{
	return bpf_skb_change_tail(skb, l4 + FORGOTTEN, 0) ||
	       bpf_skb_adjust_room(skb, -FORGOTTEN, BPF_ADJ_ROOM_MAC, 0) ||
	       bpf_skb_adjust_room(skb, FORGOTTEN, BPF_ADJ_ROOM_MAC, 0) ||
	       bpf_skb_change_tail(skb, size, 0);
}

/* Leaves the reset in the reply. */
static __always_inline int make_reset(struct __sk_buff *skb, const struct packet *p,
				      struct reply *reply)
{
	struct tcp_header tcp, *rst = (struct tcp_header *)reply->bytes;

	if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)) || (tcp.flags & TCP_RST))
		return -1;
	rst->offset = sizeof(*rst) / 4 << 4;
	rst->flags = TCP_RST;
	rst->sport = tcp.dport;
	rst->dport = tcp.sport;
	if (tcp.flags & TCP_ACK) {
		rst->seq = tcp.ack;
	} else {
		rst->ack = bpf_htonl(p->seq_end);
		rst->flags |= TCP_ACK;
	}
	reply->proto = IPPROTO_TCP;
	reply->check_at = TCP_CHECK;
	reply->size = sizeof(*rst);
	return 0;
}

/* Leaves an ICMP error: that the packet is too big for @mtu, or for 0 that nobody takes it. */
static __always_inline int make_error(struct __sk_buff *skb, const struct packet *p, u32 mtu,
				      struct reply *reply)
{
	struct icmp_header *icmp = (struct icmp_header *)reply->bytes;
	u64 quoted = p->l3_length;

	if (quoted < sizeof(struct ipv4_header) + 8)
		return -1;
	/* Two comparisons in one would hide the bounds from the verifier. */
	barrier_var(quoted);
	if (quoted > QUOTED)
		quoted = QUOTED;
	/* For the verifier of Linux 6.1 an older copy of it on the stack has no bounds. */
	barrier_var(quoted);
	if (bpf_skb_load_bytes(skb, L3_OFFSET, reply->bytes + sizeof(*icmp), quoted))
		return -1;
	icmp->rest = bpf_htonl(mtu);
	if (p->is_v4) {
		reply->proto = IPPROTO_ICMP;
		icmp->type = ICMP_UNREACHABLE;
		icmp->code = mtu ? ICMP_FRAG_NEEDED : ICMP_PORT_UNREACHABLE;
	} else {
		reply->proto = IPPROTO_ICMPV6;
		icmp->type = mtu ? ICMPV6_TOO_BIG : ICMPV6_UNREACHABLE;
		icmp->code = mtu ? 0 : ICMPV6_PORT_UNREACHABLE;
	}
	reply->check_at = ICMP_CHECK;
	reply->size = sizeof(*icmp) + quoted;
	return 0;
}

/* Makes the reply of the packet. */
static __always_inline int write_reply(struct __sk_buff *skb, const struct packet *p,
				       struct reply *reply)
{
	const u32 l4 = plain_l4(p);
	u64 size = reply->size, check_at = reply->check_at;
	const u8 proto = reply->proto;
	u32 sum;

	/* Two comparisons in one would hide the bounds from the verifier. */
	barrier_var(size);
	if (size < sizeof(struct icmp_header))
		return -1;
	barrier_var(size);
	if (size > sizeof(reply->bytes))
		return -1;
	barrier_var(size);
	barrier_var(check_at);
	if (check_at > TCP_CHECK)
		return -1;
	sum = proto == IPPROTO_ICMP ? 0 : pseudo_header(p, proto, size);
	sum = bpf_csum_diff(NULL, 0, reply->bytes, sizeof(reply->bytes), sum);
	*(__sum16 *)(reply->bytes + check_at) = csum_fold(sum);
	if (make_blank(skb, l4, l4 + size) || bpf_skb_store_bytes(skb, l4, reply->bytes, size, 0))
		return -1;
	return write_ip_header(skb, p, proto, size);
}

/* Says if a packet can be rejected, for another reason than that it is too big. */
static __always_inline bool is_rejectable(const struct packet *p)
{
	return !p->is_later_fragment && p->l4 == plain_l4(p);
}

/* Says if a packet must not be rejected now, since there were too many ICMP errors. */
static __always_inline bool exceeds_icmp_limit(const struct packet *p)
{
	return !AT_LOOPBACK && p->proto != IPPROTO_TCP && is_rejectable(p) && !icmp_take_token();
}

/*
 * Rejects the packet, which is too big if there is an @mtu. Packets that cannot be rejected are
 * dropped: fragments, headers with options, and resets, which must not be answered.
 */
static __always_inline int reject(struct __sk_buff *skb, const struct packet *p, enum event event,
				  u32 mtu)
{
	struct reply *reply = &scratch_of(p)->reply;
	u32 ifindex = ifindex_of(skb);

	if (!mtu)
		count(event);
	if (mtu ? p->is_later_fragment : !is_rejectable(p))
		return DROP;
	__builtin_memset(reply->bytes, 0, sizeof(reply->bytes));
	if (!mtu && p->proto == IPPROTO_TCP ? make_reset(skb, p, reply)
					    : make_error(skb, p, mtu, reply))
		return DROP;
	/* The verifier forgets which of both it is. */
	asm volatile("" ::: "memory");
	if (write_reply(skb, p, reply))
		return DROP;
	/* Packets that leave by the loopback device come back by themselves. */
	if (AT_LOOPBACK)
		return PASS;
	if (swap_link_addresses(skb))
		return DROP;
	/* This host gets the reply as if it came from the wire. */
	return bpf_redirect(ifindex, p->flow.stage == STAGE_EGRESS ? BPF_F_INGRESS : 0);
}

#endif
