/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The limit of ICMP errors that reject packets: a token bucket of this node, as large as the
 * kernel's for its own ICMP errors (net.ipv4.icmp_msgs_per_sec, net.ipv4.icmp_msgs_burst). It is
 * one for all CPUs, so that the rate does not depend on how many there are. Only rejected packets
 * come here, and CPUs that find the bucket empty do not write to it.
 *
 * Errors that tell of a smaller MTU are not limited, nor what leaves by the loopback device, as in
 * the kernel; TCP resets are not, as with netfilter's REJECT. The kernel takes up to two
 * tokens by chance, so that nobody can tell from them which ports of it are open (CVE-2020-25705).
 * What is rejected here is no secret: it depends on Services, not on sockets.
 */
#ifndef EBPFPROXY_ICMP_LIMIT_H
#define EBPFPROXY_ICMP_LIMIT_H

#include "compat.h"
#include "maps.h"

#define ICMP_INTERVAL NSEC_PER_MSEC /* ns from one token to the next: 1000 a second */
#define ICMP_BURST    50
/* Another CPU may be faster this many times. */
#define ICMP_TRIES 4

/*
 * Takes a token; returns false where there is none. The bucket is the time until which tokens have
 * been taken, never more than a burst ago.
 */
static __always_inline bool icmp_take_token(void)
{
	const u64 now = bpf_ktime_get_coarse_ns();
	u64 *bucket = map_value(icmp_bucket);

#pragma clang loop unroll(disable)
	for (int i = 0; i < ICMP_TRIES; i++) {
		const u64 taken = *(volatile u64 *)bucket;
		u64 until = taken;

		if ((s64)(now - taken) > (s64)(ICMP_BURST * ICMP_INTERVAL))
			until = now - ICMP_BURST * ICMP_INTERVAL;
		if ((s64)(now - until) < (s64)ICMP_INTERVAL)
			return false;
		if (__sync_val_compare_and_swap(bucket, taken, until + ICMP_INTERVAL) == taken)
			return true;
	}
	return false;
}

#endif
