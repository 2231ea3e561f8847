/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IPv4 and IPv6 addresses in one representation, and comparing them. */
#ifndef EBPFPROXY_ADDR_H
#define EBPFPROXY_ADDR_H

#include "types.h"

#define V4_MAPPED bpf_htonl(0x0000ffff)

static __always_inline struct inet_addr addr_of_v4(__be32 v4)
{
	return (struct inet_addr) { { 0, 0, V4_MAPPED, v4 } };
}

static __always_inline bool addr_is_v4(const struct inet_addr *a)
{
	return !(a->word[0] | a->word[1]) && a->word[2] == V4_MAPPED;
}

static __always_inline bool addr_equal(const struct inet_addr *a, const struct inet_addr *b)
{
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
		 (a->word[3] ^ b->word[3]));
}

/* connect() to the unspecified address reaches this host, as connect() to loopback does. */
static __always_inline bool addr_is_loopback(const struct inet_addr *a)
{
	if (addr_is_v4(a))
		return (bpf_ntohl(a->word[3]) >> 24) == 127 || !a->word[3];
	return !(a->word[0] | a->word[1] | a->word[2]) && (bpf_ntohl(a->word[3]) & ~1U) == 0;
}

/* IPv6's link-local addresses (RFC 4291, 2.5.6). Nothing routes what they send. */
static __always_inline bool addr_is_link_local6(const struct inet_addr *a)
{
	return (bpf_ntohl(a->word[0]) & 0xffc00000) == 0xfe800000;
}

#endif
