/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which Service a socket asks, and whether a backend is chosen at the socket. */
#ifndef EBPFPROXY_SOCKET_SERVICE_H
#define EBPFPROXY_SOCKET_SERVICE_H

#include "options.h"
#include "service.h"
#include "service_cidr.h"
#include "socket.h"

/*
 * Sockets of pods may be left to packets: something in the pod that redirects what it sends, such
 * as a service mesh, then sees Services.
 */
static __always_inline bool is_served(struct bpf_sock_addr *ctx)
{
	return POD_SOCKETS || in_host_namespace(ctx);
}

static __always_inline bool reaches_this_node(struct bpf_sock_addr *ctx,
					      const struct inet_addr *addr)
{
	/* A pod's loopback is the pod's own. */
	if (addr_is_loopback(addr))
		return NODEPORTS_ON_LOOPBACK && in_host_namespace(ctx);
	return addr_is_this_node(addr);
}

static __always_inline struct service *find_service(struct bpf_sock_addr *ctx,
						    const struct target *to)
{
	struct service *svc;

	if (!is_served(ctx))
		return NULL;
	svc = service_by_address(to, SCOPE_INTERNAL);

	if (svc)
		return svc;
	svc = service_by_node_port(to, SCOPE_INTERNAL);
	return svc && reaches_this_node(ctx, &to->addr) ? svc : NULL;
}

/* Says if the socket's packets would have an allowed source; a pod's are looked at instead. */
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
 * Says if a socket is bound to the loopback, by its address or device, and asks for a port of this
 * node: from there no route leads to a backend. Its packets are translated as they leave by lo.
 */
static __always_inline bool defer_to_loopback(struct bpf_sock_addr *ctx, const struct target *to)
{
	struct inet_addr bound;

	if (!NODEPORTS_ON_LOOPBACK || !ctx->sk)
		return false;
	/* Most are not bound, which costs no call of the kernel. */
	if (ctx->sk->bound_dev_if != LOOPBACK_IFINDEX &&
	    !(bound_address(ctx, &bound) && addr_is_loopback(&bound)))
		return false;
	return in_host_namespace(ctx) && reaches_this_node(ctx, &to->addr);
}

/*
 * Nothing to choose at the socket: an address of no Service, one where this node answers itself,
 * one that is asked from the loopback, or one whose clients are told apart by their own address,
 * which a pod's socket may not have yet; packets do.
 */
static __always_inline bool skip_translation(struct bpf_sock_addr *ctx, const struct target *to,
					     const struct service *svc)
{
	return !svc || svc->flags & SERVICE_OWN || defer_to_loopback(ctx, to) ||
	       (svc->flags & SERVICE_SOURCES && !source_is_known_good(ctx, to, svc));
}

/* A port that a cluster IP does not have; only asked where no Service was found. */
static __always_inline bool is_unused_port(struct bpf_sock_addr *ctx, const struct target *to)
{
	return is_served(ctx) && is_cluster_ip(&to->addr);
}

/*
 * An address of the Service network that nobody has; only asked where no Service was found. What a
 * socket sends there never leaves: it is told so at once. connect() of a datagram socket sends
 * nothing, and resolvers order addresses by whether it succeeds. A host outside that has such an
 * address is answered.
 */
static __always_inline bool is_unallocated_target(struct bpf_sock_addr *ctx,
						  const struct target *to)
{
	if (!is_served(ctx) || !is_unallocated(&to->addr))
		return false;
	if (to->proto == IPPROTO_UDP && is_outside_client(&to->addr))
		return false;
	count_unallocated(&to->addr, UNALLOCATED_SOCKET);
	return true;
}

/*
 * A socket's client is its namespace. Nothing tells one flow of it from another but the socket
 * itself: datagrams of one socket stay together under Maglev, as those of one port do in packets.
 */
static __always_inline struct client client_of(struct bpf_sock_addr *ctx, const struct service *svc,
					       const struct target *to)
{
	struct client client = { .frontend = to->addr };
	u64 cookie;

	if (!needs_client_key(svc))
		return client;
	set_namespace(&client, bpf_get_netns_cookie(ctx));
	cookie = get_socket_cookie(ctx);
	client.flow = (u32)(cookie ^ cookie >> 32);
	return client;
}

#endif
