/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Flows that have timed out: the agent's sweep ends them (sweep.c). Until then, which may be long
 * while no agent runs, another flow may get the port of one (early_drop.h).
 */
#ifndef EBPFPROXY_TIMEOUT_H
#define EBPFPROXY_TIMEOUT_H

#include "branchless.h"
#include "conntrack.h"

/* A row of sweep.limits for each. */
enum timeouts {
	TIMEOUTS_TCP,
	TIMEOUTS_UDP,
	TIMEOUTS_SCTP,
	TIMEOUTS_OTHER,
};

/* It has no branch, as the verifier would walk on from each row. */
static __always_inline u32 timeouts_of(u8 proto)
{
	const u64 is_tcp = is_zero(proto ^ IPPROTO_TCP), is_sctp = is_zero(proto ^ IPPROTO_SCTP);
	const u64 is_udp = is_zero(proto ^ IPPROTO_UDP) | is_zero(proto ^ IPPROTO_UDPLITE);

	return TIMEOUTS_OTHER - (TIMEOUTS_OTHER - TIMEOUTS_TCP) * is_tcp -
	       (TIMEOUTS_OTHER - TIMEOUTS_UDP) * is_udp -
	       (TIMEOUTS_OTHER - TIMEOUTS_SCTP) * is_sctp;
}

/* Returns for how long a flow may be silent, ns. The agent sets it before it attaches programs. */
static __always_inline u64 timeout(const struct sweep *s, u32 row, u8 seen, u64 lasted)
{
	u32 at = row * 32 + (seen & 15) * 2 + lasted;

	barrier_var(at);
	return s->limits[at & 127];
}

/* Says if a flow has timed out, from the two entries of its pair. */
static __always_inline u64 is_over(const struct flow *flow, const struct nat *original,
				   const struct nat *reply, u32 row, u64 now)
{
	const u64 ahead = is_less(original->last, reply->last);
	const u64 last = select(ahead, reply->last, original->last);
	const u64 lasted = is_less(original->created + NSEC_PER_SEC - 1, last);
	const u64 answers = is_half_open(flow, original) * SEEN_REPLY;
	const u8 seen = (original->seen | reply->seen) & ~answers;
	const u64 limit = timeout(map_value(sweep), row, seen, lasted);

	return is_less(last + limit, now);
}

/*
 * Says if nothing is left at the backend of a connection that is closed, from the entry of its
 * reply direction. A RST leaves nothing. After a FIN of both sides there may be a socket in
 * TIME_WAIT, which answers another client's SYN with an ACK of the former connection. The client
 * resets that, and sends its SYN again: Linux does so at once since 5.6, others after a second.
 */
static __always_inline u64 is_past_time_wait(const struct nat *closed, u64 now)
{
	const u64 limit = timeout(map_value(sweep), TIMEOUTS_TCP, SEEN_FIN | SEEN_REPLY_FIN, 0);

	return (closed->seen / SEEN_RST & 1) | is_less(closed->last + limit, now);
}

#endif
