/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The structs that maps hold. ebpfproxy/datapath/layout.py describes the same bytes to the agent;
 * a change to either is a new schema version there.
 *
 * Addresses and ports are in network byte order, everything else in host order. An address of
 * either family is 16 bytes: IPv4 is written as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2), so that only
 * the frontend tables, whose keys decide the speed, exist twice.
 */
#ifndef EBPFPROXY_TYPES_H
#define EBPFPROXY_TYPES_H

/* A client in the cluster (this node's pods and the node itself), or traffic from outside. */
enum scope {
	SCOPE_INTERNAL = 0,
	SCOPE_EXTERNAL = 1,
};

/* A service port's two backend sets, as the traffic policies name them. */
enum policy {
	POLICY_CLUSTER = 0,
	POLICY_LOCAL = 1,
	POLICIES = 2,
};

/* service.flags */
#define SERVICE_LOCAL	   (1 << 0) /* this entry uses the Local set */
#define SERVICE_TWO_SCOPES (1 << 1) /* the external scope has an entry of its own */

struct inet_addr {
	__be32 word[4];
};

/* A NodePort's address is 0: it stands for every address in node_addresses. */
struct service4_key {
	__be32 addr;
	__be16 port;
	u8 proto;
	u8 scope;
};

struct service6_key {
	struct inet_addr addr;
	__be16 port;
	u8 proto;
	u8 scope;
};

/* A frontend. Written when the Service changes, never when only endpoints do. */
struct service {
	u32 id;
	u16 flags;
	u8 kind;
	u8 algorithm;
	u32 affinity_seconds;
	u32 reserved;
};

/*
 * Index: service id * POLICIES + policy. The range of slots that a choice is made from. One aligned
 * word, so that a reader sees the old range or the new one.
 */
union selection {
	struct {
		u32 base;
		u32 count;
	};
	u64 word;
};

/* Slots hold backend ids as u64: an array's elements are 8 bytes apart in any case. */

/* Index: backend id. */
struct backend {
	struct inet_addr addr;
	__be16 port;
	u8 proto;
	u8 state;
	u16 weight;
	u16 reserved;
};

/* What a connected socket asked for and what it got. */
struct origin {
	struct inet_addr frontend;
	struct inet_addr backend;
	__be16 frontend_port;
	__be16 backend_port;
	u32 service_id;
	u32 backend_id;
};

/* Where an unconnected socket meant the datagrams to go that went to a backend. */
struct revnat_key {
	u64 cookie;
	struct inet_addr backend;
	__be16 backend_port;
	u16 pad[3];
};

struct revnat {
	struct inet_addr frontend;
	__be16 frontend_port;
	u16 pad;
};

struct service_stats {
	u64 chosen;
	u64 refused;
	u64 dropped;
};

struct backend_stats {
	u64 chosen;
};

#endif
