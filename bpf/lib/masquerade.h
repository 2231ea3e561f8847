/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Which of this node's addresses and ports stands for a client.
 *
 * Ports come from a range of their own, outside of ip_local_port_range: a connection that the node
 * itself opens to the same backend cannot have one.
 */
#ifndef EBPFPROXY_MASQUERADE_H
#define EBPFPROXY_MASQUERADE_H

#include "conntrack.h"

#define MASQUERADE_RANGE (MASQUERADE_LAST - MASQUERADE_FIRST + 1)
#define MASQUERADE_TRIES 48
/* Tries are spread over the range: taken ports come in rows. */
#define MASQUERADE_STEP 7919

enum way {
	WAY_OUT,   /* through a device */
	WAY_LOCAL, /* to this host itself */
	WAY_NONE,
};

/* Asks the routes for the device towards @to. */
static __always_inline enum way way_to(struct __sk_buff *skb, const struct inet_addr *from,
				       const struct inet_addr *to, u32 *ifindex)
{
	struct bpf_fib_lookup fib = { .ifindex = skb->ifindex };
	long answer;

	if (addr_is_v4(to)) {
		fib.family = AF_INET;
		fib.ipv4_src = from->word[3];
		fib.ipv4_dst = to->word[3];
	} else {
		fib.family = AF_INET6;
		__builtin_memcpy(fib.ipv6_src, from, sizeof(*from));
		__builtin_memcpy(fib.ipv6_dst, to, sizeof(*to));
	}
	answer = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	*ifindex = 0;
	if (answer == BPF_FIB_LKUP_RET_SUCCESS || answer == BPF_FIB_LKUP_RET_NO_NEIGH ||
	    answer == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		*ifindex = fib.ifindex;
		return WAY_OUT;
	}
	if (answer == BPF_FIB_LKUP_RET_NOT_FWDED)
		return WAY_LOCAL;
	/* The kernel has ways that this helper does not know: encapsulating routes. */
	return answer == BPF_FIB_LKUP_RET_UNSUPP_LWT || answer == BPF_FIB_LKUP_RET_FWD_DISABLED
		       ? WAY_OUT
		       : WAY_NONE;
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

/*
 * Inserts an entry of answers from a backend: @s->key has all but its dport, the port that stands
 * for the client, and @s->nat what they become. Leaves the port in @s->key.
 */
static __always_inline enum insert take_port(struct scratch *s)
{
	u32 start = bpf_get_prandom_u32() % MASQUERADE_RANGE;
	enum insert done = INSERT_TAKEN;

#pragma clang loop unroll(disable)
	for (int i = 0; i < MASQUERADE_TRIES; i++) {
		s->key.dport = bpf_htons((u16)(MASQUERADE_FIRST + start));
		done = conntrack_insert(s, false);
		if (done != INSERT_TAKEN)
			break;
		start = (start + MASQUERADE_STEP) % MASQUERADE_RANGE;
	}
	return done;
}

/*
 * Makes the pair that masquerades packets of @flow (client to backend, as they are between ingress
 * and egress). The scratch's nat has the flow's ids; it is used up.
 */
static __always_inline enum insert masquerade(struct scratch *s, const struct flow *flow,
					      const struct inet_addr *addr)
{
	struct nat *known;
	enum insert done;

	s->key = *flow;
	s->key.stage = STAGE_EGRESS;
	known = conntrack_lookup(&s->key);
	/* The same client's second way to the same backend: its port goes on to stand for it. */
	if (known && known->flags & NAT_SOURCE && !(known->flags & NAT_REPLY) &&
	    !is_closed(known) && addr_equal(&known->src, addr))
		return INSERT_DONE;
	s->key.src = flow->dst;
	s->key.dst = *addr;
	s->key.sport = flow->dport;
	s->key.stage = STAGE_INGRESS;
	s->nat.src = flow->dst;
	s->nat.dst = flow->src;
	s->nat.sport = flow->dport;
	s->nat.dport = flow->sport;
	s->nat.flags = NAT_SOURCE | NAT_REPLY;
	done = take_port(s);
	if (done != INSERT_DONE)
		return done;
	{
		struct flow answers = s->key;

		turn_round(s, &answers);
		done = conntrack_insert(s, true);
		if (done != INSERT_DONE)
			map_delete(conntrack, &answers);
	}
	return done;
}

#endif
