/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Origins: what a socket connected to, so that the application sees that address again.
 *
 * A connected socket has one peer: its origin is kept by socket cookie until the socket is closed
 * (the release hook), and never evicted. An unconnected one may talk to many: see peers.h.
 *
 * With MPTCP a subflow connects: a TCP socket of the kernel's with a cookie of its own.
 * getpeername() and close() happen on the MPTCP socket: mptcp_subflows leads from there to the
 * subflow. The key is the MPTCP socket's kernel address, as it may have no cookie yet when its
 * subflow connects.
 */
#ifndef EBPFPROXY_ORIGIN_H
#define EBPFPROXY_ORIGIN_H

#include "addr.h"
#include "load.h"
#include "maps.h"
#include "options.h"
#include "service.h"

/* bcc declares the result as u32 and would cut it. */
static u64 (*get_socket_cookie)(void *ctx) = (void *)BPF_FUNC_get_socket_cookie;

/* No header of bcc declares this helper. */
static void *(*skc_to_mptcp_sock)(void *sk) = (void *)BPF_FUNC_skc_to_mptcp_sock;

static __always_inline bool is_mptcp(u32 protocol)
{
	return HAVE_MPTCP && protocol == IPPROTO_MPTCP;
}

/*
 * Returns the cookie of the subflow with which an MPTCP socket connected to a Service; 0 without
 * one.
 */
static __always_inline u64 subflow_cookie(u64 mptcp_socket)
{
	u64 *subflow = map_lookup(mptcp_subflows, &mptcp_socket);

	return subflow ? *subflow : 0;
}

/* Records the socket if it is the first subflow of an MPTCP connection. */
static __always_inline void subflow_note(struct bpf_sock_addr *ctx, u64 cookie)
{
	u64 mptcp_socket = (u64)skc_to_mptcp_sock(ctx->sk), known;

	if (!mptcp_socket)
		return;
	known = subflow_cookie(mptcp_socket);
	if (!known || !map_lookup(sock_origin, &known))
		map_update(mptcp_subflows, &mptcp_socket, &cookie);
}

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
		.netns = (u32)bpf_get_netns_cookie(ctx),
	};

	struct origin *known;

	if (HAVE_MPTCP && frontend->proto == IPPROTO_TCP)
		subflow_note(ctx, cookie);
	if (!bpf_map_update_elem(MAP(sock_origin), &cookie, &o, BPF_NOEXIST)) {
		load_add_socket(backend_id);
		return;
	}
	/* The socket failed to connect before, or is a datagram socket that gets another peer. */
	known = map_lookup(sock_origin, &cookie);
	if (!known)
		return;
	load_remove_socket(known->backend_id);
	load_add_socket(backend_id);
	*known = o;
}

/* Forgets the origin: a socket that failed to connect may connect again, and then to no Service. */
static __always_inline void origin_forget(u64 cookie)
{
	struct origin *known = map_lookup(sock_origin, &cookie);
	u32 backend_id;

	/* Deleting a missing element would still take the bucket's lock. */
	if (!known)
		return;
	backend_id = known->backend_id;
	if (!map_delete(sock_origin, &cookie))
		load_remove_socket(backend_id);
}

/* Forgets the subflow of a closed MPTCP socket: no program sees the end of the subflow itself. */
static __always_inline void subflow_forget(u64 mptcp_socket)
{
	u64 cookie = subflow_cookie(mptcp_socket);

	if (!cookie)
		return;
	origin_forget(cookie);
	map_delete(mptcp_subflows, &mptcp_socket);
}

/* Replaces a backend's address by the frontend's. */
static __always_inline bool origin_recall(u64 cookie, struct target *peer)
{
	struct origin *o = map_lookup(sock_origin, &cookie);

	if (!o || o->backend_port != peer->port || !addr_equal(&o->backend, &peer->addr))
		return false;
	peer->addr = o->frontend;
	peer->port = o->frontend_port;
	return true;
}

/*
 * Finds where a connected socket's datagrams go when it sends to the very address that it connected
 * to.
 */
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
