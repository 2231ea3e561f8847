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
/* At most this much of the rejected packet is quoted. */
#define QUOTED 128

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

static __always_inline int make_reset(struct __sk_buff *skb, const struct packet *p)
{
	struct tcp_header tcp, rst = { .offset = 5 << 4, .flags = TCP_RST };

	if (bpf_skb_load_bytes(skb, p->l4, &tcp, sizeof(tcp)) || (tcp.flags & TCP_RST))
		return -1;
	rst.sport = tcp.dport;
	rst.dport = tcp.sport;
	if (tcp.flags & TCP_ACK) {
		rst.seq = tcp.ack;
	} else {
		rst.ack = bpf_htonl(p->seq_end);
		rst.flags |= TCP_ACK;
	}
	rst.check = csum_fold((u32)bpf_csum_diff(NULL, 0, &rst, sizeof(rst),
						 pseudo_header(p, IPPROTO_TCP, sizeof(rst))));
	if (bpf_skb_change_tail(skb, p->l4 + sizeof(rst), 0) ||
	    bpf_skb_store_bytes(skb, p->l4, &rst, sizeof(rst), 0))
		return -1;
	return write_ip_header(skb, p, IPPROTO_TCP, sizeof(rst));
}

/* Where a packet's header ends that has no options. */
static __always_inline u32 plain_l4(const struct packet *p)
{
	return L3_OFFSET + (p->is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header));
}

/* Makes an ICMP error of the packet: that it is too big for @mtu, or for 0 that nobody takes it. */
static __always_inline int make_error(struct __sk_buff *skb, const struct packet *p, u32 mtu)
{
	struct icmp_header icmp = { .rest = bpf_htonl(mtu) };
	const u32 l4 = plain_l4(p);
	struct scratch *s = scratch();
	u64 quoted = p->l3_length;
	u32 sum;
	u8 proto;

	if (!s)
		return -1;
	__builtin_memset(s->bytes, 0, QUOTED);
	if (quoted < sizeof(struct ipv4_header) + 8)
		return -1;
	/* Two comparisons in one would hide the bounds from the verifier. */
	barrier_var(quoted);
	if (quoted > QUOTED)
		quoted = QUOTED;
	if (bpf_skb_load_bytes(skb, L3_OFFSET, s->bytes, quoted))
		return -1;
	sum = bpf_csum_diff(NULL, 0, s->bytes, QUOTED, 0);
	if (p->is_v4) {
		proto = IPPROTO_ICMP;
		icmp.type = ICMP_UNREACHABLE;
		icmp.code = mtu ? ICMP_FRAG_NEEDED : ICMP_PORT_UNREACHABLE;
	} else {
		proto = IPPROTO_ICMPV6;
		icmp.type = mtu ? ICMPV6_TOO_BIG : ICMPV6_UNREACHABLE;
		icmp.code = mtu ? 0 : ICMPV6_PORT_UNREACHABLE;
		sum = csum_fold((u64)sum + pseudo_header(p, proto, sizeof(icmp) + quoted)) ^ 0xffff;
	}
	icmp.check = csum_fold((u32)bpf_csum_diff(NULL, 0, &icmp, sizeof(icmp), sum));
	if (bpf_skb_change_tail(skb, L3_OFFSET + quoted, 0) ||
	    bpf_skb_adjust_room(skb, (l4 - L3_OFFSET) + sizeof(icmp), BPF_ADJ_ROOM_MAC, 0) ||
	    bpf_skb_store_bytes(skb, l4, &icmp, sizeof(icmp), 0))
		return -1;
	return write_ip_header(skb, p, proto, sizeof(icmp) + quoted);
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
	u32 ifindex = ifindex_of(skb);

	if (!mtu)
		count(event);
	if (mtu ? p->is_later_fragment : !is_rejectable(p))
		return DROP;
	if (!mtu && p->proto == IPPROTO_TCP ? make_reset(skb, p) : make_error(skb, p, mtu))
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
