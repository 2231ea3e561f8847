/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Peers of unconnected datagram sockets: which backend stands for which frontend.
 *
 * A socket keeps one backend for each frontend that it sends to, as the 5-tuple of a flow does,
 * until it is closed (the release hook) or the backend leaves the Service. The same record gives
 * the source of replies; no other socket can evict it.
 */
#ifndef EBPFPROXY_PEERS_H
#define EBPFPROXY_PEERS_H

#include "addr.h"
#include "branchless.h"
#include "maps.h"
#include "service.h"
#include "stale.h"

#define PAGE_SHIFT 56

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
 * Returns the backend that a socket has for a frontend of @svc, if it may still be used. Datagrams
 * go to the backend's own record: a peer that another thread is changing does not match it.
 */
static __always_inline struct backend *peer_backend(struct peer *peer, const struct service *svc,
						    u8 proto)
{
	struct backend *backend;
	u32 epoch;

	/* The frontend may belong to another Service by now. */
	if (peer->service_id != svc->id)
		return NULL;
	backend = backend_known(peer->backend_id, &peer->backend, peer->backend_port, proto);
	epoch = epoch_of(svc->id);
	if (!backend || peer->epoch == epoch)
		return backend;
	if (has_departed(svc->id, peer->backend_id, false))
		return NULL;
	peer->epoch = epoch;
	return backend;
}

static __always_inline void peer_write(struct peer *peer, const struct target *to,
				       const struct service *svc, u32 backend_id,
				       const struct backend *backend, u32 epoch)
{
	peer->frontend = to->addr;
	peer->backend = backend->addr;
	peer->backend_port = backend->port;
	peer->service_id = svc->id;
	peer->backend_id = backend_id;
	peer->epoch = epoch;
	peer->frontend_port = to->port;
}

static __always_inline struct peers *peers_new_page(struct bpf_sock_addr *ctx, u64 cookie, u64 page)
{
	u64 key = cookie | page << PAGE_SHIFT;
	struct peers none = { .netns = (u32)bpf_get_netns_cookie(ctx) };

	/* A page that another thread inserts meanwhile serves as well. */
	bpf_map_update_elem(MAP(sock_peers), &key, &none, BPF_NOEXIST);
	return map_lookup(sock_peers, &key);
}

/*
 * Returns a place for one more frontend; NULL where the map is full, or the socket has too many.
 * With @evicts it returns the place of another frontend then, whose replies lose their frontend's
 * address.
 */
static __always_inline struct peer *peer_place(struct bpf_sock_addr *ctx, u64 cookie, bool evicts)
{
	struct peers *peers = NULL;

#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		u64 place;

		peers = peers_page(cookie, page);
		if (!peers)
			peers = peers_new_page(ctx, cookie, page);
		if (!peers)
			return NULL;
		place = place_of(peers, (u64)peer->frontend_port);
		if (place)
			return peer_at(peers, place);
	}
	return peers && evicts ? &peers->peer[peers->next++ % PEERS] : NULL;
}

static __always_inline void peers_forget(u64 cookie)
{
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		u64 key = cookie | page << PAGE_SHIFT;

		/* Deleting a missing element would still take the bucket's lock. */
		if (!map_lookup(sock_peers, &key))
			break;
		map_delete(sock_peers, &key);
	}
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
