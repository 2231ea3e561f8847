/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* This is what programs remember of packets: conntrack and fragments. See types.h. */
#ifndef EBPFPROXY_FLOW_TYPES_H
#define EBPFPROXY_FLOW_TYPES_H

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
#define NAT_BOUND  (1 << 5) /* with NAT_HOST: the client is bound to the loopback device */
#define NAT_DSR	   (1 << 6) /* replies do not pass this node, see lib/dsr.h; NAT_BYPASS, too */
/* The option of DSR had the frontend: the original direction comes in translated. */
#define NAT_DSR_BACKEND (1 << 7)
/* Without NAT_HOST it says that replies may need the frontend's route: see reroute(). */
#define NAT_ROUTED NAT_BOUND

/*
 * nat.seen; UDP and SCTP use only the first. Both entries of a pair have the bits that end a
 * connection.
 */
#define SEEN_REPLY     (1 << 0)
#define SEEN_FIN       (1 << 1) /* of the client */
#define SEEN_REPLY_FIN (1 << 2)
#define SEEN_RST       (1 << 3)
/* These are about the flow; the rest is about this entry alone. */
#define FLOW_SEEN    (SEEN_REPLY | SEEN_FIN | SEEN_REPLY_FIN | SEEN_RST)
#define SEEN_CLAIMED (1 << 4) /* a CPU replaces or deletes the entry just now */
/* A sweep has found it claimed. Sweeps take turns with two marks: see filter.h. */
#define SEEN_LEFT_1 (1 << 5)
#define SEEN_LEFT_2 (1 << 6)
#define SEEN_MASKED (1 << 7) /* the flow has a masquerade, with entries of its own */

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

/* A flow and its entry: see lib/flow_cache.h. nat.last is the time until which that is good. */
struct flow_slot {
	struct flow flow;
	struct nat nat;
	u64 sum; /* of all but the sequence numbers */
};

/*
 * Where XDP sends the packets of a flow that is in the slot with the same number: see
 * lib/hop_cache.h.
 */
struct flow_hop {
	u64 sum;   /* of the rest, and of the slot */
	u64 until; /* CLOCK_MONOTONIC, ns */
	u32 in;	   /* ifindex of the devices */
	u32 out;
	u8 dst[6]; /* of the frames that leave */
	u8 src[6];
	u8 link_address[6]; /* of the device by which they come in */
	u16 mtu;
	u32 sends_back;
	u64 reserved[2]; /* one line of a CPU's cache each */
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
	u32 left;	/* entries of such flows that stay until the next sweep */
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

#endif
