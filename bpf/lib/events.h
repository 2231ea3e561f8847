/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Events: what happened to packets that neither simply passed nor were translated, by reason. */
#ifndef EBPFPROXY_EVENTS_H
#define EBPFPROXY_EVENTS_H

#include "maps.h"

/* Index of packet_events. datapath/abi/node_layout.py names them. */
enum event {
	EVENT_NO_ENDPOINT,	 /* rejected */
	EVENT_NO_SUCH_PORT,	 /* rejected */
	EVENT_BACKEND_GONE,	 /* rejected: of an established connection */
	EVENT_NO_LOCAL_ENDPOINT, /* dropped: policy Local, endpoints on other nodes only */
	EVENT_SOURCE_RANGE,	 /* dropped: loadBalancerSourceRanges */
	EVENT_NO_SUCH_SERVICE,	 /* dropped: in a Service CIDR */
	EVENT_FRAGMENT,		 /* dropped: its first fragment was not seen */
	EVENT_PORTS_TAKEN,	 /* dropped: no source port left for masquerading */
	EVENT_TABLE_FULL,	 /* dropped: no room for the flow */
	EVENT_UNROUTABLE,	 /* dropped: no route from this host to the backend */
	EVENT_HOPS,		 /* dropped: it has made too many */
	EVENT_REWRITE,		 /* dropped: the kernel could not change the packet */
	EVENT_MARTIAN,		 /* passed: a source that no client can have */
	EVENT_MALFORMED,	 /* passed: headers cut short or nonsense */
	EVENT_FLOWS_MADE,	 /* conntrack entries inserted */
	EVENT_FLOWS_ENDED,	 /* conntrack entries deleted by programs */
	EVENT_SOCKETS_FULL, /* passed: no room for a socket of datagrams, packets are translated */
	EVENT_NO_FLOW,	    /* rejected: of a connection that is not known, and opens none */
	EVENT_XDP,	    /* forwarded at XDP */
	EVENT_ICMP_RATE_LIMIT, /* dropped: an ICMP error would reject it, and there were too many */
	EVENT_EARLY_DROPS,     /* flows ended before they were confirmed: see early_drop.h */
	EVENT_DSR,	       /* dropped: no node of the cluster has sent this option: see dsr.h */
	EVENTS,
};

/* Verdicts of the tc programs. */
#define PASS TC_ACT_UNSPEC
#define DROP TC_ACT_SHOT
/* The packet is to be translated by its entry: finish() does that. */
#define TRANSLATE 0xff
/* A new flow's entries could not be inserted: finish() tries once more, or drops the packet. */
#define NOT_INSERTED 0xfe
/* The packet is of a flow with DSR from another node: finish() handles that (lib/dsr.h). */
#define DSR_RECEIVED 0xfd
/* The packet is translated, and may need another route: finish() finds out (lib/route.h). */
#define TRANSLATED 0xfc

static __always_inline void count(enum event event)
{
	u32 index = event;
	u64 *counter = map_at(packet_events, index);

	if (counter)
		(*counter)++;
}

/*
 * A verdict from REJECTION on means that the packet is to be rejected, for the event that is added.
 * finish() does that: see tc.c. So there is one copy of what it takes, whatever the reason.
 */
#define REJECTION 0x100

static __always_inline int rejection(enum event event)
{
	return REJECTION + event;
}

/* It is rejected as too big for its path, which is no event: its sender sends it again. */
#define TOO_BIG (REJECTION + 0x80)

/* From DROPPING on it is to be dropped, for the event that is added: finish() counts that. */
#define DROPPING 0x200

static __always_inline int drop(enum event event)
{
	return DROPPING + event;
}

static __always_inline int pass(enum event event)
{
	count(event);
	return PASS;
}

#endif
