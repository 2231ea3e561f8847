/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Looking up routes. */
#ifndef EBPFPROXY_FIB_H
#define EBPFPROXY_FIB_H

#include "addr.h"
#include "compat.h"

/* Results of a route lookup; the first three go through a device. */
enum fib_result {
	FIB_NEIGHBOUR, /* the next hop's link address is known */
	FIB_OUT,
	FIB_MTU_EXCEEDED, /* the device takes no packet of this size */
	FIB_LOCAL,	  /* to this host itself */
	FIB_NONE,
};

/*
 * Looks up the route from @from to @to for packets of @size bytes (0: any) that have come in by
 * @ifindex. Sets the device in @fib, to 0 where the kernel has a route that this helper does not
 * know (an encapsulating one). Where the MTU is exceeded, tot_len is set to that, and the device is
 * not known. @ctx is that of a program at tc or XDP.
 */
static __always_inline enum fib_result fib_result_of(void *ctx, u32 ifindex,
						     const struct inet_addr *from,
						     const struct inet_addr *to, u16 size,
						     struct bpf_fib_lookup *fib)
{
	__builtin_memset(fib, 0, sizeof(*fib));
	fib->ifindex = ifindex;
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
	switch (bpf_fib_lookup(ctx, fib, sizeof(*fib), 0)) {
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

static __always_inline bool leads_out(enum fib_result route)
{
	return route <= FIB_MTU_EXCEEDED;
}

#endif
