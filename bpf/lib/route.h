/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Routing from a tc program: looking up a route, and sending a packet on its way. */
#ifndef EBPFPROXY_ROUTE_H
#define EBPFPROXY_ROUTE_H

#include "events.h"
#include "options.h"
#include "packet.h"

/* bcc 0.26 declares this helper without the length. */
static long (*redirect_neigh)(u32 ifindex, struct bpf_redir_neigh *params, int length,
			      u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* Results of a route lookup; the first three go through a device. */
enum fib_result {
	FIB_NEIGHBOUR, /* the next hop's link address is known */
	FIB_OUT,
	FIB_MTU_EXCEEDED, /* the device takes no packet of this size */
	FIB_LOCAL,	  /* to this host itself */
	FIB_NONE,
};

/*
 * Looks up the route from @from to @to for packets of @size bytes (0: any). Sets the device in
 * @fib, to 0 where the kernel has a route that this helper does not know (an encapsulating one).
 */
static __always_inline enum fib_result fib_result_of(struct __sk_buff *skb,
						     const struct inet_addr *from,
						     const struct inet_addr *to, u16 size,
						     struct bpf_fib_lookup *fib)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = ifindex_of(skb);
	fib->tot_len = size;
	if (addr_is_v4(to)) {
		fib->family = AF_INET;
		fib->ipv4_src = from->word[3];
		fib->ipv4_dst = to->word[3];
	} else {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_src, from, sizeof(*from));
		__builtin_memcpy(fib->ipv6_dst, to, sizeof(*to));
	}
	switch (bpf_fib_lookup(skb, fib, sizeof(*fib), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
		return FIB_NEIGHBOUR;
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		return FIB_OUT;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return FIB_MTU_EXCEEDED;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return FIB_LOCAL;
	case BPF_FIB_LKUP_RET_UNSUPP_LWT:
	case BPF_FIB_LKUP_RET_FWD_DISABLED:
		fib->ifindex = 0;
		return FIB_OUT;
	default:
		return FIB_NONE;
	}
}

static __always_inline bool leads_out(enum fib_result way)
{
	return way <= FIB_MTU_EXCEEDED;
}

/*
 * Delivers a packet to this host as if the host had sent it to itself. redirect_neigh() attaches a
 * route, so that the source is not checked: by any other way a packet with a loopback address, or
 * one of this host's own, as its source is a martian.
 */
static __always_inline int send_to_self(struct __sk_buff *skb)
{
#if AT_LOOPBACK
	(void)skb;
	return PASS;
#else
#if L3_OFFSET == 0
	if (bpf_skb_change_head(skb, ETH_HLEN, 0))
		return drop(EVENT_REWRITE);
#endif
	if (skb->pkt_type != PACKET_HOST && bpf_skb_change_type(skb, PACKET_HOST))
		return drop(EVENT_REWRITE);
	return redirect_neigh(LOOPBACK_IFINDEX, NULL, 0, 0);
#endif
}

/* Sends a rewritten packet out by its own route. */
static __always_inline int send_out(struct __sk_buff *skb, const struct inet_addr *from,
				    const struct inet_addr *to)
{
	struct bpf_fib_lookup fib;
	enum fib_result way = fib_result_of(skb, from, to, 0, &fib);

	if (NODEPORTS_ON_LOOPBACK && way == FIB_LOCAL)
		return send_to_self(skb);
	if (!leads_out(way) || !fib.ifindex)
		return drop(EVENT_UNROUTABLE);
#if L3_OFFSET == ETH_HLEN
	if (way == FIB_NEIGHBOUR) {
		u8 macs[12];

		__builtin_memcpy(macs, fib.dmac, 6);
		__builtin_memcpy(macs + 6, fib.smac, 6);
		if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
			return drop(EVENT_REWRITE);
		return bpf_redirect(fib.ifindex, 0);
	}
#endif
	return redirect_neigh(fib.ifindex, NULL, 0, 0);
}

/*
 * Delivers a packet from a frontend to this host. It came in by the device of its backend, but a
 * strict reverse path check (rp_filter=1, RFC 3704, 2.2; nftables' fib) expects it at that of the
 * route to the frontend.
 */
static __always_inline int deliver(struct __sk_buff *skb, const struct nat *nat)
{
#if AT_LOOPBACK
	/*
	 * With the route that the packet has, it would not come in by lo for a socket that is bound
	 * to lo.
	 */
	if (nat->flags & NAT_BOUND)
		return redirect_neigh(LOOPBACK_IFINDEX, NULL, 0, 0);
	(void)skb;
#else
	struct bpf_fib_lookup fib;
	enum fib_result way;

	if (L3_OFFSET != ETH_HLEN && !NODEPORTS_ON_LOOPBACK)
		return PASS;
	way = fib_result_of(skb, &nat->dst, &nat->src, 0, &fib);
	if (NODEPORTS_ON_LOOPBACK && way == FIB_LOCAL)
		return send_to_self(skb);
#if L3_OFFSET == ETH_HLEN
	if (way == FIB_NEIGHBOUR && fib.ifindex != ifindex_of(skb)) {
		u8 macs[12];

		__builtin_memcpy(macs, fib.smac, 6);
		__builtin_memcpy(macs + 6, fib.dmac, 6);
		if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
			return drop(EVENT_REWRITE);
		return bpf_redirect(fib.ifindex, BPF_F_INGRESS);
	}
#endif
#endif
	return PASS;
}

/*
 * Delivers an ICMP error about a packet of this host. It stays at the device where it came in, as
 * its source may be a router's, unless its client is on the loopback.
 */
static __always_inline int deliver_error(struct __sk_buff *skb, const struct nat *nat)
{
#if AT_LOOPBACK
	return deliver(skb, nat);
#else
	struct bpf_fib_lookup fib;

	if (NODEPORTS_ON_LOOPBACK && fib_result_of(skb, &nat->dst, &nat->src, 0, &fib) == FIB_LOCAL)
		return send_to_self(skb);
	return PASS;
#endif
}

#endif
