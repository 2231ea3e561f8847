/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a socket asked for, so that it can be told the same address back.
 *
 * A connected socket has one peer: its origin is kept by socket cookie until the socket is closed
 * (the release hook), and never evicted. An unconnected one may talk to many: see peers.h.
 */
#ifndef EBPFPROXY_ORIGIN_H
#define EBPFPROXY_ORIGIN_H

#include "addr.h"
#include "load.h"
#include "maps.h"
#include "service.h"

/* bcc declares the cookie as u32 and would cut it. */
static u64 (*get_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

static __always_inline void origin_remember(struct bpf_sock_addr *ctx,
					    const struct target *frontend, u32 service_id,
					    u32 backend_id, const struct backend *backend)
{
	u64 cookie = get_socket_cookie(ctx);
	struct origin o = {
		.frontend = frontend->addr,
		.backend = backend->addr,
		.frontend_port = frontend->port,
		.backend_port = backend->port,
		.service_id = service_id,
		.backend_id = backend_id,
	};

	struct origin *known;

	if (!bpf_map_update_elem(MAP(sock_origin), &cookie, &o, BPF_NOEXIST)) {
		load_add_socket(backend_id);
		return;
	}
	/* It failed to connect before, or is a datagram socket with another peer now. */
	known = map_lookup(sock_origin, &cookie);
	if (!known)
		return;
	load_remove_socket(known->backend_id);
	load_add_socket(backend_id);
	*known = o;
}

/* A socket that failed to connect may connect again, and then to no Service. */
static __always_inline void origin_forget(void *ctx)
{
	u64 cookie = get_socket_cookie(ctx);
	struct origin *known = map_lookup(sock_origin, &cookie);
	u32 backend_id;

	/* Deleting what is not there would still take the bucket's lock. */
	if (!known)
		return;
	backend_id = known->backend_id;
	if (!map_delete(sock_origin, &cookie))
		load_remove_socket(backend_id);
}

/* Replaces a backend's address by the frontend's. */
static __always_inline bool origin_recall(struct bpf_sock_addr *ctx, struct target *peer)
{
	u64 cookie = get_socket_cookie(ctx);
	struct origin *o = map_lookup(sock_origin, &cookie);

	if (!o || o->backend_port != peer->port || !addr_equal(&o->backend, &peer->addr))
		return false;
	peer->addr = o->frontend;
	peer->port = o->frontend_port;
	return true;
}

/* Where a connected socket's datagrams go that it sends to the very address that it asked for. */
static __always_inline bool origin_sends(struct bpf_sock_addr *ctx, const struct target *to,
					 struct target *goes)
{
	u64 cookie = get_socket_cookie(ctx);
	struct origin *o = map_lookup(sock_origin, &cookie);

	if (!o || o->frontend_port != to->port || !addr_equal(&o->frontend, &to->addr))
		return false;
	goes->addr = o->backend;
	goes->port = o->backend_port;
	return true;
}

#endif
