/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Looking up frontends, and choosing backends. */
#ifndef EBPFPROXY_SERVICE_H
#define EBPFPROXY_SERVICE_H

#include "addr.h"
#include "affinity.h"
#include "algorithm.h"
#include "maps.h"
#include "options.h"

/* UDP-Lite (RFC 3828) has its own protocol number and uses UDP's Services. */
static __always_inline u8 service_protocol(u32 protocol)
{
	return protocol == IPPROTO_UDPLITE ? IPPROTO_UDP : protocol;
}

/* The destination of a packet or socket. */
struct target {
	struct inet_addr addr;
	__be16 port;
	u8 proto;
};

/* A backend was found, or how a client learns that there is none. */
enum choice {
	CHOICE_BACKEND,
	CHOICE_REFUSE, /* no endpoint anywhere: the client is told at once */
	CHOICE_DROP,   /* policy Local, endpoints on other nodes only */
};

/* Returns how a key ends, as it lies in memory. */
static __always_inline u32 target_word(const struct target *to, u8 scope)
{
	const struct {
		__be16 port;
		u8 proto;
		u8 scope;
	} end = { to->port, to->proto, scope };
	u32 word;

	_Static_assert(sizeof(end) == sizeof(word), "nothing is left out");
	__builtin_memcpy(&word, &end, sizeof(word));
	return word;
}

static __always_inline struct service *service_lookup4(__be32 addr, const struct target *to,
						       u8 scope)
{
	const u64 key = two_words(addr, target_word(to, scope));

	_Static_assert(sizeof(struct service4_key) == sizeof(key), "one store");
	return map_lookup(services4, &key);
}

static __always_inline struct service *service_lookup6(const struct inet_addr *addr,
						       const struct target *to, u8 scope)
{
	const u64 key[3] = { two_words(addr->word[0], addr->word[1]),
			     two_words(addr->word[2], addr->word[3]),
			     two_words(target_word(to, scope), 0) };

	return map_lookup(services6, key);
}

static __always_inline struct service *service_lookup(const struct target *to, u8 scope)
{
	return addr_is_v4(&to->addr) ? service_lookup4(to->addr.word[3], to, scope)
				     : service_lookup6(&to->addr, to, scope);
}

/*
 * Finds the Service whose frontend has exactly this address. The unspecified address is a
 * NodePort's key.
 */
static __always_inline struct service *service_by_address(const struct target *to, u8 scope)
{
	if (addr_is_v4(&to->addr))
		return to->addr.word[3] ? service_lookup4(to->addr.word[3], to, scope) : NULL;
	if (addr_is_loopback(&to->addr))
		return NULL;
	return service_lookup6(&to->addr, to, scope);
}

/* Finds the Service with this NodePort, whatever the address. */
static __always_inline struct service *service_by_node_port(const struct target *to, u8 scope)
{
	const struct inet_addr any = {};

	return addr_is_v4(&to->addr) ? service_lookup4(0, to, scope)
				     : service_lookup6(&any, to, scope);
}

static __always_inline bool source_allowed(const struct service *svc, const struct inet_addr *src)
{
	struct source_range_key key = {
		.length = 32 + 128,
		.service_id = svc->id,
		.addr = *src,
	};

	return map_lookup(source_ranges, &key) != NULL;
}

static __always_inline bool addr_is_this_node(const struct inet_addr *a)
{
	return map_lookup(node_addresses, a) != NULL;
}

static __always_inline enum policy policy_of(const struct service *svc)
{
	return svc->flags & SERVICE_LOCAL ? POLICY_LOCAL : POLICY_CLUSTER;
}

static __always_inline u32 selection_index(const struct service *svc, enum policy policy)
{
	return svc->id * POLICIES + policy;
}

static __always_inline union selection selection_of(u32 index)
{
	union selection *found = map_at(selections, index);
	union selection range = {};

	if (found)
		range.word = *(volatile u64 *)&found->word;
	return range;
}

/* Returns what this CPU counts for a Service. */
static __always_inline u64 *choices_of(u32 service_id)
{
	const u32 row = (bpf_get_smp_processor_id() >> CPUS_OF_A_ROW_SHIFT) % CHOICE_ROWS;
	const u32 at = row * SERVICES + service_id;

	return map_at(service_choices, at);
}

static __always_inline void count_service(u32 service_id, enum choice choice)
{
	struct rejections *rejections;

	if (choice == CHOICE_BACKEND) {
		u64 *choices = choices_of(service_id);

		if (choices)
			__sync_fetch_and_add(choices, 1);
		return;
	}
	rejections = map_at(service_rejections, service_id);
	if (!rejections)
		return;
	if (choice == CHOICE_REFUSE)
		__sync_fetch_and_add(&rejections->refused, 1);
	else
		__sync_fetch_and_add(&rejections->dropped, 1);
}

/*
 * Chooses a backend. One look-up led to @svc; two array lookups lead to the backend. @cached is the
 * range of a connection's choice, if it is known: where it is RANGE_OF_BACKENDS one look-up is
 * enough. @client is filled in where needs_client_key(@svc).
 */
static __always_inline enum choice service_choose(const struct service *svc,
						  const union selection *cached,
						  const struct chooser *who, struct client *client,
						  u32 *backend_id, struct backend **backend)
{
	enum policy policy = policy_of(svc);
	u32 selection = selection_index(svc, policy);
	union selection range = cached ? *cached : selection_of(selection);
	const bool is_of_backends = cached && range.count & RANGE_OF_BACKENDS;
	union slot *slot;
	u32 at;

	if (cached)
		range.count &= ~RANGE_OF_BACKENDS;
	if (!range.count) {
		if (policy == POLICY_LOCAL &&
		    selection_of(selection_index(svc, POLICY_CLUSTER)).count)
			return CHOICE_DROP;
		return CHOICE_REFUSE;
	}
	if (TRACE_DECISIONS)
		client->keeps_backend = true;
	if (!svc->affinity_seconds || !affinity_recall(svc, selection, client, backend_id)) {
		if (TRACE_DECISIONS)
			client->keeps_backend = false;
		at = pick_slot(svc, &range, selection, who, client);
		if (is_of_backends) {
			*backend_id = at;
		} else {
			slot = map_at(slots, at);
			if (!slot)
				return CHOICE_REFUSE;
			*backend_id = slot->backend_id;
		}
		if (svc->affinity_seconds)
			affinity_remember(svc, selection, client, backend_id);
	}
	*backend = backend_of(*backend_id);
	return *backend ? CHOICE_BACKEND : CHOICE_REFUSE;
}

/* Chooses a backend, and counts that for the Service; for the backend counts what is made of it. */
static __always_inline enum choice choose(const struct service *svc, struct client *client,
					  u32 *backend_id, struct backend **backend)
{
	const struct chooser packet = { .socket = 0 };
	enum choice choice = service_choose(svc, NULL, &packet, client, backend_id, backend);

	count_service(svc->id, choice);
	return choice;
}

/* Says if this is a cluster IP: only its Service's ports are served. */
static __always_inline bool is_cluster_ip(const struct inet_addr *addr)
{
	const struct target any_port = { .addr = *addr };

	return service_by_address(&any_port, SCOPE_INTERNAL) != NULL;
}

#endif
