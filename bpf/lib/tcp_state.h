/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sequence numbers of a TCP flow: each entry of its pair keeps the end of what its direction
 * has sent, and what it has acknowledged. They tell whether a RST or FIN ends the flow, and whether
 * its client has ever acknowledged anything.
 */
#ifndef EBPFPROXY_TCP_STATE_H
#define EBPFPROXY_TCP_STATE_H

#include "branchless.h"
#include "packet.h"

/*
 * This is more than any window that receivers offer in practice, and 1/256 of the sequence space.
 */
#define TCP_WINDOW (1U << 24)

/*
 * Says if the receiver of a RST or FIN accepts it, as far as the two entries tell. A stray or
 * forged one passes but ends nothing. A RST counts from what the receiver expects next to the end
 * of the sender's data: elsewhere in the window the receiver sends a challenge ACK (RFC 5961, 3.2),
 * which the peer answers with a RST that fits. Netfilter is stricter.
 */
static __always_inline bool is_believable(const struct packet *p, const struct nat *nat,
					  const struct nat *partner)
{
	const u32 ahead = p->seq - partner->acked, sent = nat->end - partner->acked;

	if (!partner->end && !partner->acked)
		return true;
	/* A retransmitted FIN may begin with data that has been acknowledged. */
	if (!(p->tcp_flags & TCP_RST))
		return !partner->acked || p->seq_end - partner->acked - 1 < TCP_WINDOW;
	/*
	 * A RST in reply to a SYN identifies itself by what it acknowledges (RFC 9293, 3.10.7.3).
	 */
	if (!partner->acked)
		return p->tcp_flags & TCP_ACK && p->ack == partner->end;
	return !ahead || (sent <= TCP_WINDOW && ahead <= sent);
}

/*
 * Says if a client has not acknowledged what the backend has answered to its SYN (netfilter:
 * SYN_RECV), from the entry of the original direction. There may be no such client: a flood comes
 * from forged addresses. A SYN that is late, or forged, makes none of a connection that is open:
 * see conntrack_track().
 */
static __always_inline u64 is_half_open(const struct flow *flow, const struct nat *original)
{
	return is_zero(flow->proto ^ IPPROTO_TCP) & is_zero(original->acked) &
	       is_zero(original->seen & SEEN_REPLY);
}

/* Returns the later of two sequence numbers. One that is far away belongs to a new connection. */
static __always_inline u32 later_sequence(u32 known, u32 seen)
{
	return known && known - seen <= TCP_WINDOW ? known : seen;
}

/*
 * Records a segment's sequence numbers in @nat, of which @known is a copy. Most segments change one
 * of them, retransmissions none.
 */
static __always_inline void note_sequence(const struct packet *p, struct nat *nat,
					  const struct nat *known)
{
	u32 end = p->seq_end, acked = p->tcp_flags & TCP_ACK ? p->ack : 0;

	if (!(p->tcp_flags & TCP_SYN)) {
		end = later_sequence(known->end, end);
		acked = acked ? later_sequence(known->acked, acked) : known->acked;
	} else if (!acked && known->end == end) {
		/* The SYN is late or sent again: what was acknowledged since then still is. */
		acked = known->acked;
	}
	if (known->end != end)
		nat->end = end;
	if (known->acked != acked)
		nat->acked = acked;
}

/*
 * Returns what a packet of an entry with these flags says about the end of its flow. Branches would
 * have the verifier walk through the rest for each answer.
 */
static __always_inline u8 ended_by(u8 tcp_flags, u8 flags)
{
	_Static_assert(NAT_REPLY == 1, "a reply's FIN is one shift away");
	const u8 resets = tcp_flags / TCP_RST & 1, finishes = tcp_flags / TCP_FIN & ~resets & 1;

	return resets * SEEN_RST | (finishes * SEEN_FIN) << (flags & NAT_REPLY);
}

#endif
