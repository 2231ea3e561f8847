/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The socket that a cgroup program (BPF_PROG_TYPE_CGROUP_SOCK_ADDR) runs for, and the address in
 * its context.
 */
#ifndef EBPFPROXY_SOCKET_H
#define EBPFPROXY_SOCKET_H

#include "addr.h"
#include "kernel_socket.h"
#include "options.h"
#include "service.h"

/* These are the values that a cgroup program returns to the kernel. */
#define REJECT	0
#define PROCEED 1

static __always_inline struct target target4(struct bpf_sock_addr *ctx)
{
	return (struct target) { addr_of_v4(ctx->user_ip4), ctx->user_port,
				 service_protocol(ctx->protocol) };
}

static __always_inline struct target target6(struct bpf_sock_addr *ctx)
{
	struct target to = { .port = ctx->user_port, .proto = service_protocol(ctx->protocol) };

	to.addr.word[0] = ctx->user_ip6[0];
	to.addr.word[1] = ctx->user_ip6[1];
	to.addr.word[2] = ctx->user_ip6[2];
	to.addr.word[3] = ctx->user_ip6[3];
	return to;
}

static __always_inline void set_target4(struct bpf_sock_addr *ctx, const struct inet_addr *addr,
					__be16 port)
{
	ctx->user_ip4 = addr->word[3];
	ctx->user_port = port;
}

static __always_inline void set_target6(struct bpf_sock_addr *ctx, const struct inet_addr *addr,
					__be16 port)
{
	ctx->user_ip6[0] = addr->word[0];
	ctx->user_ip6[1] = addr->word[1];
	ctx->user_ip6[2] = addr->word[2];
	ctx->user_ip6[3] = addr->word[3];
	ctx->user_port = port;
}

static __always_inline bool in_host_namespace(struct bpf_sock_addr *ctx)
{
	return netns_cookie(ctx) == CONSTANT(HOST_NETNS_COOKIE);
}

/* Finds the address that a socket is bound to; returns false where it has none yet. */
static __always_inline bool bound_address(struct bpf_sock_addr *ctx, struct inet_addr *addr)
{
	struct bpf_sock *sk = socket_of(ctx);

	if (!sk)
		return false;
	if (sk->family == AF_INET) {
		*addr = addr_of_v4(sk->src_ip4);
		return addr->word[3];
	}
	addr->word[0] = sk->src_ip6[0];
	addr->word[1] = sk->src_ip6[1];
	addr->word[2] = sk->src_ip6[2];
	addr->word[3] = sk->src_ip6[3];
	return addr->word[0] | addr->word[1] | addr->word[2] | addr->word[3];
}

/* Says if the socket has a peer. */
static __always_inline bool is_connected(struct bpf_sock_addr *ctx)
{
	return socket_of(ctx)->dst_port != 0;
}

/*
 * Says if a connected socket sends to the very address that it is connected to, since it connected
 * while no Service served that: replies come from there alone. (For an IPv4-mapped peer the kernel
 * passes the address with each datagram.)
 */
static __always_inline bool is_to_peer(struct bpf_sock_addr *ctx, const struct target *to)
{
	const struct bpf_sock *sk = socket_of(ctx);
	struct inet_addr peer = addr_of_v4(sk->dst_ip4);

	if ((__be16)sk->dst_port != to->port)
		return false;
	if (!addr_is_v4(&to->addr)) {
		peer.word[0] = sk->dst_ip6[0];
		peer.word[1] = sk->dst_ip6[1];
		peer.word[2] = sk->dst_ip6[2];
		peer.word[3] = sk->dst_ip6[3];
	}
	return addr_equal(&peer, &to->addr);
}

static __always_inline int reject_call(enum choice choice)
{
	if (HAVE_SET_RETVAL)
		bpf_set_retval(choice == CHOICE_REFUSE ? -ECONNREFUSED : -EHOSTUNREACH);
	return REJECT;
}

#endif
