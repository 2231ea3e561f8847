/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Decisions at sockets: who asks is the task that runs. */
#ifndef EBPFPROXY_DECISION_SOCKET_H
#define EBPFPROXY_DECISION_SOCKET_H

#include "decision.h"
#include "origin.h"
#include "socket.h"

/* A task's name and cgroup are believed to be the same for this long. */
#define TASK_KNOWN_NS (100 * NSEC_PER_MSEC)

#define as_volatile(field) (*(volatile u64 *)&(field))

/* Keeps the compiler from moving reads and writes of memory across this point. */
#define barrier() asm volatile("" : : : "memory")

/*
 * Fills in the task that runs. A task often has many decisions in a row: its cgroup and its name,
 * which take as long as all the rest, are kept. Another task may preempt this one on its CPU, and
 * do the same: the sequence tells.
 */
static __always_inline void decision_task(struct decision *made)
{
	const u64 task = bpf_get_current_pid_tgid();
	struct decision_state *state;
	u64 sequence;
	u32 zero = 0;

	made->task.pid = task >> 32;
	state = map_lookup(decision_state, &zero);
	if (!state)
		return;
	sequence = as_volatile(state->sequence);
	if (!(sequence & 1) && state->task == task && made->time - state->known < TASK_KNOWN_NS) {
		barrier();
		made->task.cgroup = state->cgroup;
		__builtin_memcpy(made->task.comm, state->comm, sizeof(state->comm));
		barrier();
		if (as_volatile(state->sequence) == sequence)
			return;
	}
	made->task.cgroup = bpf_get_current_cgroup_id();
	bpf_get_current_comm(made->task.comm, sizeof(made->task.comm));
	sequence = as_volatile(state->sequence);
	if (sequence & 1)
		return;
	as_volatile(state->sequence) = sequence + 1;
	barrier();
	state->known = made->time;
	state->task = task;
	state->cgroup = made->task.cgroup;
	__builtin_memcpy(state->comm, made->task.comm, sizeof(state->comm));
	barrier();
	as_volatile(state->sequence) = sequence + 2;
}

static __always_inline void socket_decision(struct bpf_sock_addr *ctx, const struct target *to,
					    const struct service *svc, enum decision_kind kind,
					    enum event reason, u32 backend_id)
{
	const struct tracing *wanted = traces(kind);
	struct decision *made;
	u32 netns;

	if (!wanted)
		return;
	netns = netns_cookie(ctx);
	if (wanted->by_client && wanted->netns != netns)
		return;
	made = decision_begin(wanted, kind, svc ? svc->id : NOBODY);
	if (!made)
		return;
	made->frontend = to->addr;
	made->frontend_port = to->port;
	made->proto = to->proto;
	made->reason = reason;
	decision_choice(made, PLACE_SOCKET, svc, backend_id);
	made->task.cookie = known_socket_cookie(ctx);
	made->task.netns = netns;
	decision_task(made);
	decision_submit(made);
}

/* Reports the backend of a connection, or of a socket's datagrams to one frontend. */
static __always_inline void decision_chosen(struct bpf_sock_addr *ctx, const struct target *to,
					    const struct service *svc, const struct client *client,
					    u32 backend_id)
{
	if (!TRACE_DECISIONS)
		return;
	if (client->keeps_backend)
		socket_decision(ctx, to, svc, DECISION_AFFINITY_HIT, 0, backend_id);
	else
		socket_decision(ctx, to, svc, DECISION_CHOSEN, 0, backend_id);
}

/* Reports that datagrams of a socket go to another backend: @backend_id has left. */
static __always_inline void decision_left(struct bpf_sock_addr *ctx, const struct target *to,
					  const struct service *svc, u32 backend_id)
{
	socket_decision(ctx, to, svc, DECISION_BACKEND_LEFT, EVENT_BACKEND_GONE, backend_id);
}

/* Reports that bind() to a NodePort failed. */
static __always_inline void decision_bind_refused(struct bpf_sock_addr *ctx,
						  const struct target *to)
{
	socket_decision(ctx, to, NULL, DECISION_BIND_REFUSED, 0, NOBODY);
}

/* Rejects and reports that; @svc is NULL where it is not known. */
static __always_inline int refuse(struct bpf_sock_addr *ctx, const struct target *to,
				  const struct service *svc, enum choice choice)
{
	enum event reason;

	if (svc)
		reason = choice == CHOICE_REFUSE ? EVENT_NO_ENDPOINT : EVENT_NO_LOCAL_ENDPOINT;
	else
		reason = choice == CHOICE_REFUSE ? EVENT_NO_SUCH_PORT : EVENT_NO_SUCH_SERVICE;
	socket_decision(ctx, to, svc, DECISION_REFUSED, reason, NOBODY);
	return reject_call(choice);
}

#endif
