/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is known of a flow whose replies do not pass this node (NAT_DSR, see dsr.h). Its original
 * direction has to tell all.
 */
#ifndef EBPFPROXY_DSR_STATE_H
#define EBPFPROXY_DSR_STATE_H

#include "entry.h"
#include "options.h"
#include "packet.h"
#include "tcp_state.h"

/* Says if an entry is of the original direction of such a flow. */
static __always_inline bool is_dsr_original(const struct nat *nat)
{
	return (nat->flags & (NAT_DSR | NAT_REPLY)) == NAT_DSR;
}

/*
 * Says if a packet needs the option with the frontend: each SYN, each datagram of a flow's
 * first second, and then one in a second, so that a node that has lost its entry gets it back.
 * @nat is the entry as it was before the packet.
 */
static __always_inline bool needs_dsr_option(const struct packet *p, const struct nat *nat, u64 now)
{
	if (!is_dsr_original(nat))
		return false;
	if (p->proto == IPPROTO_TCP)
		return p->tcp_flags & TCP_SYN;
	return (s64)(now - nat->created) < (s64)NSEC_PER_SEC ||
	       (s64)(now - nat->last) > (s64)NSEC_PER_SEC;
}

/* Says if a segment acknowledges what the backend has sent, as no other packet shows here. */
static __always_inline bool is_dsr_confirmation(const struct packet *p, const struct nat *nat)
{
	return is_dsr_original(nat) && !(nat->seen & SEEN_REPLY) &&
	       (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_ACK;
}

/*
 * Returns what is taken for seen of both directions: nothing shows the backend's FIN, so the
 * client's closes the flow. What follows is still forwarded.
 */
static __always_inline u8 dsr_seen(const struct nat *nat, u8 seen)
{
	return is_dsr_original(nat) && seen & SEEN_FIN ? seen | SEEN_REPLY_FIN : seen;
}

/* Says if a RST or FIN is near the end of what the client has sent: there are no other numbers. */
static __always_inline bool is_near_end(const struct packet *p, const struct nat *nat)
{
	return !nat->end || nat->end - p->seq + TCP_WINDOW <= 2 * TCP_WINDOW;
}

#endif
