/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Devices of this node, and the node as a whole: roles, MTU, masquerade addresses, modes. */
#ifndef EBPFPROXY_DEVICE_H
#define EBPFPROXY_DEVICE_H

#include "maps.h"
#include "options.h"
#include "packet.h"

/* Says if an address is of a pod, of any node. */
static __always_inline bool is_in_pod_cidr(const struct inet_addr *addr)
{
	const struct cidr_key key = { .length = 128, .addr = *addr };
	const u32 *flags = map_lookup(cidrs, &key);

	return flags && *flags & CIDR_PODS;
}

static __always_inline bool is_at_local_device(struct __sk_buff *skb)
{
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_at(devices, ifindex);

	return device && device->flags & DEVICE_LOCAL;
}

enum client_location {
	OUTSIDE_CLUSTER,
	POD_OF_OTHER_NODE, /* by its address alone */
	POD_OF_THIS_NODE,
};

/*
 * Finds where the client is, a pod or VM as detectLocalMode defines it, and the MTU of the device
 * by which its packet came in: it must leave unfragmented. Both are left in @s, and if this node
 * routes by sources.
 */
static __always_inline void locate_client(struct __sk_buff *skb, struct scratch *s,
					  const struct packet *p)
{
	u32 ifindex = ifindex_of(skb);
	const struct device *device = map_at(devices, ifindex);
	const u32 flags = device ? device->flags : 0;

	s->mtu = device ? device->mtu : 0;
	s->has_rules = !!(flags & DEVICE_RULES);
	s->client_location = OUTSIDE_CLUSTER;
	if (PODS_BY_CIDR && is_in_pod_cidr(&p->flow.src))
		s->client_location = flags & DEVICE_LOCAL ? POD_OF_THIS_NODE : POD_OF_OTHER_NODE;
	else if (!PODS_BY_CIDR && flags & DEVICE_PODS)
		s->client_location = POD_OF_THIS_NODE;
	/* The compiler has to read it again, and the verifier knows nothing of it then. */
	asm volatile("" ::: "memory");
}

/* Says if what passes here passes our program at a device below, too, at the same stage. */
static __always_inline bool is_seen_below(struct __sk_buff *skb, enum stage stage)
{
	const u32 below = stage == STAGE_INGRESS ? DEVICE_INGRESS_BELOW : DEVICE_EGRESS_BELOW;
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_at(devices, ifindex);

	return device && device->flags & below;
}

/*
 * Says if backends beyond this device are on other nodes, and if our program at no other device
 * sees what leaves here.
 */
static __always_inline bool is_only_way_out(struct __sk_buff *skb)
{
	const u32 others = DEVICE_LOCAL | DEVICE_EGRESS_BELOW | DEVICE_EGRESS_ABOVE;
	u32 ifindex = ifindex_of(skb);
	struct device *device = map_at(devices, ifindex);

	return device && !(device->flags & others);
}

/*
 * Says if a frame is addressed to this node. On a pod's device every frame is: with a bridge behind
 * it frames carry the bridge's address. On an uplink frames to other hosts belong to them.
 */
static __always_inline bool is_addressed_to_us(struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST || is_at_local_device(skb);
}

/*
 * Says if a packet comes again on a VLAN device, whose hook is to decide. Those that come in with a
 * priority alone in their tag do not: the kernel takes it away after this hook.
 */
static __always_inline bool is_of_vlan(struct __sk_buff *skb, const enum stage stage)
{
	return skb->vlan_present && (stage != STAGE_INGRESS || skb->vlan_tci & VLAN_ID);
}

/* Finds the masquerade address for a device; devices that have none use the node's own. */
static __always_inline bool masquerade_address(u32 ifindex, bool is_v4, struct inet_addr *addr)
{
	struct device *device = map_at(devices, ifindex);
	const struct inet_addr none = {};

	if (!device) {
		ifindex = 0;
		device = map_at(devices, ifindex);
	}
	if (!device)
		return false;
	*addr = is_v4 ? device->addr4 : device->addr6;
	return !addr_equal(addr, &none);
}

/*
 * Says if a packet that belongs to no flow of ours is left to kube-proxy, behind this hook: while
 * connections that began there live on, and while our programs are attached to the node's devices
 * one by one, or detached from them.
 */
static __always_inline bool defer_to_kube_proxy(const struct packet *p)
{
	u32 any = 0;
	struct device *node = map_at(devices, any);

	if (!node || !(node->flags & (HANDOVER_MODE | NO_NEW_FLOWS)))
		return false;
	return node->flags & NO_NEW_FLOWS ||
	       (p->flow.proto == IPPROTO_TCP && (p->tcp_flags & (TCP_SYN | TCP_ACK)) != TCP_SYN);
}

/*
 * Says if a segment may be of a connection that another size of maps knows, from which it is copied
 * just now. Such a segment is dropped, and not rejected: its sender repeats it.
 */
static __always_inline bool may_be_migrating(const struct packet *p)
{
	const u32 any = 0;
	struct device *node;

	if (p->flow.proto != IPPROTO_TCP || (p->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return false;
	node = map_at(devices, any);
	return node && node->flags & MIGRATING_FLOWS;
}

#endif
