/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Measurements of connections: how long they take to be established, for each Service, those that
 * fail, for each backend (MEASURE_CONNECTIONS), and bytes and packets for each Service
 * (MEASURE_TRAFFIC). Without these options the verifier removes all of this.
 *
 * sock_ops.c measures connections of sockets, conntrack.h those of packets. A Service takes memory
 * once there is something to be counted.
 */
#ifndef EBPFPROXY_MEASURE_H
#define EBPFPROXY_MEASURE_H

#include "branchless.h"
#include "maps.h"
#include "options.h"
#include "types.h"

/* About a millisecond. */
#define MEASURE_SHIFT 20

/* Returns a moment of now that fits into 32 bits for weeks. It is not 0. */
static __always_inline u32 measure_now(void)
{
	const u32 now = (u32)(bpf_ktime_get_coarse_ns() >> MEASURE_SHIFT);

	return now ? now : 1;
}

static __always_inline u64 measure_since_us(u32 moment)
{
	const u32 passed = measure_now() - moment;

	return ((u64)passed << MEASURE_SHIFT) / 1000;
}

/* Returns what is counted for a Service. */
static __always_inline struct connects *connects_of(u32 service_id)
{
	struct connects *found = map_lookup(connects, &service_id), *none;
	u32 others = NOBODY, zero = 0;

	if (found)
		return found;
	/* It is too large for the stack of some programs. */
	none = map_lookup(no_connects, &zero);
	if (!none)
		return NULL;
	bpf_map_update_elem(MAP(connects), &service_id, none, BPF_NOEXIST);
	found = map_lookup(connects, &service_id);
	return found ? found : map_lookup(connects, &others);
}

/* Counts a connection that was established after @us microseconds. */
static __always_inline void measure_connect(u32 service_id, u64 us)
{
	struct connects *found = connects_of(service_id);
	u64 bucket = 0;

	if (!found)
		return;
#pragma clang loop unroll(full)
	for (int i = 0; i < CONNECT_BUCKETS - 1; i++)
		bucket += is_less((u64)FIRST_CONNECT_BUCKET_US << i, us);
	barrier_var(bucket);
	if (bucket >= CONNECT_BUCKETS)
		return;
	__sync_fetch_and_add(&found->times[bucket], 1);
	__sync_fetch_and_add(&found->microseconds, us);
}

static __always_inline struct connect_failures *failures_of(u32 service_id, u32 backend_id)
{
	const struct failure_key key = { service_id, backend_id }, others = { NOBODY, NOBODY };
	struct connect_failures *found = map_lookup(connect_failures, &key), none = {};

	if (found)
		return found;
	bpf_map_update_elem(MAP(connect_failures), (void *)&key, &none, BPF_NOEXIST);
	found = map_lookup(connect_failures, &key);
	return found ? found : map_lookup(connect_failures, &others);
}

/* Counts a connection that was not established. */
static __always_inline void measure_failure(u32 service_id, u32 backend_id,
					    enum connect_failure why)
{
	/* At its own node nobody knows which backend a flow has been given to (dsr.h). */
	struct connect_failures *of_backend =
		DSR_ACCEPTS && backend_id == NOBODY ? NULL : failures_of(service_id, backend_id);
	struct connects *of_service = connects_of(service_id);

	if (of_backend)
		__sync_fetch_and_add(&of_backend->failures[why], 1);
	if (of_service)
		__sync_fetch_and_add(&of_service->failures[why], 1);
}

static __always_inline struct traffic *traffic_of(u32 service_id)
{
	struct traffic *found = map_lookup(service_traffic, &service_id), none = {};
	u32 others = NOBODY;

	if (found)
		return found;
	bpf_map_update_elem(MAP(service_traffic), &service_id, &none, BPF_NOEXIST);
	found = map_lookup(service_traffic, &service_id);
	return found ? found : map_lookup(service_traffic, &others);
}

/*
 * Adds what went in one @direction: from clients to a Service's backends (0), or back (1). Programs
 * of sockets can be preempted by those of packets, which then add to the same.
 */
static __always_inline void measure_traffic(u32 service_id, u64 direction, u64 bytes, u64 packets)
{
	struct traffic *found = traffic_of(service_id);

	if (!found)
		return;
	direction &= 1;
	barrier_var(direction);
	if (direction > 1)
		return;
	__sync_fetch_and_add(&found->bytes[direction], bytes);
	__sync_fetch_and_add(&found->packets[direction], packets);
}

#endif
