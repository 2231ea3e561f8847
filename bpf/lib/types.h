/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The structs in maps. ebpfproxy/datapath/abi/ describes the same bytes to the agent; a change to
 * either needs a new schema version there.
 *
 * Addresses and ports are in network byte order, everything else in host order. An address of
 * either family has 16 bytes: IPv4 is written as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2). Only the
 * frontend tables, whose keys decide the speed, exist twice.
 */
#ifndef EBPFPROXY_TYPES_H
#define EBPFPROXY_TYPES_H

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

struct inet_addr {
	__be32 word[4];
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
 * Programs count up. What they cannot know (a flow that ended without a packet, sockets carried
 * over from other maps) is in the words that only the agent writes. Words of 32 bits wrap.
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

/* A frontend that a socket asked for, and the backend that it got. */
struct peer {
	struct inet_addr frontend;
	struct inet_addr backend;
	__be16 frontend_port; /* 0: a free place */
	__be16 backend_port;
	u32 service_id;
	u32 backend_id;
	u32 epoch; /* as in struct nat; of datagram sockets that are not connected */
};

/*
 * The highest byte of an origin's key. Cookies are counted from 1; a few are counted down from
 * 2^64, where one is made while another is on the same CPU: their highest byte is left out. A key
 * of 0 is a free slot.
 */
#define ORIGIN_KIND_SHIFT 56

enum origin_kind {
	ORIGIN_RESERVED = 1,	/* the socket's program is about to write it */
	ORIGIN_CONNECTED = 2,	/* what the socket has connected to */
	ORIGIN_UNCONNECTED = 3, /* the first frontend that an unconnected socket has sent to */
};

/*
 * sock_origin, an array: a socket's slot is the one at the lower bits of its cookie. It is one
 * cache line, and is taken and freed by a compare-and-swap of its key. Where another socket has the
 * slot, a connected socket's origin goes to the hash sock_origin_overflow, by cookie.
 */
struct origin {
	u64 key; /* cookie, and origin_kind */
	struct peer peer;
	u32 netns; /* the lower half of the network namespace's cookie, which is counted from 1 */
	/* Records of sockets with this slot in other maps: origins, and sockets that have pages. */
	u32 elsewhere;
};

#define PEERS	   4
#define PEER_PAGES 8

/*
 * sock_peers, by socket cookie: what an unconnected socket has sent to after its first frontend. A
 * socket with more frontends than fit has further pages; a page's number is in the key's highest
 * byte.
 */
struct peers {
	struct peer peer[PEERS];
	u32 next;  /* of the last page: whose place is taken when there is none left */
	u32 netns; /* as in struct origin */
};

/*
 * port_clashes: flows that a socket leaves to packets because it uses its port and the only backend
 * for another frontend already. They have to take another port.
 */
struct clash_key {
	struct inet_addr frontend;
	__be16 frontend_port;
	__be16 client_port;
	u32 reserved;
};

/*
 * sock_redirects, by the flow of a connected datagram socket at ingress: its backend is gone, and
 * its packets go to the frontend again. The socket cannot be reconnected from outside, and without
 * a peer it could not send any more.
 */
struct redirect {
	struct inet_addr frontend;
	__be16 frontend_port;
	u16 reserved[3];
	u64 cookie;
};

/*
 * service_choices has so many rows, each with a u64 for every service id. Neighbouring CPUs share a
 * row: a Service that every CPU uses all the time would else have one cache line that wanders
 * between all of them. A row for each CPU would take 64 MB on a machine with 128 of them.
 */
#define CHOICE_ROWS 16

/* service_rejections, by service id. */
struct rejections {
	u64 refused;
	u64 dropped;
};

/* The hook where a packet is seen: before this host's netfilter and routing, or after them. */
enum stage {
	STAGE_INGRESS = 0,
	STAGE_EGRESS = 1,
};

/* One direction of a TCP, UDP or SCTP exchange, as a packet shows it. */
struct flow {
	struct inet_addr src;
	struct inet_addr dst;
	__be16 sport;
	__be16 dport;
	u8 proto;
	u8 stage;
	u16 pad;
} __attribute__((aligned(8)));

/* nat.flags */
#define NAT_REPLY  (1 << 0) /* the reply direction; the partner is of the original one */
#define NAT_SOURCE (1 << 1) /* translates the client (masquerade), not the Service */
#define NAT_HOST   (1 << 2) /* this host is the client: sent to the backend's own route */
#define NAT_BYPASS (1 << 3) /* forwarded from the hook itself, past netfilter: XDP or tc */
#define NAT_OWN	   (1 << 4) /* of no Service: nothing is translated */
#define NAT_BOUND  (1 << 5) /* the client, of this host, is bound to the loopback device */

/*
 * nat.seen; UDP and SCTP use only the first. Both entries of a pair have the bits that end a
 * connection.
 */
#define SEEN_REPLY     (1 << 0)
#define SEEN_FIN       (1 << 1) /* of the client */
#define SEEN_REPLY_FIN (1 << 2)
#define SEEN_RST       (1 << 3)

/*
 * Conntrack: what a flow is rewritten to. Entries come in pairs, one for each direction: the
 * partner's key is the reverse of what this entry writes, at the other stage, and the partner
 * writes the reverse of this entry's key. See lib/conntrack.h.
 */
struct nat {
	struct inet_addr src;
	struct inet_addr dst;
	__be16 sport;
	__be16 dport;
	u32 service_id;
	union {
		struct {
			u32 backend_id;
			u8 flags;
			u8 seen;   /* written by any CPU: see mark_seen() */
			u16 epoch; /* of the service when its backend was last found to be one of
				      its own */
		};
		u64 marks; /* clang's atomic instructions want 64 bits */
	};
	u64 last; /* CLOCK_MONOTONIC, ns: to a second */
	u64 created;
	/* TCP sequence numbers of this direction, in host order; both 0 where they are unknown. */
	u32 end;   /* where its data ends, as far as it was seen */
	u32 acked; /* what it has acknowledged of the other's; 0: nothing */
	u64 check; /* of the key and of what an entry never changes: see conntrack_read() */
};

/* The agent and sweep.c share this. One sweep runs at a time. */
struct sweep {
	u64 now;	 /* CLOCK_MONOTONIC, ns */
	u64 limits[128]; /* ns without a packet: by protocol, nat.seen, and if it lasted a second */
	u32 next;	 /* run of so many */
	u32 count;
	u32 mark; /* in flow_filter */
	u32 kept; /* entries */
	u32 deleted;
	u32 removed[2]; /* flows ended because their backend was removed: IPv4, IPv6 */
	u32 reserved;
	/* The rest is the program's memory. */
	struct flow key;
	struct flow partner_key;
	struct flow other_key;
	struct nat nat;
	struct nat partner;
};

/*
 * departures: backends that have left a Service a moment ago. Each departure also advances the
 * Service's number in epochs, so that a flow looks here only after one. The agent deletes the
 * entries once a sweep has ended the flows that they are about.
 */
struct departure_key {
	u32 service_id;
	u32 backend_id;
};

enum departure {
	DEPARTED_GONE = 1,   /* the endpoint is not there any more */
	DEPARTED_IDLE = 2,   /* it is, but not ready; or the Service is gone: connections go on */
	DEPARTED_ABSENT = 3, /* it was removed just now and may come back: connections wait */
};

/* The ports of a datagram whose first fragment has passed. IPv4's id has 16 bits, IPv6's 32. */
struct fragment_key {
	struct inet_addr src;
	struct inet_addr dst;
	__be32 id;
	u8 proto;
	u8 stage;
	u16 pad;
};

struct ports {
	__be16 sport;
	__be16 dport;
};

/*
 * Datagrams of several senders may get one source, where their own ids could collide: each datagram
 * gets a new id, the same for all its fragments.
 */
struct fragment {
	struct ports ports;
	__be32 new_id; /* as a header has it; IPv4's are the first two bytes */
};

/* devices, by ifindex: what masquerading to a device uses, and what is behind it. */
#define DEVICE_PODS  (1 << 0) /* as detectLocalMode says */
#define DEVICE_LOCAL (1 << 1) /* no uplink and no tunnel */

/* Flags of entry 0, which is no device but the node. */
#define HANDOVER_MODE (1 << 2) /* TCP connections that began elsewhere are netfilter's */
#define NO_NEW_FLOWS  (1 << 3) /* no flow begins here: known ones are followed */

/*
 * Packets pass a bridge in addition to its ports, and a macvlan in addition to the device below it
 * when they leave. What may be done only once to a packet is done at the device below.
 */
#define DEVICE_INGRESS_BELOW (1 << 4) /* our program below has seen what comes in */
#define DEVICE_EGRESS_BELOW  (1 << 5) /* our program below will see what leaves */

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

/* This id belongs to no Service and no backend. */
#define NOBODY 0xffffffffU

/* decision.kind. Those up to AFFINITY_HIT are of connections that go well. */
enum decision_kind {
	DECISION_CHOSEN = 0,
	DECISION_AFFINITY_HIT = 1, /* the client keeps its backend */
	DECISION_REFUSED = 2,
	DECISION_DROPPED = 3,
	DECISION_MASQUERADE_FAILED = 4,
	DECISION_BACKEND_LEFT = 5,	 /* a flow or socket has lost its backend */
	DECISION_STALE_SOCKET_ENDED = 6, /* by the agent */
	DECISION_BIND_REFUSED = 7,
};

/* decision.place, in the upper half: where it was made. */
enum decision_place {
	PLACE_SOCKET = 0,
	PLACE_INGRESS = 1,
	PLACE_EGRESS = 2,
	PLACE_AGENT = 3, /* the sweep of conntrack, or of sockets */
};

/* tracing.programs: which are attached, as the agent says. */
enum tracing_programs {
	TRACING_PLAIN = 0,
	TRACING_REPORTING = 1,
	TRACING_FAILED = 2,
};

/* One choice, or one refusal, for who traces (lib/decision.h). Unused fields are 0. */
struct decision {
	u64 time; /* CLOCK_MONOTONIC, ns: to a tick */
	struct inet_addr frontend;
	u32 service_id; /* NOBODY: of no Service */
	u32 backend_id; /* NOBODY: there is none */
	__be16 frontend_port;
	u16 candidates; /* backends' slots; as many as fit */
	u8 kind;
	u8 reason; /* enum event */
	u8 proto;
	u8 place; /* enum decision_place << 4, and enum algorithm */
	union {
		struct {
			u64 cgroup;
			u64 cookie;
			u32 netns; /* the lower half of the network namespace's cookie */
			u32 pid;
			char comm[16];
		} task; /* of a socket */
		struct {
			struct inet_addr addr;
			__be16 port;
			u16 reserved;
			u32 ifindex;
			u64 unused[2];
		} sender; /* of a packet */
	};
};

/*
 * tracing: what a command wants to see. The agent has programs attached that report decisions while
 * a command holds its lease; programs report none once that is over.
 */
struct tracing {
	u64 until;	/* CLOCK_MONOTONIC, ns */
	u64 interval;	/* ns from one decision to the next, on each CPU */
	u64 burst;	/* ns of an interval that may be saved up */
	u32 kinds;	/* a bit for each */
	u32 one_in;	/* of those that go well, one in so many */
	u32 by_service; /* only of traced_services, and of no Service */
	u32 by_client;
	struct inet_addr client[2]; /* of packets */
	u32 netns;		    /* of sockets, as in struct decision */
	u32 programs;		    /* enum tracing_programs, written by the agent */
};

/* decision_state: what a CPU knows of the decisions that it reports. */
struct decision_state {
	u64 due;     /* when the next decision is due, of those that come one by one */
	u64 limited; /* decisions that were not reported: too many at once */
	u64 full;    /* the same: nobody has read the others */
	/* The task of the last one, as it was known then: see decision_task(). */
	u64 sequence; /* odd while the rest is written */
	u64 known;    /* CLOCK_MONOTONIC, ns */
	u64 task;     /* its process, and its thread */
	u64 cgroup;
	char comm[16];
};

#endif
