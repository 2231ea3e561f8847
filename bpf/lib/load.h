/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How many connections and flows are open to each backend, and how many there were. */
#ifndef EBPFPROXY_LOAD_H
#define EBPFPROXY_LOAD_H

#include "branchless.h"
#include "maps.h"
#include "types.h"

static __always_inline struct backend *backend_of(u32 id)
{
	return map_at(backends, id);
}

static __always_inline void load_add_socket(struct backend *backend)
{
	__sync_fetch_and_add(&backend->sockets_opened, 1);
}

/* Counts a socket that other maps have counted when it was opened. */
static __always_inline void load_restore_socket(u32 backend_id)
{
	struct backend *backend = backend_of(backend_id);

	if (backend)
		__sync_fetch_and_add(&backend->sockets_closed, -1);
}

static __always_inline void load_remove_socket(u32 backend_id)
{
	struct backend *backend = backend_of(backend_id);

	if (backend)
		__sync_fetch_and_add(&backend->sockets_closed, 1);
}

static __always_inline void load_count_flow(u32 backend_id)
{
	struct backend *backend = backend_of(backend_id);

	if (backend)
		__sync_fetch_and_add(&backend->flows_begun, 1);
}

static __always_inline void load_end_flow(u32 backend_id)
{
	struct backend *backend = backend_of(backend_id);

	if (backend)
		__sync_fetch_and_add(&backend->flows_ended, 1);
}

/* Counts a datagram, or a connection that cannot be recorded. */
static __always_inline void load_count_datagram(struct backend *backend)
{
	__sync_fetch_and_add(&backend->datagrams, 1);
}

/*
 * Returns the open connections as far as known; concurrent counting may make that less than zero.
 */
static __always_inline u64 load_open(const struct backend *backend)
{
	s64 open = (s32)((u32)backend->sockets_opened - backend->sockets_closed +
			 backend->sockets_carried + (u32)backend->flows_begun -
			 backend->flows_ended + backend->flows_corrected);

	return select(sign_of(open), 0, open);
}

#endif
