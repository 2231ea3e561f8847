/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Peers of unconnected datagram sockets: which backend stands for which frontend.
 *
 * A socket keeps one backend for each frontend that it sends to, as the 5-tuple of a flow does,
 * until it is closed (the release hook) or the backend leaves the Service. The same record gives
 * the source of replies; no other socket can evict it. The first peer is in the socket's slot of
 * sock_origin, where most sockets have their only one, others are in pages.
 */
#ifndef EBPFPROXY_PEERS_H
#define EBPFPROXY_PEERS_H

#include "addr.h"
#include "branchless.h"
#include "maps.h"
#include "origin.h"
#include "service.h"
#include "stale.h"

#define PAGE_SHIFT 56

static __always_inline bool is_peers_slot(const struct origin *slot, u64 cookie)
{
	return slot->key == origin_key(cookie, ORIGIN_UNCONNECTED);
}

static __always_inline struct peers *peers_page(u64 cookie, u64 page)
{
	u64 key = cookie | page << PAGE_SHIFT;

	return map_lookup(sock_peers, &key);
}

/* Returns 0 where both are equal, without a branch: see place_of(). */
static __always_inline u64 difference(const struct inet_addr *a, __be16 port,
				      const struct inet_addr *b, __be16 other_port)
{
	return (a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
	       (a->word[3] ^ b->word[3]) | (u32)(port ^ other_port);
}

/*
 * Evaluates to the place in a page where @differs is 0, counted from 1 (the last such place); 0
 * where there is none. Comparing without branches leaves the verifier two paths through a page
 * instead of two for each peer.
 */
#define place_of(peers, differs)                                                                   \
	({                                                                                         \
		u64 place = 0;                                                                     \
		_Pragma("clang loop unroll(full)") for (u64 i = 0; i < PEERS; i++)                 \
		{                                                                                  \
			const struct peer *peer = &(peers)->peer[i];                               \
                                                                                                   \
			place = select(is_zero(differs), i + 1, place);                            \
		}                                                                                  \
		place;                                                                             \
	})

static __always_inline struct peer *peer_at(struct peers *peers, u64 place)
{
	return &peers->peer[(place - 1) % PEERS];
}

static __always_inline struct peer *peer_by_frontend(u64 cookie, const struct target *to)
{
	struct origin *slot = origin_slot(cookie);

	if (!slot)
		return NULL;
	if (is_peers_slot(slot, cookie) &&
	    !difference(&slot->peer.frontend, slot->peer.frontend_port, &to->addr, to->port))
		return &slot->peer;
	if (!slot->elsewhere)
		return NULL;
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		struct peers *peers = peers_page(cookie, page);
		u64 place;

		if (!peers)
			break;
		place = place_of(peers, difference(&peer->frontend, peer->frontend_port, &to->addr,
						   to->port));
		if (place)
			return peer_at(peers, place);
	}
	return NULL;
}

static __always_inline struct peer *peer_by_backend(u64 cookie, const struct inet_addr *addr,
						    __be16 port)
{
	struct origin *slot = origin_slot(cookie);

	if (!slot)
		return NULL;
	if (is_peers_slot(slot, cookie) &&
	    !difference(&slot->peer.backend, slot->peer.backend_port, addr, port))
		return &slot->peer;
	if (!slot->elsewhere)
		return NULL;
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		struct peers *peers = peers_page(cookie, page);
		u64 place;

		if (!peers)
			break;
		place = place_of(peers, difference(&peer->backend, peer->backend_port, addr, port));
		if (place)
			return peer_at(peers, place);
	}
	return NULL;
}

/*
 * Returns the backend that a socket has for a frontend of @svc, if it may still be used; otherwise
 * drops the peer, and sets @left to the backend that it had. Datagrams go to the backend's own
 * record: a peer that another thread is changing does not match it.
 */
static __always_inline struct backend *peer_backend(u64 cookie, const struct target *to,
						    const struct service *svc, u32 *left)
{
	struct peer *peer = peer_by_frontend(cookie, to);
	struct backend *backend;
	u32 epoch;

	if (!peer)
		return NULL;
	backend = backend_known(peer->backend_id, &peer->backend, peer->backend_port, to->proto);
	epoch = epoch_of(svc->id);
	/* The frontend may belong to another Service by now. */
	if (backend && peer->service_id == svc->id) {
		if (peer->epoch == epoch)
			return backend;
		if (!has_departed(svc->id, peer->backend_id, false)) {
			peer->epoch = epoch;
			return backend;
		}
	}
	*left = peer->backend_id;
	/* Neither search finds a free place. */
	peer->frontend_port = peer->backend_port = 0;
	return NULL;
}

static __always_inline void peer_write(struct peer *peer, const struct peer *new)
{
	peer->frontend = new->frontend;
	peer->backend = new->backend;
	peer->backend_port = new->backend_port;
	peer->service_id = new->service_id;
	peer->backend_id = new->backend_id;
	peer->epoch = new->epoch;
	peer->frontend_port = new->frontend_port;
}

static __always_inline struct peers *peers_new_page(struct origin *slot, u64 cookie, u32 netns,
						    u64 page)
{
	u64 key = cookie | page << PAGE_SHIFT;
	struct peers none = { .netns = netns };

	if (!page)
		__sync_fetch_and_add(&slot->elsewhere, 1);
	/* A page that another thread inserts meanwhile serves as well. */
	if (bpf_map_update_elem(MAP(sock_peers), &key, &none, BPF_NOEXIST) && !page)
		__sync_fetch_and_add(&slot->elsewhere, -1);
	return map_lookup(sock_peers, &key);
}

/*
 * Inserts a peer; returns false where the map is full, or the socket has too many. With @evicts it
 * takes the place of another frontend then, whose replies lose their frontend's address.
 */
static __always_inline bool peer_insert(u64 cookie, u32 netns, const struct peer *new, bool evicts)
{
	struct origin *slot = origin_slot(cookie);
	struct peers *peers = NULL;
	u64 place = 0;

	if (!slot)
		return false;
	if (origin_fill(slot, origin_key(cookie, ORIGIN_UNCONNECTED), new, netns))
		return true;
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES && !place; page++) {
		peers = peers_page(cookie, page);
		if (!peers)
			peers = peers_new_page(slot, cookie, netns, page);
		if (!peers)
			return false;
		place = place_of(peers, (u64)peer->frontend_port);
	}
	if (!place && evicts && peers)
		place = 1 + peers->next++ % PEERS;
	if (!place || !peers)
		return false;
	peer_write(peer_at(peers, place), new);
	return true;
}

/* Says if the socket has sent to a frontend before. */
static __always_inline bool has_peers(u64 cookie)
{
	struct origin *slot = origin_slot(cookie);

	if (!slot)
		return false;
	return is_peers_slot(slot, cookie) || (slot->elsewhere && peers_page(cookie, 0));
}

/* Returns how many pages there were. */
static __always_inline int pages_forget(struct origin *slot, u64 cookie)
{
	int found = 0;

#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		u64 key = cookie | page << PAGE_SHIFT;

		/* Deleting a missing element would still take the bucket's lock. */
		if (!map_lookup(sock_peers, &key))
			break;
		if (map_delete(sock_peers, &key))
			continue;
		found++;
		if (!page)
			__sync_fetch_and_add(&slot->elsewhere, -1);
	}
	return found;
}

/* Forgets all that is recorded of a socket that is closed. */
static __always_inline bool socket_forget(u64 cookie)
{
	struct origin *slot = origin_slot(cookie);
	bool found = false;
	u64 key;

	if (!slot)
		return false;
	key = slot->key;
	if (key == origin_key(cookie, ORIGIN_CONNECTED) || is_peers_slot(slot, cookie))
		found = origin_free(slot, key);
	if (slot->elsewhere) {
		found |= overflow_forget(slot, cookie);
		pages_forget(slot, cookie);
	}
	return found;
}

/* Replaces a backend's address by the frontend's. */
static __always_inline bool peer_recall(u64 cookie, struct target *from)
{
	struct peer *peer = peer_by_backend(cookie, &from->addr, from->port);

	if (!peer)
		return false;
	from->addr = peer->frontend;
	from->port = peer->frontend_port;
	return true;
}

#endif
