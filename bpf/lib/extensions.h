/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * IPv6's extension headers (RFC 8200, 4), which a packet has, and one that an ICMP error is about.
 */
#ifndef EBPFPROXY_EXTENSIONS_H
#define EBPFPROXY_EXTENSIONS_H

#include "headers.h"

static __always_inline bool is_extension(u8 proto)
{
	switch (proto) {
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
	case IPPROTO_FRAGMENT:
		return true;
	default:
		return false;
	}
}

/*
 * Returns the size of a header of type @proto that begins like that: the shortest extension header
 * has 8 bytes, as a fragment header has.
 */
static __always_inline u32 extension_size(u8 proto, const struct ipv6_fragment *header)
{
	if (proto == IPPROTO_FRAGMENT)
		return sizeof(*header);
	return proto == IPPROTO_AH ? (header->reserved + 2) * 4 : (header->reserved + 1) * 8;
}

#endif
