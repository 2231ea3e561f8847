/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Decisions: which backend was chosen, or why there was none, one event for each, never for each
 * packet. A command reads them (`ebpfproxy trace`), and the map tracing says which it wants.
 * Without TRACE_DECISIONS the verifier removes all of this.
 */
#ifndef EBPFPROXY_DECISION_H
#define EBPFPROXY_DECISION_H

#include "algorithm.h"
#include "events.h"
#include "maps.h"
#include "options.h"
#include "service.h"
#include "types.h"

/* Returns what the command wants if that includes decisions of this kind, else NULL. */
static __always_inline const struct tracing *traces(enum decision_kind kind)
{
	const struct tracing *wanted;
	u32 zero = 0;

	if (!TRACE_DECISIONS)
		return NULL;
	wanted = map_lookup(tracing, &zero);
	return wanted && wanted->kinds & 1U << kind ? wanted : NULL;
}

/* Chooses one in so many of the decisions that go well. */
static __always_inline bool is_sampled(const struct tracing *wanted, enum decision_kind kind)
{
	if (kind > DECISION_AFFINITY_HIT || wanted->one_in <= 1)
		return true;
	return !((u64)bpf_get_prandom_u32() * wanted->one_in >> 32);
}

/*
 * Takes a token of this CPU's bucket: decisions are due one by one, and those that did not come are
 * saved up for a burst. Socket hooks can be preempted: then there may be a few more.
 */
static __always_inline bool take_token(struct decision_state *state, const struct tracing *wanted,
				       u64 now)
{
	u64 due = state->due;

	if ((s64)(now - due) > (s64)wanted->burst)
		due = now - wanted->burst;
	if ((s64)(due - now) > 0) {
		__sync_fetch_and_add(&state->limited, 1);
		return false;
	}
	state->due = due + wanted->interval;
	return true;
}

/*
 * Begins an event; the caller fills in the rest and submits it. Returns NULL where the command does
 * not want it, or it is lost, which is counted.
 */
static __always_inline struct decision *decision_begin(const struct tracing *wanted,
						       enum decision_kind kind, u32 service_id)
{
	const u64 now = bpf_ktime_get_coarse_ns();
	struct decision_state *state;
	struct decision *made;
	u32 zero = 0;

	/* What is of no Service may be meant for one: a command can tell by the address. */
	if (wanted->by_service && service_id != NOBODY && !map_lookup(traced_services, &service_id))
		return NULL;
	if (now >= wanted->until || !is_sampled(wanted, kind))
		return NULL;
	state = map_lookup(decision_state, &zero);
	if (!state || !take_token(state, wanted, now))
		return NULL;
	made = bpf_ringbuf_reserve(MAP(decisions), sizeof(*made), 0);
	if (!made) {
		__sync_fetch_and_add(&state->full, 1);
		return NULL;
	}
	made->time = now;
	made->kind = kind;
	made->service_id = service_id;
	return made;
}

/* The reader comes by itself, some times a second: to wake it up would cost more than all the rest.
 */
static __always_inline void decision_submit(struct decision *made)
{
	bpf_ringbuf_submit(made, BPF_RB_NO_WAKEUP);
}

/* Sets what was chosen, and of how many; @svc is NULL where it was not from a Service's backends.
 */
static __always_inline void decision_choice(struct decision *made, enum decision_place place,
					    const struct service *svc, u32 backend_id)
{
	u32 candidates = 0;

	made->backend_id = backend_id;
	made->place = place << BITS_OF_ALGORITHM;
	if (svc) {
		candidates = selection_of(selection_index(svc, policy_of(svc))).count;
		made->place |= svc->algorithm & ((1 << BITS_OF_ALGORITHM) - 1);
	}
	if (backend_id == NOBODY)
		candidates = 0;
	made->candidates = candidates < 0xffff ? candidates : 0xffff;
}

#endif
