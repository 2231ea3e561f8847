/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Decisions about packets: who asks is the sender. They are noted where they are made, and reported
 * when all else is done: otherwise the verifier would walk through all that follows once more, for
 * each of the paths through a report.
 */
#ifndef EBPFPROXY_DECISION_PACKET_H
#define EBPFPROXY_DECISION_PACKET_H

#include "conntrack.h"
#include "decision.h"

static __always_inline bool is_traced_client(const struct tracing *wanted,
					     const struct inet_addr *addr)
{
	return !wanted->by_client || addr_equal(addr, &wanted->client[0]) ||
	       addr_equal(addr, &wanted->client[1]);
}

/* @flow is of the original direction: from the client to the frontend. */
static __always_inline void flow_decision(const struct flow *flow, const struct service *svc,
					  enum decision_place place, enum decision_kind kind,
					  enum event reason, u32 service_id, u32 backend_id,
					  u32 ifindex)
{
	const struct tracing *wanted = traces(kind);
	struct decision *made;

	if (!wanted || !is_traced_client(wanted, &flow->src))
		return;
	made = decision_begin(wanted, kind, service_id);
	if (!made)
		return;
	made->frontend = flow->dst;
	made->frontend_port = flow->dport;
	made->proto = flow->proto;
	made->reason = reason;
	decision_choice(made, place, svc, backend_id);
	made->sender.addr = flow->src;
	made->sender.port = flow->sport;
	made->sender.reserved = 0;
	made->sender.ifindex = ifindex;
	made->sender.unused[0] = made->sender.unused[1] = 0;
	decision_submit(made);
}

static __always_inline void note_decision(struct scratch *s, enum decision_kind kind,
					  enum event reason, u32 service_id, u32 backend_id)
{
	s->noted.has_decision = true;
	s->noted.kind = kind;
	s->noted.reason = reason;
	s->noted.service_id = service_id;
	s->noted.backend_id = backend_id;
}

/* Notes a new flow's backend. */
static __always_inline void decision_created(const struct packet *p, const struct service *svc,
					     u32 backend_id)
{
	struct scratch *s = scratch_of(p);

	if (TRACE_DECISIONS)
		note_decision(s, DECISION_CHOSEN + !!s->client.keeps_backend, 0, svc->id,
			      backend_id);
}

/* Notes that a flow begins anew: its backend, as the entry @nat has it, has left the Service. */
static __always_inline void decision_flow_left(const struct packet *p, const struct nat *nat)
{
	struct scratch *s = scratch_of(p);

	if (!TRACE_DECISIONS)
		return;
	s->noted.has_left = true;
	s->noted.left_service_id = nat->service_id;
	s->noted.left_backend_id = nat->backend_id;
}

/* Returns the Service that a packet was for when it was dropped or rejected. */
static __always_inline u32 service_of_event(const struct scratch *s, enum event event)
{
	switch (event) {
	case EVENT_NO_ENDPOINT:
	case EVENT_NO_LOCAL_ENDPOINT:
	case EVENT_SOURCE_RANGE:
	case EVENT_NO_FLOW:
		return s->service.id;
	case EVENT_PORTS_TAKEN:
	case EVENT_TABLE_FULL:
		return s->nat.service_id;
	case EVENT_HOPS:
	case EVENT_REWRITE:
	case EVENT_UNROUTABLE:
	case EVENT_BACKEND_GONE:
		return s->entry.service_id;
	default:
		return NOBODY;
	}
}

/* Notes what becomes of a packet that gets no backend; @kind is REFUSED or DROPPED. */
static __always_inline void decision_failed(const struct packet *p, enum decision_kind kind,
					    enum event event)
{
	struct scratch *s = scratch_of(p);

	if (!TRACE_DECISIONS)
		return;
	if (event == EVENT_BACKEND_GONE)
		kind = DECISION_BACKEND_LEFT;
	else if (event == EVENT_PORTS_TAKEN)
		kind = DECISION_MASQUERADE_FAILED;
	note_decision(s, kind, event, service_of_event(s, event), NOBODY);
}

/* Notes that a packet is not rejected, as decision_failed() has noted, but dropped. */
static __always_inline void decision_limited(const struct packet *p)
{
	struct scratch *s = scratch_of(p);

	if (!TRACE_DECISIONS)
		return;
	s->noted.kind = DECISION_DROPPED;
	s->noted.reason = EVENT_ICMP_RATE_LIMIT;
}

/* Reports what was noted of the packet. */
static __always_inline void report_decisions(const struct packet *p, u32 ifindex)
{
	const struct scratch *s = scratch_of(p);
	const enum decision_place place = PLACE_INGRESS + p->flow.stage;

	if (!TRACE_DECISIONS)
		return;
	if (s->noted.has_left)
		flow_decision(&p->flow, NULL, place, DECISION_BACKEND_LEFT, EVENT_BACKEND_GONE,
			      s->noted.left_service_id, s->noted.left_backend_id, ifindex);
	if (s->noted.has_decision)
		/*
		 * A shift by more than 31, as of a kind read from memory, has no meaning. And a
		 * pointer that may be NULL is one too many for the verifier before Linux 6.6.
		 */
		flow_decision(&p->flow, &s->service, place, s->noted.kind & 15, s->noted.reason,
			      s->noted.service_id, s->noted.backend_id, ifindex);
}

#endif
