/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Memory of packet programs that is too large for the stack: the packet, and copies of what they
 * look up. It also keeps verification short: the verifier knows nothing of a value that it reads
 * back from a map, so paths that differ only in a packet's values become one. Programs at tc and
 * XDP run with bottom halves disabled: one at a time on a CPU, but for some kernels with
 * PREEMPT_RT, which the agent refuses (probe.py).
 */
#ifndef EBPFPROXY_SCRATCH_H
#define EBPFPROXY_SCRATCH_H

#include "algorithm.h"
#include "maps.h"
#include "options.h"
#include "packet.h"

/* At most this much of a rejected packet is quoted. */
#define QUOTED 128

/* This follows the IP header of the reply to a rejected packet: see reject.h. */
struct reply {
	u8 bytes[sizeof(struct icmp_header) + QUOTED]; /* zeros behind @size */
	u32 size;
	u32 check_at;
	u32 proto;
};

struct scratch {
	struct packet packet;
	struct flow key;
	struct nat nat;
	struct nat other; /* a copy of an entry that is not the packet's */
	struct service service;
	struct client client;
	u8 client_location; /* enum client_location in device.h */
	u8 has_rules;	    /* this node routes by sources, too */
	u16 mtu;	    /* of the device by which the packet came in */
	u32 is_known;	    /* see insert_source() */
	struct {
		u32 service_id;
		u32 backend_id;
		u32 left_service_id;
		u32 left_backend_id;
		u8 has_decision;
		u8 kind;
		u8 reason;
		u8 has_left;
	} noted;	    /* see decision_packet.h */
	u32 failed;	    /* enum insert: see insert_anyway() */
	u32 is_first_reply; /* see measure_packet() */
	int verdict;	    /* see measure_translated() */
	struct {
		struct inet_addr addr;
		__be16 port;
		u16 has_option;
	} dsr;	       /* see receive_dsr() */
	u32 has_entry; /* the packet's flow has @entry: see conntrack_of() */
	u64 tick;      /* see coarse_now() */
	u64 now;
	union {
		struct {
			struct nat entry; /* a copy of the packet's: what it becomes */
			union {
				struct {
					struct inet_addr node; /* its source at the backend */
					u32 is_masked;
					u32 is_fresh;	 /* it gets a port of ours */
					u32 ends4[3];	 /* of a socket: see is_of_own_socket() */
					u32 closed_port; /* see find_port() */
					u32 has_own_port;
				} begun; /* see create_flow() */
				struct {
					struct flow original;
					struct flow reply;
					struct flow service;
					u64 last;
					__be16 port;
				} unconfirmed; /* see early_drop.h */
			};
		};
		struct reply reply;
	};
};

_Static_assert(sizeof(struct scratch) <= 688, "SCRATCH_SIZE in schema.py");

static __always_inline struct scratch *scratch(void)
{
	u32 zero = 0;

	return map_at(scratch, zero);
}

/*
 * Returns CLOCK_MONOTONIC as of the last tick, in ns, as bpf_ktime_get_coarse_ns() does. The
 * verifier makes a load of bpf_jiffies64(): a call of a helper takes longer than most of what a
 * packet needs. Another CPU may be a tick ahead.
 */
static __always_inline u64 coarse_now(struct scratch *s)
{
	const u64 tick = bpf_jiffies64();

	if (s->tick != tick) {
		s->tick = tick;
		s->now = bpf_ktime_get_coarse_ns();
	}
	return s->now;
}

/* Returns this CPU's packet, prepared for @stage. */
static __always_inline struct packet *packet_of(enum stage stage)
{
	struct scratch *s = scratch();

	if (!s)
		return NULL;
	s->packet.flow.stage = stage;
	s->packet.flow.pad = 0;
	s->has_entry = false;
	if (TRACE_DECISIONS)
		s->noted.has_decision = s->noted.has_left = false;
	if (MEASURE_CONNECTIONS)
		s->is_first_reply = false;
	return &s->packet;
}

/* Returns the scratch memory that @p is part of. */
static __always_inline struct scratch *scratch_of(const struct packet *p)
{
	_Static_assert(!offsetof(struct scratch, packet), "packet comes first");
	return (struct scratch *)p;
}

#endif
