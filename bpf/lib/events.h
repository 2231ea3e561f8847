/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Events: what happened to packets that neither simply passed nor were translated, by reason. */
#ifndef EBPFPROXY_EVENTS_H
#define EBPFPROXY_EVENTS_H

#include "maps.h"
#include "types.h"

/* Verdicts of the tc programs. */
#define PASS TC_ACT_UNSPEC
#define DROP TC_ACT_SHOT

static __always_inline void count(enum event event)
{
	u32 index = event;
	u64 *counter = map_lookup(packet_events, &index);

	if (counter)
		(*counter)++;
}

/*
 * A verdict from REJECTION on means that the packet is to be rejected, for the event that is added.
 * finish() does that, in one place: see reject.h.
 */
#define REJECTION 0x100

static __always_inline int rejection(enum event event)
{
	return REJECTION + event;
}

static __always_inline int drop(enum event event)
{
	count(event);
	return DROP;
}

static __always_inline int pass(enum event event)
{
	count(event);
	return PASS;
}

#endif
