/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Fragments: later ones have no ports, and with IPv6 no transport protocol. Both are remembered
 * from the first one.
 */
#ifndef EBPFPROXY_FRAGMENTS_H
#define EBPFPROXY_FRAGMENTS_H

#include "headers.h"
#include "maps.h"

static __always_inline bool has_ports(u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP ||
	       proto == IPPROTO_UDPLITE;
}

/* These are the protocols of has_ports(), a byte each. */
#define PROTOCOLS_WITH_PORTS                                                                       \
	(IPPROTO_UDP | IPPROTO_TCP << 8 | IPPROTO_UDPLITE << 16 | (u32)IPPROTO_SCTP << 24)

/*
 * Finds what the first fragment has left, and sets the protocol in @key to that fragment's. With
 * IPv6 a later one only says what comes first behind the fragment header, which may be an extension
 * header; no other datagram with the same addresses and id is under way, of whichever protocol (RFC
 * 8200, 4.5).
 */
static __always_inline struct fragment *find_fragment(struct fragment_key *key, bool is_v4)
{
	struct fragment *known = has_ports(key->proto) ? map_lookup(fragments, key) : NULL;

	if (known || is_v4)
		return known;
#pragma clang loop unroll(full)
	for (u32 protocols = PROTOCOLS_WITH_PORTS; protocols; protocols >>= 8) {
		key->proto = (u8)protocols;
		known = map_lookup(fragments, key);
		if (known)
			return known;
	}
	return NULL;
}

/*
 * Returns the next fragment id. The node has one counter: no id returns within the time of a
 * reassembly.
 */
static __always_inline __be32 next_fragment_id(bool is_v4)
{
	u64 *count = map_value(fragment_ids), id = __sync_fetch_and_add(count, 1);

	return is_v4 ? bpf_htons((u16)id) : bpf_htonl((u32)id);
}

#endif
