/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Finding the Service for a socket, and deciding whether the backend is chosen at the socket. */
#ifndef EBPFPROXY_SOCKET_SERVICE_H
#define EBPFPROXY_SOCKET_SERVICE_H

#include "filter.h"
#include "frontend_cache.h"
#include "options.h"
#include "service.h"
#include "service_cidr.h"
#include "socket.h"

/*
 * Says if sockets of this namespace are served here. Those of pods may be left to packets, so that
 * a service mesh in the pod, which redirects what the pod sends, sees Services.
 */
static __always_inline bool is_served(struct bpf_sock_addr *ctx)
{
	return POD_SOCKETS || in_host_namespace(ctx);
}

static __always_inline bool reaches_this_node(struct bpf_sock_addr *ctx,
					      const struct inet_addr *addr)
{
	/* A pod's loopback belongs to the pod. */
	if (addr_is_loopback(addr))
		return NODEPORTS_ON_LOOPBACK && in_host_namespace(ctx);
	return addr_is_this_node(addr);
}

/*
 * Says if a frontend may have the address and port: two array lookups spare the others a search.
 * @is_known: address_of_interest().
 */
static __always_inline bool may_be_frontend(const struct target *to, bool is_known)
{
	return port_of_interest(to->port) &&
	       (is_known || (NODEPORTS_ON_LOOPBACK && addr_is_loopback(&to->addr)));
}

/*
 * Finds the Service that a socket wants to connect to, and copies it. The unspecified address is a
 * NodePort's key; no frontend has that of the loopback.
 */
static __always_inline bool find_service_copy(struct bpf_sock_addr *ctx, const struct target *to,
					      bool is_known, struct found *found)
{
	struct target any = { .port = to->port, .proto = to->proto };

	if (!is_served(ctx) || !may_be_frontend(to, is_known))
		return false;
	if (!addr_is_loopback(&to->addr) && copy_service(to, found))
		return true;
	if (addr_is_v4(&to->addr))
		any.addr = addr_of_v4(0);
	return copy_service(&any, found) && reaches_this_node(ctx, &to->addr);
}

/* Finds the Service that a socket sends to. sendmsg() has no room left on its stack for a copy. */
static __always_inline struct service *find_socket_service(struct bpf_sock_addr *ctx,
							   const struct target *to)
{
	struct service *svc;

	if (!is_served(ctx) || !may_be_frontend(to, address_of_interest(&to->addr)))
		return NULL;
	svc = service_by_address(to, SCOPE_INTERNAL);
	if (svc)
		return svc;
	svc = service_by_node_port(to, SCOPE_INTERNAL);
	return svc && reaches_this_node(ctx, &to->addr) ? svc : NULL;
}

/* Says if the socket's packets will have an allowed source. A pod's packets are checked instead. */
static __always_inline bool source_is_known_good(struct bpf_sock_addr *ctx, const struct target *to,
						 const struct service *svc)
{
	struct inet_addr bound;

	if (!in_host_namespace(ctx))
		return false;
	if (!bound_address(ctx, &bound) || addr_equal(&bound, &to->addr))
		return svc->flags & SERVICE_HOST;
	return source_allowed(svc, &bound);
}

/*
 * Says if a socket is bound to the loopback, by its address or device, and connects to a port of
 * this node: no route leads from there to a backend. Its packets are translated when they leave by
 * lo.
 */
static __always_inline bool defer_to_loopback(struct bpf_sock_addr *ctx, const struct target *to)
{
	const struct bpf_sock *sk = socket_of(ctx);
	struct inet_addr bound;

	if (!NODEPORTS_ON_LOOPBACK || !sk)
		return false;
	/* Most sockets are not bound: these checks need no helper call. */
	if (sk->bound_dev_if != LOOPBACK_IFINDEX &&
	    !(bound_address(ctx, &bound) && addr_is_loopback(&bound)))
		return false;
	return in_host_namespace(ctx) && reaches_this_node(ctx, &to->addr);
}

/*
 * Says if no backend is chosen at the socket: the address belongs to no Service, this node itself
 * listens there, the socket is bound to the loopback, or clients are told apart by their source
 * address, which a pod's socket may not have yet; its packets do.
 */
static __always_inline bool skip_translation(struct bpf_sock_addr *ctx, const struct target *to,
					     const struct service *svc)
{
	return !svc || svc->flags & SERVICE_OWN || defer_to_loopback(ctx, to) ||
	       (svc->flags & SERVICE_SOURCES && !source_is_known_good(ctx, to, svc));
}

/* Says if a cluster IP does not have this port; called only where no Service was found. */
static __always_inline bool is_unused_port(struct bpf_sock_addr *ctx, const struct target *to,
					   bool is_known)
{
	return is_served(ctx) && is_known && is_cluster_ip(&to->addr);
}

/*
 * Says if no one has this address of the Service network; called only where no Service was found.
 * Nothing sent there may leave the node, so the socket gets an error at once. connect() of a
 * datagram socket succeeds: it sends nothing, and resolvers order addresses by its result. A host
 * outside that has such an address gets replies.
 */
static __always_inline bool is_unallocated_target(struct bpf_sock_addr *ctx,
						  const struct target *to)
{
	/* Asked first, since the rest needs a key on the stack. */
	if (!may_be_in_service_cidr(&to->addr) || !is_served(ctx) || !is_unallocated(&to->addr))
		return false;
	if (to->proto == IPPROTO_UDP && is_outside_client(&to->addr))
		return false;
	count_unallocated(&to->addr, UNALLOCATED_SOCKET);
	return true;
}

/*
 * Fills in a socket's client: its network namespace. Only the socket itself distinguishes its
 * flows: under Maglev all datagrams of one socket go to one backend, as those of one port do in
 * packets.
 */
static __always_inline struct client client_of(struct bpf_sock_addr *ctx, const struct service *svc,
					       const struct target *to)
{
	struct client client = { .frontend = to->addr };
	u64 cookie;

	if (!needs_client_key(svc))
		return client;
	set_namespace(&client, netns_cookie(ctx));
	cookie = known_socket_cookie(ctx);
	client.flow = (u32)(cookie ^ cookie >> 32);
	return client;
}

#endif
