/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Measurements of flows, from their packets. lib/measure.h has where they are counted. */
#ifndef EBPFPROXY_MEASURE_PACKET_H
#define EBPFPROXY_MEASURE_PACKET_H

#include "conntrack.h"
#include "measure.h"

/*
 * Measures how long a TCP flow took to be established, or counts that it was not, from the first
 * packet of its reply direction. It is called where little is left to be verified.
 */
static __always_inline void measure_packet(const struct packet *p)
{
	const u8 tcp_flags = p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST);
	const struct scratch *s = scratch_of(p);
	const struct nat *nat = &s->entry;

	if (!MEASURE_CONNECTIONS || !s->is_first_reply || nat->flags & NAT_SOURCE)
		return;
	if (tcp_flags == (TCP_SYN | TCP_ACK))
		measure_connect(nat->service_id, (bpf_ktime_get_ns() - nat->created) / 1000);
	else if (tcp_flags & TCP_RST && !nat->end)
		measure_failure(nat->service_id, nat->backend_id, FAILURE_RESET);
}

/*
 * Counts a packet that was translated, for its Service; a masquerade's translation is another.
 * @segments is 0 where the packet is not one that the kernel made of several.
 */
static __always_inline void measure_size(const struct packet *p, u64 bytes, u64 segments)
{
	const struct nat *nat = &scratch_of(p)->entry;

	if (!(nat->flags & NAT_SOURCE))
		measure_traffic(nat->service_id, nat->flags & NAT_REPLY, bytes,
				segments + !segments);
}

/*
 * Measures a packet that has been translated; what is dropped then is no traffic. The verifier
 * forgets the verdict, which it reads back from a map: so it walks through this once, and not once
 * for each verdict.
 */
static __always_inline int measure_translated(struct __sk_buff *skb, const struct packet *p,
					      int verdict)
{
	volatile int *kept = &scratch_of(p)->verdict;
	u32 length = skb->len - L3_OFFSET, segments = skb->gso_segs;

	*kept = verdict;
	measure_packet(p);
	if (MEASURE_TRAFFIC && *kept < DROPPING) {
		/* clang would otherwise read either length with one instruction. */
		barrier_var(length);
		/* A short frame has padding. IP's header of several segments may have no length. */
		if (!segments)
			length = p->l3_length;
		measure_size(p, length, segments);
	}
	return *kept;
}

#endif
