/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Unallocated addresses: those of the Service network that no Service has. Packets to them must not
 * reach a host behind the default gateway (kube-proxy's nftables mode: chain cluster-ips-check).
 *
 * Ranges are in cidrs, where a lookup walks a trie. cidr_filter spares that to all other packets:
 * one bit for each /20 of IPv4, and for each hash of an IPv6 /64. datapath/node/service_cidrs.py
 * computes the same bits.
 */
#ifndef EBPFPROXY_SERVICE_CIDR_H
#define EBPFPROXY_SERVICE_CIDR_H

#include "addr.h"
#include "filter.h"
#include "maps.h"

#define CIDR_FILTER_BITS 20

static __always_inline bool may_be_in_service_cidr(const struct inet_addr *a)
{
	const u8 *bits = map_value(cidr_filter);
	u32 at;

	at = addr_is_v4(a) ? bpf_ntohl(a->word[3])
			   : (a->word[0] * 0x85ebca6bU + a->word[1]) * GOLDEN;
	at >>= 32 - CIDR_FILTER_BITS;
	return bits[at >> 3] & (1 << (at & 7));
}

/* Returns the CIDR_ flags of the range that the address is in. */
static __always_inline u32 service_cidr_flags(const struct inet_addr *addr)
{
	struct cidr_key key = { .length = 128, .addr = *addr };
	u32 *flags;

	if (!may_be_in_service_cidr(addr))
		return 0;
	flags = map_lookup(cidrs, &key);
	return flags ? *flags : 0;
}

static __always_inline bool in_service_cidr(const struct inet_addr *addr)
{
	return service_cidr_flags(addr) & CIDR_SERVICES;
}

/* Says if no one has the address: neither this node nor a Service that another proxy serves. */
static __always_inline bool is_unallocated(const struct inet_addr *addr)
{
	return (service_cidr_flags(addr) & (CIDR_SERVICES | CIDR_TAKEN)) == CIDR_SERVICES;
}

/*
 * Computes the conntrack key of a host outside that has an address in such a range and has sent
 * something to this node: datagrams to it are replies. The key has no ports, and no other address.
 */
static __always_inline void outside_client_key(struct flow *key, const struct inet_addr *addr)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->dst = *addr;
	key->proto = IPPROTO_UDP;
	key->stage = STAGE_EGRESS;
}

static __always_inline bool is_outside_client(const struct inet_addr *addr)
{
	struct flow key;

	outside_client_key(&key, addr);
	return map_lookup(conntrack, &key) != NULL;
}

static __always_inline void count_unallocated(const struct inet_addr *addr, enum unallocated where)
{
	u32 index = where + (addr_is_v4(addr) ? 0 : UNALLOCATED_IPV6);
	u64 *counter = map_lookup(unallocated, &index);

	/* Socket hooks can be preempted: only an atomic add is exact, even per CPU. */
	if (counter)
		__sync_fetch_and_add(counter, 1);
}

#endif
