/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Unconnected datagram sockets: which backend stands for which frontend.
 *
 * A socket keeps one backend for each frontend that it sends to, as the 5-tuple of a flow does,
 * until it is closed (the release hook) or the backend leaves the service. Answers are told by the
 * same record; no other socket can push it out.
 */
#ifndef EBPFPROXY_PEERS_H
#define EBPFPROXY_PEERS_H

#include "addr.h"
#include "maps.h"
#include "service.h"
#include "stale.h"

#define PAGE_SHIFT 56

static __always_inline struct peers *peers_page(u64 cookie, u64 page)
{
	u64 key = cookie | page << PAGE_SHIFT;

	return map_lookup(sock_peers, &key);
}

static __always_inline bool is_frontend(const struct peer *peer, const struct target *to)
{
	return peer->frontend_port == to->port && addr_equal(&peer->frontend, &to->addr);
}

static __always_inline bool is_backend(const struct peer *peer, const struct inet_addr *addr,
				       __be16 port)
{
	return peer->backend_port == port && addr_equal(&peer->backend, addr);
}

static __always_inline struct peer *peer_by_frontend(u64 cookie, const struct target *to)
{
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		struct peers *peers = peers_page(cookie, page);

		if (!peers)
			break;
#pragma clang loop unroll(full)
		for (int i = 0; i < PEERS; i++)
			if (is_frontend(&peers->peer[i], to))
				return &peers->peer[i];
	}
	return NULL;
}

static __always_inline struct peer *peer_by_backend(u64 cookie, const struct inet_addr *addr,
						    __be16 port)
{
#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		struct peers *peers = peers_page(cookie, page);

		if (!peers)
			break;
#pragma clang loop unroll(full)
		for (int i = 0; i < PEERS; i++)
			if (is_backend(&peers->peer[i], addr, port))
				return &peers->peer[i];
	}
	return NULL;
}

/*
 * The backend that a socket has for a frontend of @svc, if it may still be used. What is sent to is
 * the backend's own record: of a peer that another thread is just changing, parts do not match it.
 */
static __always_inline struct backend *peer_backend(struct peer *peer, const struct service *svc,
						    u8 proto)
{
	struct backend *backend;
	u32 epoch;

	/* The frontend may be another service's by now. */
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

static __always_inline struct peers *peers_new_page(u64 cookie, u64 page)
{
	u64 key = cookie | page << PAGE_SHIFT;
	struct peers none = {};

	/* Another thread's page does as well. */
	bpf_map_update_elem(MAP(sock_peers), &key, &none, BPF_NOEXIST);
	return map_lookup(sock_peers, &key);
}

/* A place for one more frontend; NULL where the map is full. */
static __always_inline struct peer *peer_place(u64 cookie)
{
	struct peers *peers = NULL;

#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		peers = peers_page(cookie, page);
		if (!peers)
			peers = peers_new_page(cookie, page);
		if (!peers)
			return NULL;
#pragma clang loop unroll(full)
		for (int i = 0; i < PEERS; i++)
			if (!peers->peer[i].frontend_port)
				return &peers->peer[i];
	}
	return peers ? &peers->peer[peers->next++ % PEERS] : NULL;
}

static __always_inline void peers_forget(void *ctx)
{
	u64 cookie = get_socket_cookie(ctx);

#pragma clang loop unroll(disable)
	for (u64 page = 0; page < PEER_PAGES; page++) {
		u64 key = cookie | page << PAGE_SHIFT;

		/* Deleting what is not there would still take the bucket's lock. */
		if (!map_lookup(sock_peers, &key))
			break;
		map_delete(sock_peers, &key);
	}
}

/* Replaces a backend's address by the frontend's. */
static __always_inline bool peer_recall(struct bpf_sock_addr *ctx, struct target *from)
{
	struct peer *peer = peer_by_backend(get_socket_cookie(ctx), &from->addr, from->port);

	if (!peer)
		return false;
	from->addr = peer->frontend;
	from->port = peer->frontend_port;
	return true;
}

#endif
