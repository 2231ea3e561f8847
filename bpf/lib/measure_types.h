/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What is measured of connections: see measure.h and types.h. */
#ifndef EBPFPROXY_MEASURE_TYPES_H
#define EBPFPROXY_MEASURE_TYPES_H

enum connect_failure {
	FAILURE_RESET = 0,     /* refused by a RST */
	FAILURE_TIMEOUT = 1,   /* no answer, or an ICMP error that says why there is none */
	FAILURE_ABANDONED = 2, /* the client closed its socket before there was an answer */
	CONNECT_FAILURES = 3,
};

/*
 * connects, by service id: how long its connections took to be established, and how many were not.
 * The first bucket has those of up to 64 us, each one after it those of up to twice as long, the
 * last one all others. A Service that does not fit into the map is counted with NOBODY's.
 * no_connects has zeros.
 */
#define CONNECT_BUCKETS		19
#define FIRST_CONNECT_BUCKET_US 64

struct connects {
	u64 microseconds; /* of all together */
	u64 times[CONNECT_BUCKETS];
	u64 failures[CONNECT_FAILURES];
};

/* connect_failures, by Service and backend: failures only. NOBODY's are those that do not fit. */
struct failure_key {
	u32 service_id;
	u32 backend_id;
};

struct connect_failures {
	u64 failures[CONNECT_FAILURES];
};

/* service_traffic, by service id, of each CPU: from clients, and to them. As in struct connects. */
struct traffic {
	u64 bytes[2];
	u64 packets[2];
};

#endif
