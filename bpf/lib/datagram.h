/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Datagrams of sockets: where they are sent, and which source address the application sees. */
#ifndef EBPFPROXY_DATAGRAM_H
#define EBPFPROXY_DATAGRAM_H

#include "decision_socket.h"
#include "events.h"
#include "origin.h"
#include "peers.h"
#include "socket.h"
#include "socket_service.h"

/*
 * Says if an unconnected socket uses this backend for another frontend: replies for the two could
 * not be told apart.
 */
static __always_inline bool is_shared(u64 cookie, const struct backend *backend)
{
	return peer_by_backend(cookie, &backend->addr, backend->port) != NULL;
}

#define OTHER_TRIES 2

/* Looks for a backend that the socket does not use for another frontend yet, for a few tries. */
static __always_inline bool choose_other(u64 cookie, const struct service *svc, u32 *backend_id,
					 struct backend **backend)
{
	const struct chooser who = { true, cookie };
	union selection range = selection_of(selection_index(svc, policy_of(svc)));
	u32 at = slot_at(&range, random_number(&who));

	if (!range.count)
		return false;
#pragma clang loop unroll(disable)
	for (int i = 0; i < OTHER_TRIES; i++) {
		union slot *slot = map_lookup(slots, &at);
		u32 id;

		if (!slot)
			break;
		id = slot->backend_id;
		*backend = backend_of(id);
		if (*backend && !is_shared(cookie, *backend)) {
			*backend_id = id;
			return true;
		}
		at++;
		if (at >= range.base + range.count)
			at = range.base;
	}
	return false;
}

/* Says if packets to the frontend pass a device with our programs on their way to the backend. */
static __always_inline bool passes_our_device(struct bpf_sock_addr *ctx, const struct service *svc,
					      const struct backend *backend)
{
	return !in_host_namespace(ctx) ||
	       (svc->kind != KIND_NODE_PORT && !addr_is_this_node(&backend->addr));
}

/*
 * Says if a socket of the host is left to the packet programs since it names the device by which it
 * sends (IP_UNICAST_IF, as systemd-resolved's do): that device leads to the Service, but to the
 * backend another one may. The kernel looks up the backend's route without it where netfilter has
 * translated a packet, and so do programs. IPv6 looks it up without it in any case.
 */
static __always_inline bool is_sent_by_device(struct bpf_sock_addr *ctx, const struct target *to,
					      const struct service *svc,
					      const struct backend *backend)
{
	return addr_is_v4(&to->addr) && has_unicast_device(ctx) && in_host_namespace(ctx) &&
	       passes_our_device(ctx, svc, backend);
}

/* Makes the packet programs give the flow from this socket's port to the frontend another port. */
static __always_inline void note_clash(struct bpf_sock_addr *ctx, const struct target *to)
{
	struct clash_key key = {
		.frontend = to->addr,
		.frontend_port = to->port,
		.client_port = bpf_htons(socket_of(ctx)->src_port),
	};
	u32 yes = 1;

	if (!map_lookup(port_clashes, &key))
		map_update(port_clashes, &key, &yes);
}

static __always_inline void count_full(void)
{
	u32 index = EVENT_SOCKETS_FULL;
	u64 *counter = map_lookup(packet_events, &index);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

/*
 * Leaves a socket without room for its record to the packet programs, which translate replies, too.
 * Returns false where its packets do not pass them.
 */
static __always_inline bool leave_to_packets(struct bpf_sock_addr *ctx, const struct target *to,
					     const struct service *svc,
					     const struct backend *backend)
{
	count_full();
	if (!passes_our_device(ctx, svc, backend))
		return false;
	/* Another frontend of the socket has the same backend, or may get it later. */
	if (has_peers(known_socket_cookie(ctx)))
		note_clash(ctx, to);
	return true;
}

/*
 * Handles the first datagram to a frontend, or one whose backend has left. If two frontends had the
 * same backend, the socket could not tell their replies apart: the second frontend gets another
 * backend; failing that, its datagrams are left to the packet programs, which give the flow another
 * port.
 */
static __always_inline int assign_backend(struct bpf_sock_addr *ctx, const struct target *to,
					  const struct service *svc, struct backend **backend)
{
	struct client client = client_of(ctx, svc, to);
	const u64 cookie = known_socket_cookie(ctx);
	const struct chooser who = { true, cookie };
	/*
	 * This is read before the choice: the next datagram notices a backend that departs
	 * meanwhile.
	 */
	const u32 epoch = epoch_of(svc->id);
	struct peer peer = {};
	enum choice choice;
	u32 backend_id;

	choice = service_choose(svc, NULL, &who, &client, &backend_id, backend);
	if (choice != CHOICE_BACKEND) {
		count_service(svc->id, choice);
		return refuse(ctx, to, svc, choice);
	}
	if (is_shared(cookie, *backend)) {
		struct backend *only = *backend;

		if (needs_client_key(svc) || !choose_other(cookie, svc, &backend_id, backend)) {
			*backend = only;
			if (passes_our_device(ctx, svc, only)) {
				note_clash(ctx, to);
				*backend = NULL;
				return PROCEED;
			}
		}
	}
	if (is_sent_by_device(ctx, to, svc, *backend)) {
		*backend = NULL;
		return PROCEED;
	}
	peer.frontend = to->addr;
	peer.backend = (*backend)->addr;
	peer.frontend_port = to->port;
	peer.backend_port = (*backend)->port;
	peer.service_id = svc->id;
	peer.backend_id = backend_id;
	peer.epoch = epoch;
	if (!peer_insert(cookie, netns_cookie(ctx), &peer,
			 !passes_our_device(ctx, svc, *backend)) &&
	    leave_to_packets(ctx, to, svc, *backend)) {
		*backend = NULL;
		return PROCEED;
	}
	count_service(svc->id, CHOICE_BACKEND);
	load_count_datagram(*backend);
	decision_chosen(ctx, to, svc, &client, backend_id);
	return PROCEED;
}

/* Sets @goes to where the datagram has to go, if that is not @to. */
static __always_inline int handle_sendmsg(struct bpf_sock_addr *ctx, const struct target *to,
					  struct target *goes)
{
	struct service *svc = find_socket_service(ctx, to);
	struct backend *backend;
	int proceed = PROCEED;
	u32 left = NOBODY;

	if (skip_translation(ctx, to, svc)) {
		if (!svc && is_unused_port(ctx, to, address_of_interest(&to->addr)))
			return refuse(ctx, to, NULL, CHOICE_REFUSE);
		return !svc && is_unallocated_target(ctx, to) ? refuse(ctx, to, NULL, CHOICE_DROP)
							      : PROCEED;
	}
	if (is_connected(ctx) && (origin_sends(ctx, to, goes) || is_to_peer(ctx, to)))
		return PROCEED;
	backend = peer_backend(known_socket_cookie(ctx), to, svc, &left);
	if (backend) {
		count_service(svc->id, CHOICE_BACKEND);
		load_count_datagram(backend);
	} else {
		if (left != NOBODY)
			decision_left(ctx, to, svc, left);
		proceed = assign_backend(ctx, to, svc, &backend);
	}
	if (proceed == PROCEED && backend) {
		goes->addr = backend->addr;
		goes->port = backend->port;
	}
	return proceed;
}

/* Replaces a datagram's source by the frontend, whether the socket is connected or not. */
static __always_inline bool handle_recvmsg(struct bpf_sock_addr *ctx, struct target *from)
{
	u64 cookie;

	/* Most sockets that are of no Service are told by the port of what they receive. */
	if (!may_be_backend(&from->addr, from->port))
		return false;
	cookie = known_socket_cookie(ctx);
	if (is_connected(ctx))
		return origin_recall(cookie, from) || peer_recall(cookie, from);
	return peer_recall(cookie, from) || origin_recall(cookie, from);
}

#endif
