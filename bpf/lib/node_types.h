/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* This is what programs know of this node: devices and ranges of addresses. See types.h. */
#ifndef EBPFPROXY_NODE_TYPES_H
#define EBPFPROXY_NODE_TYPES_H

/* devices, by ifindex: what masquerading to a device uses, and what is behind it. */
#define DEVICE_PODS  (1 << 0) /* as detectLocalMode says */
#define DEVICE_LOCAL (1 << 1) /* no uplink and no tunnel */

/* Flags of entry 0, which is no device but the node. */
#define HANDOVER_MODE	(1 << 2) /* TCP connections that began elsewhere are netfilter's */
#define NO_NEW_FLOWS	(1 << 3) /* packets of known flows are translated; no flow is created */
#define MIGRATING_FLOWS (1 << 7) /* flows of other maps are still being copied to these */

/*
 * Packets pass a bridge in addition to its ports, and a macvlan in addition to the device below it
 * when they leave. What may be done only once to a packet is done at the device below.
 */
#define DEVICE_INGRESS_BELOW (1 << 4) /* our program below has seen what comes in */
#define DEVICE_EGRESS_BELOW  (1 << 5) /* our program below will see what leaves */
#define DEVICE_EGRESS_ABOVE  (1 << 6) /* our program above has seen some of what leaves */

#define DEVICE_TUNNEL (1 << 8) /* to other nodes' pods */
#define DEVICE_RULES  (1 << 9) /* of each device: this node routes by sources */

struct device {
	struct inet_addr addr4;
	struct inet_addr addr6;
	u32 flags;
	u32 mtu;
};

/* xdp_devices, by ifindex. */
#define XDP_FORWARDS   (1 << 0) /* our XDP program forwards what comes in here */
#define XDP_SENDS_BACK (1 << 1) /* the driver can send that back by here: XDP_TX */
#define XDP_TAKES      (1 << 2) /* it takes what programs redirect to here */

struct xdp_device {
	u8 link_address[6];
	u16 flags;
};

/* source_ranges: a service id and a prefix; the length counts the id's 32 bits, too. */
struct source_range_key {
	u32 length;
	u32 service_id;
	struct inet_addr addr;
};

/* cidrs: what is known of a whole range of addresses. */
#define CIDR_PODS     (1 << 0) /* of this node, as detectLocalMode says */
#define CIDR_SERVICES (1 << 1)
#define CIDR_TAKEN    (1 << 2) /* in a Service CIDR, but this node's own or another proxy's */

struct cidr_key {
	u32 length;
	struct inet_addr addr;
};

/* Index of unallocated: packets and sockets that wanted an unallocated address. */
enum unallocated {
	UNALLOCATED_PACKET = 0,
	UNALLOCATED_SOCKET = 1,
	UNALLOCATED_IPV6 = 2, /* added to the others */
	UNALLOCATED = 4,
};

#endif
