/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which of this node's addresses and ports stands for a client.
 *
 * Ports come from a range of their own, outside of ip_local_port_range: a connection that the node
 * itself opens to the same backend cannot have one. Where there is no such range
 * (MASQUERADE_PORTS_SHARED), the node's sockets are looked at before a port is taken.
 */
#ifndef EBPFPROXY_MASQUERADE_H
#define EBPFPROXY_MASQUERADE_H

#include "conntrack.h"

/* bcc 0.26 declares it without the length. */
static long (*redirect_neigh)(u32 ifindex, struct bpf_redir_neigh *params, int length,
			      u64 flags) = (void *)BPF_FUNC_redirect_neigh;

#define MASQUERADE_RANGE (MASQUERADE_LAST - MASQUERADE_FIRST + 1)
#define MASQUERADE_TRIES 48
/* Tries are spread over the range: taken ports come in rows. */
#define MASQUERADE_STEP 7919

static __always_inline bool is_masquerade_port(__be16 port)
{
	return (u16)(bpf_ntohs(port) - MASQUERADE_FIRST) < MASQUERADE_RANGE;
}

/* Where the routes send a packet. The first three are through a device. */
enum fib_result {
	FIB_NEIGHBOUR, /* whose link address is known */
	FIB_OUT,
	FIB_MTU_EXCEEDED, /* that takes no packet of this size */
	FIB_LOCAL,	  /* to this host itself */
	FIB_NONE,
};

/*
 * Asks the routes for the way from @from to @to, for packets of @size bytes (0: of any). @fib gets
 * the device, 0 where the kernel has a way that this helper does not know (an encapsulating route).
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
 * Hands a packet to this host as if it had sent that to itself. redirect_neigh() gives it a route,
 * so that no check of its source is made: by any other way a packet with a loopback address, or one
 * of this host's own for its source, is a martian.
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

/* Sends a packet, as it is now, on its way from here. */
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

/* The address of the device towards a backend; the node's own where the device has none. */
static __always_inline bool masquerade_address(u32 ifindex, bool is_v4, struct inet_addr *addr)
{
	struct device *device = map_lookup(devices, &ifindex);
	const struct inet_addr none = {};

	if (!device) {
		ifindex = 0;
		device = map_lookup(devices, &ifindex);
	}
	if (!device)
		return false;
	*addr = is_v4 ? device->addr4 : device->addr6;
	return !addr_equal(addr, &none);
}

#define TCP_STATE_LISTEN 10

/*
 * Says if a socket of this host has the port that @answers come to. One that listens has no
 * connection to lose; a datagram socket need not be connected to ask the backend. The kernel has no
 * lookup for UDP-Lite and SCTP.
 */
static __always_inline bool is_of_own_socket(struct __sk_buff *skb, const struct flow *answers)
{
	const bool is_v4 = addr_is_v4(&answers->dst);
	struct bpf_sock_tuple tuple = {};
	struct bpf_sock *sock;
	bool is_used = true;
	u32 size;

	if (is_v4) {
		tuple.ipv4.saddr = answers->src.word[3];
		tuple.ipv4.daddr = answers->dst.word[3];
		tuple.ipv4.sport = answers->sport;
		tuple.ipv4.dport = answers->dport;
		size = sizeof(tuple.ipv4);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, &answers->src, sizeof(answers->src));
		__builtin_memcpy(tuple.ipv6.daddr, &answers->dst, sizeof(answers->dst));
		tuple.ipv6.sport = answers->sport;
		tuple.ipv6.dport = answers->dport;
		size = sizeof(tuple.ipv6);
	}
	if (answers->proto == IPPROTO_UDP) {
		sock = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	} else if (answers->proto == IPPROTO_TCP) {
		/* Unlike bpf_sk_lookup_tcp() this also finds what is in TIME_WAIT. */
		sock = bpf_skc_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
		if (sock)
			is_used = sock->state != TCP_STATE_LISTEN;
	} else {
		return false;
	}
	if (!sock)
		return false;
	bpf_sk_release(sock);
	return is_used;
}

/*
 * Inserts an entry of answers from a backend: @s->key has all but its dport, the port that stands
 * for the client, and @s->nat what they become. Leaves the port in @s->key.
 */
static __always_inline enum insert take_port(struct __sk_buff *skb, struct scratch *s)
{
	u32 start = bpf_get_prandom_u32() % MASQUERADE_RANGE;
	enum insert done = INSERT_TAKEN;

#pragma clang loop unroll(disable)
	for (int i = 0; i < MASQUERADE_TRIES; i++) {
		s->key.dport = bpf_htons((u16)(MASQUERADE_FIRST + start));
		done = MASQUERADE_PORTS_SHARED && is_of_own_socket(skb, &s->key)
			       ? INSERT_TAKEN
			       : conntrack_insert(s, false);
		if (done != INSERT_TAKEN)
			break;
		start = (start + MASQUERADE_STEP) % MASQUERADE_RANGE;
	}
	return done;
}

/*
 * Makes the pair that gives the flow of @key another source: @s->nat is what its questions become,
 * and gets the port.
 */
static __always_inline enum insert insert_source(struct __sk_buff *skb, struct scratch *s,
						 const struct flow *key)
{
	struct flow answers;
	enum insert done;

	s->nat.flags = NAT_SOURCE;
	invert_entry(s, key);
	done = take_port(skb, s);
	if (done != INSERT_DONE)
		return done;
	answers = s->key;
	invert_entry(s, &answers);
	return conntrack_insert(s, true);
}

/*
 * Makes the pair that masquerades a new flow. @s->nat is what its questions have become: packets
 * from the client to the backend, which leave with @addr for the client's.
 */
static __always_inline enum insert masquerade(struct __sk_buff *skb, struct scratch *s, u8 proto,
					      const struct inet_addr *addr)
{
	const struct flow between = {
		.src = s->nat.src,
		.dst = s->nat.dst,
		.sport = s->nat.sport,
		.dport = s->nat.dport,
		.proto = proto,
		.stage = STAGE_EGRESS,
	};
	struct nat *known = conntrack_lookup(&between);

	/* A flow begun anew keeps its port while that is in use. */
	if (known && known->flags & NAT_SOURCE && !(known->flags & NAT_REPLY) &&
	    !is_closed(known) && addr_equal(&known->src, addr))
		return INSERT_DONE;
	s->nat.src = *addr;
	return insert_source(skb, s, &between);
}

#endif
