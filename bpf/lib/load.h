/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How many connections and flows are open to each backend. */
#ifndef EBPFPROXY_LOAD_H
#define EBPFPROXY_LOAD_H

#include "branchless.h"
#include "maps.h"
#include "types.h"

static __always_inline struct load *load_of(u32 backend_id)
{
	return map_lookup(loads, &backend_id);
}

static __always_inline void load_add_socket(u32 backend_id)
{
	struct load *load = load_of(backend_id);

	if (load)
		__sync_fetch_and_add(&load->sockets, 1);
}

static __always_inline void load_remove_socket(u32 backend_id)
{
	struct load *load = load_of(backend_id);

	if (load)
		__sync_fetch_and_add(&load->sockets, -1);
}

static __always_inline void load_count_flow(u32 backend_id)
{
	struct load *load = load_of(backend_id);

	if (load)
		__sync_fetch_and_add(&load->flows_begun, 1);
}

static __always_inline void load_end_flow(u32 backend_id)
{
	struct load *load = load_of(backend_id);

	if (load)
		__sync_fetch_and_add(&load->flows_ended, 1);
}

/*
 * Returns the open connections as far as known; concurrent counting may make that less than zero.
 */
static __always_inline u64 load_open(const struct load *load)
{
	s64 open = (s32)(load->sockets + load->sockets_carried + load->flows_begun -
			 load->flows_ended + load->flows_corrected);

	return select(sign_of(open), 0, open);
}

#endif
