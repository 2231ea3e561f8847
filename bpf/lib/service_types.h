/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Services and backends, as the agent writes them. See types.h. */
#ifndef EBPFPROXY_SERVICE_TYPES_H
#define EBPFPROXY_SERVICE_TYPES_H

/* A client is in the cluster (this node's pods and the node itself), or outside. */
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
#define SERVICE_SOURCES	   (1 << 2) /* only sources in source_ranges: the packet path decides */
#define SERVICE_ADDRESS	   (1 << 3) /* no Service, but a cluster IP: its other ports are rejected */
#define SERVICE_OWN	   (1 << 4) /* the node itself answers there: not to be translated */
#define SERVICE_HOST	   (1 << 5) /* source_ranges have the address by which this node asks */

/*
 * service.algorithm: how a slot is chosen, with IPVS's name in brackets. A backend's weight is the
 * number of its slots; for algorithms that compare loads it has one slot, which holds the weight.
 */
enum algorithm {
	ALGORITHM_RANDOM = 0,
	ALGORITHM_ROUND_ROBIN = 1,	 /* [rr, wrr] */
	ALGORITHM_LEAST_CONNECTIONS = 2, /* [lc, wlc] */
	ALGORITHM_SHORTEST_DELAY = 3,	 /* [sed] */
	ALGORITHM_NEVER_QUEUE = 4,	 /* [nq] */
	ALGORITHM_DESTINATION_HASH = 5,	 /* [dh] */
	ALGORITHM_SOURCE_HASH = 6,	 /* [sh] */
	ALGORITHM_MAGLEV = 7,		 /* [mh]: the slots are a Maglev table */
};

/* Index of random_state. */
enum random_sequence {
	RANDOM_PACKETS = 0,
	RANDOM_SOCKETS = 1,
	RANDOM_SEQUENCES = 2,
};

/* service.kind */
enum frontend_kind {
	KIND_CLUSTER_IP = 0,
	KIND_EXTERNAL_IP = 1,
	KIND_LOAD_BALANCER = 2,
	KIND_NODE_PORT = 3,
};

/* backend.state */
enum backend_state {
	BACKEND_ACTIVE = 0,
	BACKEND_TERMINATING = 1,
	BACKEND_QUARANTINED = 2, /* not ready: keeps connections, not UDP flows */
	BACKEND_DRAINED = 3,	 /* by hand or by weight 0: keeps what it has */
	BACKEND_GONE = 4,	 /* no endpoint any more, but something is still open to it */
};

/*
 * The address of a NodePort is 0, which stands for every address in node_addresses. Port and
 * protocol 0 stand for every port that a cluster IP has no entry for (SERVICE_ADDRESS).
 */
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

/* A frontend. The agent writes it when the Service changes, never when only endpoints do. */
struct service {
	u32 id;
	u16 flags;
	u8 kind;
	u8 algorithm;
	u32 affinity_seconds; /* 0: none */
	u32 reserved;
};

/* The same as words. */
union service_words {
	struct service service;
	struct {
		u64 first;
		u64 second;
	};
};

/* frontend_cache: a frontend that was looked up; see lib/frontend_cache.h. */
struct frontend_line {
	u64 upper; /* half of the address */
	u64 lower;
	u64 port;  /* protocol and scope, as in struct service6_key */
	u64 first; /* half of struct service */
	u64 second;
	u64 check;
	u64 range; /* union selection of its policy, or RANGE_OF_BACKENDS */
	u64 range_check;
};

/*
 * In the count of a range that is cached: it is not one of slots, but of backend ids. Where the
 * slots have successive ids, as those of endpoints that came together do, they need not be read.
 */
#define RANGE_OF_BACKENDS (1U << 31)
/* At most this many slots are compared for that. */
#define SUCCESSIVE_SLOTS 16

/* What cache_frontend() in records.c gets: as many as a packet has room for. */
#define FRONTENDS_READ 80

struct frontend_read {
	struct inet_addr addr;
	__be16 port;
	u8 proto;
	u8 scope;
	u32 reserved;
	union service_words words;
};

struct frontends_read {
	u64 generation;
	u32 next;
	u32 reserved;
	struct frontend_read frontends[];
};

/*
 * A bit of frontend_generation and range_generations: what these stand for is being changed.
 * Programs neither use nor cache any of it.
 */
#define GENERATION_CHANGING 1

/* A change of a Service's ranges makes those invalid that lines have of one in so many Services. */
#define RANGE_GENERATIONS 256

/*
 * The range of slots that a choice is made from, by service id * POLICIES + policy. It is one
 * aligned word, so that a reader sees the old range or the new one.
 */
union selection {
	struct {
		u32 base;
		u32 count;
	};
	u64 word;
};

/* A slot has 8 bytes: elements of an array are 8 bytes apart in any case. */
union slot {
	struct {
		u32 backend_id;
		u32 weight; /* where the algorithm looks at loads; else 0 */
	};
	u64 word;
};

/*
 * members: which backends are in the selection of a Service with session affinity, so that a client
 * keeps only a backend that a new client could get.
 */
struct member_key {
	u32 selection; /* index in selections */
	u32 backend_id;
};

/*
 * How a client is identified. A packet has its sender's address. A socket that connects may have
 * none yet: its client is the network namespace (its cookie, in the first two words). The host is
 * one client.
 */
enum client_kind {
	CLIENT_ADDRESS = 0,
	CLIENT_NAMESPACE = 1,
};

struct affinity_key {
	struct inet_addr client;
	u32 service_id;
	u32 kind;
};

struct affinity {
	u32 backend_id;
	u32 reserved;
	u64 last; /* choice; CLOCK_MONOTONIC, ns */
};

/* backend.flows_seen has this bit where the sweep has ended flows. */
#define FLOWS_ENDED (1U << 31)

/*
 * A backend, by its id, and what is counted for it: one cache line. A connection writes to it in
 * any case, since all CPUs have to know how many are open; so what was chosen is counted by the
 * same words. A datagram of an unconnected socket costs a CPU the line if another one has written
 * to it last, as the receiver's queue does.
 *
 * Programs count up. What they cannot know (flows that ended without a packet) is in the word that
 * only the agent writes. Agents of earlier versions wrote sockets_carried, too. Words of 32 bits
 * wrap.
 */
struct backend {
	struct inet_addr addr;
	__be16 port;
	u8 proto;
	u8 state;
	u32 sockets_closed;
	u64 sockets_opened; /* connected sockets that are on record */
	u64 flows_begun;
	u64 datagrams; /* of unconnected sockets, and connections of which there is no record */
	u32 sockets_carried;
	u32 flows_ended;
	u32 flows_corrected;
	u32 flows_seen; /* by the last sweep */
};

#endif
