/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Next hops to which programs send by themselves, with the link address that the kernel knows. The
 * kernel verifies an address while it sends to it (RFC 4861, 7.3.3; ARP is handled the same): one
 * that only programs use would be used for ever, also when the next hop has got another. So the
 * kernel sends a packet to each once in a while.
 */
#ifndef EBPFPROXY_NEXT_HOP_H
#define EBPFPROXY_NEXT_HOP_H

#include "compat.h"
#include "filter.h"
#include "maps.h"

#define NEXT_HOP_BITS 10
#define NEXT_HOP_NS   (4 * NSEC_PER_SEC)

/* Returns when the kernel last sent to the next hop in @fib: CLOCK_MONOTONIC, ns. */
static __always_inline u64 *next_hop_of(const struct bpf_fib_lookup *fib)
{
	struct inet_addr hop;
	u32 at;

	/* An IPv4 address is the first word of it. */
	__builtin_memcpy(&hop, fib->ipv6_dst, sizeof(hop));
	at = ((addr_fold(&hop) ^ fib->ifindex) * GOLDEN) >> (32 - NEXT_HOP_BITS);
	return map_at(next_hops, at);
}

/* Says if the kernel is to send a packet to the next hop now; next hops may share a place. */
static __always_inline bool next_hop_is_due(const u64 *sent, u64 now)
{
	return sent && (s64)(now - *sent) > (s64)NEXT_HOP_NS;
}

#endif
