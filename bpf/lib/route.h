/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Sending a packet on from a tc program, by its route. */
#ifndef EBPFPROXY_ROUTE_H
#define EBPFPROXY_ROUTE_H

#include "events.h"
#include "fib.h"
#include "next_hop.h"
#include "options.h"
#include "packet.h"
#include "service.h"

/* bcc 0.26 declares this helper without the length. */
static long (*redirect_neigh)(u32 ifindex, struct bpf_redir_neigh *params, int length,
			      u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/*
 * Gives a packet of a device without a link layer the header that redirect_neigh() takes away: the
 * kernel drops packets that have none.
 */
static __always_inline bool add_link_header(struct __sk_buff *skb)
{
#if L3_OFFSET == 0
	return !bpf_skb_change_head(skb, ETH_HLEN, 0);
#else
	(void)skb;
	return true;
#endif
}

/*
 * Delivers a packet to this host as if the host had sent it to itself. redirect_neigh() attaches a
 * route, so that the source is not checked: by any other route a packet with a loopback address, or
 * one of this host's own, as its source is a martian.
 */
static __always_inline int send_to_self(struct __sk_buff *skb)
{
#if AT_LOOPBACK
	(void)skb;
	return PASS;
#else
	if (!add_link_header(skb) ||
	    (skb->pkt_type != PACKET_HOST && bpf_skb_change_type(skb, PACKET_HOST)))
		return drop(EVENT_REWRITE);
	return redirect_neigh(LOOPBACK_IFINDEX, NULL, 0, 0);
#endif
}

#if L3_OFFSET == ETH_HLEN
/*
 * Says if the device in @fib has link addresses. A tunnel to any host (IPIP, GRE) has a neighbour
 * without one for each next hop, and takes that from the packet's route: redirect_neigh() has to
 * attach it.
 */
static __always_inline bool has_link_addresses(const struct bpf_fib_lookup *fib)
{
	const u8 *mac = fib->dmac;

	return mac[0] | mac[1] | mac[2] | mac[3] | mac[4] | mac[5];
}

/* Sends a packet to the next hop in @fib, whose link address is known. */
static __always_inline int send_to_neighbour(struct __sk_buff *skb,
					     const struct bpf_fib_lookup *fib)
{
	const u64 now = bpf_ktime_get_coarse_ns();
	u64 *sent = next_hop_of(fib);
	u8 macs[12];

	if (sent && next_hop_is_due(sent, now)) {
		struct bpf_redir_neigh hop = { .nh_family = fib->family };

		*sent = now;
		__builtin_memcpy(hop.ipv6_nh, fib->ipv6_dst, sizeof(hop.ipv6_nh));
		return redirect_neigh(fib->ifindex, &hop, sizeof(hop), 0);
	}
	__builtin_memcpy(macs, fib->dmac, 6);
	__builtin_memcpy(macs + 6, fib->smac, 6);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0))
		return drop(EVENT_REWRITE);
	return bpf_redirect(fib->ifindex, 0);
}
#endif

/*
 * Says if a lookup with the result @route ended at a throw route of IPv6: the kernel itself goes on
 * with the next rule there, its helper does not (fib6_rule_action_alt() of the kernel). Sets @fib
 * as those rules do that do not name the device where the packet came in, which such tables are
 * for.
 */
static __always_inline bool is_thrown(struct __sk_buff *skb, const struct inet_addr *from,
				      const struct inet_addr *to, enum fib_result route,
				      struct bpf_fib_lookup *fib)
{
	if (route != FIB_LOCAL || addr_is_v4(to) || addr_is_this_node(to))
		return false;
	return leads_out(fib_result_of(skb, LOOPBACK_IFINDEX, from, to, 0, fib));
}

/* Sends a packet out by the route in @fib. */
static __always_inline int send_by(struct __sk_buff *skb, enum fib_result route,
				   const struct bpf_fib_lookup *fib)
{
#if L3_OFFSET == ETH_HLEN
	if (route == FIB_NEIGHBOUR && has_link_addresses(fib))
		return send_to_neighbour(skb, fib);
#endif
	(void)route;
	if (!add_link_header(skb))
		return drop(EVENT_REWRITE);
	return redirect_neigh(fib->ifindex, NULL, 0, 0);
}

/* Sends a rewritten packet out by its own route. */
static __always_inline int send_out(struct __sk_buff *skb, const struct inet_addr *from,
				    const struct inet_addr *to)
{
	struct bpf_fib_lookup fib;
	enum fib_result route = fib_result_of(skb, ifindex_of(skb), from, to, 0, &fib);

	if (is_thrown(skb, from, to, route, &fib))
		route = FIB_OUT;
	if (NODEPORTS_ON_LOOPBACK && route == FIB_LOCAL)
		return send_to_self(skb);
	if (!leads_out(route) || !fib.ifindex)
		return drop(EVENT_UNROUTABLE);
	return send_by(skb, route, &fib);
}

/*
 * Returns the device by which packets from @from to @to leave that have come in by @ifindex, 0
 * where that is not known.
 */
static __always_inline u32 device_towards(struct __sk_buff *skb, u32 ifindex,
					  const struct inet_addr *from, const struct inet_addr *to,
					  enum fib_result *route, struct bpf_fib_lookup *fib)
{
	*route = fib_result_of(skb, ifindex, from, to, 0, fib);
	return leads_out(*route) ? fib->ifindex : 0;
}

/*
 * Says if replies to @client leave by one device as packets of @backend, and by another as packets
 * of @frontend: routing rules (ip rule) may tell sources apart.
 */
static __always_inline bool is_routed_by_source(struct __sk_buff *skb,
						const struct inet_addr *client,
						const struct inet_addr *frontend,
						const struct inet_addr *backend)
{
	struct bpf_fib_lookup fib;
	enum fib_result route;
	u32 in, out, better;

	in = device_towards(skb, ifindex_of(skb), client, backend, &route, &fib);
	if (route == FIB_LOCAL)
		in = LOOPBACK_IFINDEX;
	if (!in)
		return false;
	out = device_towards(skb, in, backend, client, &route, &fib);
	better = device_towards(skb, in, frontend, client, &route, &fib);
	return out && better && out != better;
}

/*
 * Sends a reply by the device that its new source leads to. The kernel has routed it by the old
 * one: the network beyond that device may not take the frontend's address, or know no route back.
 * With netfilter's NAT it is the same, and administrators mark connections by their first packet's
 * destination (CONNMARK) to get another route; but here a frontend is a backend by then. Where such
 * a mark, which programs do not see, has chosen this device, the packet leaves as it is.
 */
static __always_inline int reroute(struct __sk_buff *skb, const struct packet *p,
				   const struct nat *nat)
{
	const u32 here = ifindex_of(skb), in = skb->ingress_ifindex;
	struct bpf_fib_lookup fib;
	enum fib_result route;
	u32 better;

	if (device_towards(skb, in ? in : LOOPBACK_IFINDEX, &p->flow.src, &p->flow.dst, &route,
			   &fib) != here)
		return PASS;
	better =
		device_towards(skb, in ? in : LOOPBACK_IFINDEX, &nat->src, &nat->dst, &route, &fib);
	return better && better != here ? send_by(skb, route, &fib) : PASS;
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
	enum fib_result route;

	/* It is an address of the device where the packet has come in. */
	if (addr_is_link_local6(&nat->dst))
		return PASS;
	route = fib_result_of(skb, ifindex_of(skb), &nat->dst, &nat->src, 0, &fib);
	if (NODEPORTS_ON_LOOPBACK && route == FIB_LOCAL)
		return send_to_self(skb);
	if (route == FIB_NEIGHBOUR && fib.ifindex != ifindex_of(skb)) {
		const u16 protocol = skb->protocol;
		u8 header[ETH_HLEN];

		__builtin_memcpy(header, fib.smac, 6);
		__builtin_memcpy(header + 6, fib.dmac, 6);
		__builtin_memcpy(header + 12, &protocol, 2);
		if (!add_link_header(skb) || bpf_skb_store_bytes(skb, 0, header, sizeof(header), 0))
			return drop(EVENT_REWRITE);
		return bpf_redirect(fib.ifindex, BPF_F_INGRESS);
	}
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

	if (NODEPORTS_ON_LOOPBACK && !addr_is_link_local6(&nat->dst) &&
	    fib_result_of(skb, ifindex_of(skb), &nat->dst, &nat->src, 0, &fib) == FIB_LOCAL)
		return send_to_self(skb);
	return PASS;
#endif
}

#endif
