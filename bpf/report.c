/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Decisions of the agent itself (BPF_PROG_TYPE_SCHED_CLS, attached to nothing): it runs this with a
 * struct decision as the packet (BPF_PROG_TEST_RUN). So they are in the same order, under the same
 * filter and in the same limits as those of programs.
 */
#include "lib/compat.h"
#include "lib/decision.h"

/* Returns 1 if the decision of a socket was reported. */
int report_decision(struct __sk_buff *skb)
{
	const struct decision *given = (void *)(u64)skb->data;
	const struct tracing *wanted;
	struct decision *made;
	u64 time;

	if ((void *)(given + 1) > (void *)(u64)skb->data_end)
		return false;
	/* A shift by more than 31 has no meaning. */
	wanted = traces(given->kind & 31);
	if (!wanted || (wanted->by_client && wanted->netns != given->task.netns))
		return false;
	made = decision_begin(wanted, given->kind, given->service_id);
	if (!made)
		return false;
	time = made->time;
	*made = *given;
	made->time = time;
	decision_submit(made);
	return true;
}
