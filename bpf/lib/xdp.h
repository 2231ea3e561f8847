/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Forwarding at XDP: tc and XDP agree here about the packets and devices that allow it. */
#ifndef EBPFPROXY_XDP_H
#define EBPFPROXY_XDP_H

#include "maps.h"
#include "packet.h"

static __always_inline struct xdp_device *xdp_device_of(u32 ifindex)
{
	return map_at(xdp_devices, ifindex);
}

/*
 * Says if a frame that has come in at device @from, whose ifindex is @in, can leave from there by
 * @out. A driver drops what it cannot take, and tells nobody.
 */
static __always_inline bool xdp_can_send(const struct xdp_device *from, u32 in, u32 out)
{
	const struct xdp_device *to;

	if (!(from->flags & XDP_FORWARDS))
		return false;
	if (in == out)
		return from->flags & (XDP_SENDS_BACK | XDP_TAKES);
	to = xdp_device_of(out);
	return to && to->flags & XDP_TAKES;
}

/*
 * Says if XDP forwards packets such as @p, the first of a flow, from @in to @out: tc then creates a
 * flow that is forwarded from the hook. A flow that netfilter has seen is not taken away from it
 * half-way.
 */
static __always_inline bool is_for_xdp(u32 in, u32 out, const struct packet *p)
{
	const u16 plain =
		L3_OFFSET + (p->is_v4 ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header));
	const struct xdp_device *from = xdp_device_of(in);

	return from && (p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP) && !p->is_fragment &&
	       p->l4 == plain && xdp_can_send(from, in, out);
}

#endif
