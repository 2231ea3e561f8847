/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Session affinity (sessionAffinity: ClientIP): a client keeps its backend while its last
 * connection is not too old and new clients could get that backend, too.
 */
#ifndef EBPFPROXY_AFFINITY_H
#define EBPFPROXY_AFFINITY_H

#include "algorithm.h"
#include "maps.h"

static __always_inline bool is_member(u32 selection, u32 backend_id)
{
	struct member_key key = { selection, backend_id };

	return map_lookup(members, &key) != NULL;
}

static __always_inline struct affinity_key affinity_key(const struct service *svc,
							const struct client *client)
{
	return (struct affinity_key) {
		.client = client->addr,
		.service_id = svc->id,
		.kind = client->kind,
	};
}

/* Finds the backend that the client keeps; returns false where there is none. */
static __always_inline bool affinity_recall(const struct service *svc, u32 selection,
					    const struct client *client, u32 *backend_id)
{
	struct affinity_key key = affinity_key(svc, client);
	struct affinity *known = map_lookup(affinity, &key);
	const u64 now = bpf_ktime_get_coarse_ns();
	u32 id;

	if (!known || (s64)(now - known->last) > (s64)(svc->affinity_seconds * NSEC_PER_SEC))
		return false;
	/* This is read once: an LRU map may reuse the element for another client meanwhile. */
	id = *(volatile u32 *)&known->backend_id;
	if (!is_member(selection, id))
		return false;
	*backend_id = id;
	known->last = now;
	return true;
}

/*
 * Records the choice. When two CPUs choose for a new client at once, the choice recorded first
 * holds for both: @backend_id may change.
 */
static __always_inline void affinity_remember(const struct service *svc, u32 selection,
					      const struct client *client, u32 *backend_id)
{
	struct affinity_key key = affinity_key(svc, client);
	struct affinity value = { .backend_id = *backend_id, .last = bpf_ktime_get_coarse_ns() };

	if (!bpf_map_update_elem(MAP(affinity), &key, &value, BPF_NOEXIST))
		return;
	if (!affinity_recall(svc, selection, client, backend_id))
		map_update(affinity, &key, &value);
}

#endif
