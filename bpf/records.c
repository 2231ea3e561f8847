/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the agent does to records of sockets, and to the cache of frontends. It cannot compare and
 * swap: a program does it for the agent (BPF_PROG_TEST_RUN), and is attached nowhere. The packet is
 * a struct origin, or what the agent has read of frontends; programs return how much they have
 * changed.
 */
#include "lib/compat.h"
#include "lib/frontend_cache.h"
#include "lib/origin.h"
#include "lib/peers.h"

static __always_inline bool read_record(const struct __sk_buff *skb, struct origin *record)
{
	const struct origin *packet = (void *)(u64)skb->data;

	if ((void *)(packet + 1) > (void *)(u64)skb->data_end)
		return false;
	*record = *packet;
	return true;
}

static __always_inline bool same_peer(const struct peer *a, const struct peer *b)
{
	return a->backend_id == b->backend_id && a->service_id == b->service_id &&
	       !difference(&a->backend, a->backend_port, &b->backend, b->backend_port);
}

/* Forgets a connected socket that still has the same peer, or an unconnected one that is closed. */
int forget_socket(struct __sk_buff *skb)
{
	struct origin record, *known;
	u64 cookie;

	if (!read_record(skb, &record))
		return false;
	cookie = cookie_of(record.key);
	if (record.key == origin_key(cookie, ORIGIN_CLOSED))
		return origin_end(cookie);
	if (record.key != origin_key(cookie, ORIGIN_CONNECTED))
		return socket_forget(cookie);
	known = origin_of(cookie);
	return known && same_peer(&known->peer, &record.peer) && origin_forget(cookie);
}

/* Forgets what a socket that is closed has beside its first frontend; returns how many pages. */
int forget_pages(struct __sk_buff *skb)
{
	struct origin record, *slot;

	if (!read_record(skb, &record))
		return 0;
	slot = origin_slot(cookie_of(record.key));
	return slot ? pages_forget(slot, cookie_of(record.key)) : 0;
}

/* Inserts a record, unless the socket has it, or, if it is connected, another one. */
int restore_socket(struct __sk_buff *skb)
{
	struct target frontend = {};
	struct origin record, *slot;
	u64 cookie;

	if (!read_record(skb, &record))
		return false;
	cookie = cookie_of(record.key);
	slot = origin_slot(cookie);
	if (!slot)
		return false;
	if (record.key != origin_key(cookie, ORIGIN_CONNECTED)) {
		frontend.addr = record.peer.frontend;
		frontend.port = record.peer.frontend_port;
		return !peer_by_frontend(cookie, &frontend) &&
		       peer_insert(cookie, record.netns, &record.peer, false);
	}
	if (origin_of(cookie) || !origin_insert(slot, cookie, &record.peer, record.netns))
		return false;
	load_restore_socket(record.peer.backend_id);
	return true;
}

/* Returns the range of slots as one of backend ids, if these are successive. */
static __always_inline union selection successive_backends(const struct service *svc,
							   union selection range)
{
	union selection ids = { .base = 0, .count = range.count | RANGE_OF_BACKENDS };

	/* What compares loads looks at the slots' weights. */
	if (!range.count || range.count > SUCCESSIVE_SLOTS ||
	    (svc->algorithm >= ALGORITHM_LEAST_CONNECTIONS &&
	     svc->algorithm <= ALGORITHM_NEVER_QUEUE))
		return range;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < SUCCESSIVE_SLOTS; i++) {
		u32 at = range.base + i;
		const union slot *slot;

		if (i >= range.count)
			break;
		slot = map_lookup(slots, &at);
		if (!slot || (i && slot->backend_id != ids.base + i))
			return range;
		if (!i)
			ids.base = slot->backend_id;
	}
	return ids;
}

/*
 * Caches a frontend that the agent has read from services4 or services6, after the generation. The
 * packet has as many as there is room for: each run takes the next. Returns if it is in its line.
 */
int cache_frontend(struct __sk_buff *skb)
{
	struct frontends_read *read = (void *)(u64)skb->data;
	const void *end = (void *)(u64)skb->data_end;
	const struct frontend_read *this;
	struct frontend_place place;
	union selection range;
	struct found found;
	struct target to;
	u64 generation;
	u32 number;

	if ((const void *)(read + 1) > end)
		return false;
	number = read->next++;
	if (number >= FRONTENDS_READ)
		return false;
	this = &read->frontends[number];
	/* What is compared has to be what is read. */
	barrier_var(this);
	if ((const void *)(this + 1) > end)
		return false;
	/* Sockets look for no others. */
	if (!this->port || this->scope != SCOPE_INTERNAL)
		return false;
	to = (struct target) { this->addr, this->port, this->proto };
	if (!frontend_place_of(&to, read->generation, &place))
		return false;
	frontend_write(&place, &this->words, &found);
	if (!found.line)
		return false;
	generation = range_generation(found.service.id);
	order_loads();
	range = selection_of(selection_index(&found.service, policy_of(&found.service)));
	range_write(&found, generation, successive_backends(&found.service, range));
	return true;
}
