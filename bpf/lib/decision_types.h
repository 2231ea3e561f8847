/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Decisions for who traces, and what is traced. See types.h. */
#ifndef EBPFPROXY_DECISION_TYPES_H
#define EBPFPROXY_DECISION_TYPES_H

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

/* decision.place: these lower bits are the algorithm. */
#define BITS_OF_ALGORITHM 4

/* decision.place, above them: where it was made. */
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
	u8 place; /* enum decision_place, and enum algorithm in the lower bits */
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
