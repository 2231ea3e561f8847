/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Origins: what a socket connected to, so that the application sees that address again.
 *
 * A connected socket has one peer: its origin is kept by socket cookie until the socket is closed
 * (the release hook), and never evicted. The slot of an unconnected one has the first frontend that
 * it sends to, see peers.h.
 *
 * With MPTCP a subflow connects: a TCP socket of the kernel's with a cookie of its own.
 * getpeername() and close() happen on the MPTCP socket: mptcp_subflows leads from there to the
 * subflow. The key is the MPTCP socket's kernel address, as it may have no cookie yet when its
 * subflow connects.
 */
#ifndef EBPFPROXY_ORIGIN_H
#define EBPFPROXY_ORIGIN_H

#include "addr.h"
#include "kernel_socket.h"
#include "load.h"
#include "maps.h"
#include "options.h"
#include "service.h"

static __always_inline u64 origin_key(u64 cookie, enum origin_kind kind)
{
	return cookie | (u64)kind << ORIGIN_KIND_SHIFT;
}

/* Returns the slot of a socket, which another one may have. */
static __always_inline struct origin *origin_slot(u64 cookie)
{
	u32 at = cookie & ORIGIN_SLOT_MASK;

	return map_lookup(sock_origin, &at);
}

/*
 * Writes into a slot that is free, or has a peer of this socket that was dropped. Nobody else reads
 * or writes what is in a reserved slot. Returns false where it is another's.
 */
static __always_inline bool origin_fill(struct origin *slot, u64 key, const struct peer *peer,
					u32 netns)
{
	const u64 cookie = cookie_of(key);
	const u64 before = slot->key;

	if (before &&
	    (before != origin_key(cookie, ORIGIN_UNCONNECTED) || slot->peer.frontend_port))
		return false;
	if (__sync_val_compare_and_swap(&slot->key, before, origin_key(cookie, ORIGIN_RESERVED)) !=
	    before)
		return false;
	slot->peer = *peer;
	slot->netns = netns;
	/* Another CPU sees the record before its key. A plain store does not say so everywhere. */
	__sync_lock_test_and_set(&slot->key, key);
	return true;
}

/* Frees the slot of the socket with this key; returns false where it is not that socket's. */
static __always_inline bool origin_free(struct origin *slot, u64 key)
{
	const u32 backend_id = slot->peer.backend_id;

	if (__sync_val_compare_and_swap(&slot->key, key, 0) != key)
		return false;
	if (key >> ORIGIN_KIND_SHIFT == ORIGIN_CONNECTED)
		load_remove_socket(backend_id);
	return true;
}

/* Finds a socket's record of this kind, which is connected, or closed. */
static __always_inline struct origin *origin_of_kind(u64 cookie, enum origin_kind kind)
{
	const u64 key = origin_key(cookie, kind);
	struct origin *slot = origin_slot(cookie), *known;

	if (!slot)
		return NULL;
	if (slot->key == key)
		return slot;
	known = slot->elsewhere ? map_lookup(sock_origin_overflow, &cookie) : NULL;
	return known && known->key == key ? known : NULL;
}

/* Finds the origin of a connected socket. */
static __always_inline struct origin *origin_of(u64 cookie)
{
	return origin_of_kind(cookie, ORIGIN_CONNECTED);
}

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
	u64 mptcp_socket = mptcp_socket_of(ctx), known;

	if (!mptcp_socket)
		return;
	known = subflow_cookie(mptcp_socket);
	if (!known || !origin_of(known))
		map_update(mptcp_subflows, &mptcp_socket, &cookie);
}

/* Inserts the origin of a socket that has none; returns false where there is no room. */
static __always_inline bool origin_insert(struct origin *slot, u64 cookie, const struct peer *peer,
					  u32 netns)
{
	struct origin o = {
		.key = origin_key(cookie, ORIGIN_CONNECTED),
		.peer = *peer,
		.netns = netns,
	};

	if (origin_fill(slot, o.key, peer, netns))
		return true;
	/* Whoever looks for the socket looks into the hash from now on. */
	__sync_fetch_and_add(&slot->elsewhere, 1);
	if (!bpf_map_update_elem(MAP(sock_origin_overflow), &cookie, &o, BPF_NOEXIST))
		return true;
	__sync_fetch_and_add(&slot->elsewhere, -1);
	return false;
}

/* Records and counts a connection; returns false where there is no room for its record. */
static __always_inline bool origin_remember(struct bpf_sock_addr *ctx, u64 cookie,
					    const struct target *frontend, u32 service_id,
					    u32 backend_id, struct backend *backend)
{
	struct origin *slot = origin_slot(cookie), *known;
	const struct peer peer = {
		.frontend = frontend->addr,
		.backend = backend->addr,
		.frontend_port = frontend->port,
		.backend_port = backend->port,
		.service_id = service_id,
		.backend_id = backend_id,
	};

	if (!slot)
		return false;
	if (HAVE_MPTCP && frontend->proto == IPPROTO_TCP)
		subflow_note(ctx, cookie);
	known = origin_of(cookie);
	if (known) {
		/* The socket failed to connect before, or it is one of datagrams. */
		load_remove_socket(known->peer.backend_id);
		known->peer = peer;
	} else if (!origin_insert(slot, cookie, &peer, netns_cookie(ctx))) {
		return false;
	}
	load_add_socket(backend);
	return true;
}

static __always_inline bool overflow_forget(struct origin *slot, u64 cookie)
{
	const u64 key = origin_key(cookie, ORIGIN_CONNECTED);
	struct origin *known = map_lookup(sock_origin_overflow, &cookie);
	u32 backend_id;

	/* Deleting a missing element would still take the bucket's lock. */
	if (!known)
		return false;
	backend_id = known->peer.backend_id;
	/* A closed socket is no longer counted. */
	if (__sync_val_compare_and_swap(&known->key, key, origin_key(cookie, ORIGIN_RESERVED)) !=
	    key)
		return false;
	load_remove_socket(backend_id);
	if (!map_delete(sock_origin_overflow, &cookie))
		__sync_fetch_and_add(&slot->elsewhere, -1);
	return true;
}

/* Forgets the origin: a socket that failed to connect may connect again, and then to no Service. */
static __always_inline bool origin_forget(u64 cookie)
{
	struct origin *slot = origin_slot(cookie);
	const u64 key = origin_key(cookie, ORIGIN_CONNECTED);

	if (!slot)
		return false;
	/* The socket's pages stay. */
	if (slot->key != key)
		return slot->elsewhere && overflow_forget(slot, cookie);
	return origin_free(slot, key);
}

/*
 * Keeps the record of a socket that is closed, since its connection may go on for a while. Once
 * that ends, sock_ops.c counts what it has sent and received. Returns false where sock_ops.c does
 * not follow the socket.
 */
static __always_inline bool origin_close(u64 cookie)
{
	const u64 key = origin_key(cookie, ORIGIN_CONNECTED);
	struct origin *known = origin_of(cookie);
	u32 backend_id;

	if (!known || !known->peer.began)
		return false;
	/* Once the record is closed, its end may free it on another CPU, for another socket. */
	backend_id = known->peer.backend_id;
	if (__sync_val_compare_and_swap(&known->key, key, origin_key(cookie, ORIGIN_CLOSED)) != key)
		return false;
	load_remove_socket(backend_id);
	return true;
}

/* Finds what origin_close() has kept. */
static __always_inline struct origin *origin_closed(u64 cookie)
{
	return origin_of_kind(cookie, ORIGIN_CLOSED);
}

/* Forgets it; returns false where there is none. */
static __always_inline bool origin_end(u64 cookie)
{
	const u64 key = origin_key(cookie, ORIGIN_CLOSED);
	struct origin *slot = origin_slot(cookie);

	if (!slot || !origin_closed(cookie))
		return false;
	if (__sync_val_compare_and_swap(&slot->key, key, 0) == key)
		return true;
	if (map_delete(sock_origin_overflow, &cookie))
		return false;
	__sync_fetch_and_add(&slot->elsewhere, -1);
	return true;
}

/*
 * Forgets the subflow of a closed MPTCP socket: no program sees the end of the subflow itself.
 * @goes_on: the connection may go on.
 */
static __always_inline void subflow_forget(u64 mptcp_socket, bool goes_on)
{
	u64 cookie = subflow_cookie(mptcp_socket);

	if (!cookie)
		return;
	if (!goes_on || !origin_close(cookie))
		origin_forget(cookie);
	map_delete(mptcp_subflows, &mptcp_socket);
}

/* Replaces a backend's address by the frontend's. */
static __always_inline bool origin_recall(u64 cookie, struct target *peer)
{
	struct origin *o = origin_of(cookie);

	if (!o || o->peer.backend_port != peer->port || !addr_equal(&o->peer.backend, &peer->addr))
		return false;
	peer->addr = o->peer.frontend;
	peer->port = o->peer.frontend_port;
	return true;
}

/*
 * Finds where a connected socket's datagrams go when it sends to the very address that it connected
 * to.
 */
static __always_inline bool origin_sends(struct bpf_sock_addr *ctx, const struct target *to,
					 struct target *goes)
{
	struct origin *o = origin_of(known_socket_cookie(ctx));

	if (!o || o->peer.frontend_port != to->port || !addr_equal(&o->peer.frontend, &to->addr))
		return false;
	goes->addr = o->peer.backend;
	goes->port = o->peer.backend_port;
	return true;
}

#endif
