/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services at the socket (BPF_PROG_TYPE_CGROUP_SOCK_ADDR): connect() and unconnected sends go to a
 * backend's own address, and the application sees the frontend's address. Packets then need no
 * translation. Sockets and addresses of no Service are left exactly as they are.
 */
#include "lib/compat.h"
#include "lib/datagram.h"
#include "lib/origin.h"
#include "lib/peers.h"
#include "lib/socket.h"
#include "lib/socket_service.h"

/* Sets @backend where there is one to connect to. */
static __always_inline int handle_connect(struct bpf_sock_addr *ctx, const struct target *to,
					  struct backend **backend)
{
	struct service *svc = find_service(ctx, to);
	struct client client;
	enum verdict verdict;
	u32 backend_id;

	if (skip_translation(ctx, to, svc)) {
		if (!svc && to->proto != IPPROTO_UDP && is_unused_port(ctx, to))
			return reject(VERDICT_REFUSE);
		if (!svc && to->proto != IPPROTO_UDP && is_unallocated_target(ctx, to))
			return reject(VERDICT_DROP);
		origin_forget(get_socket_cookie(ctx));
		return PROCEED;
	}
	client = client_of(ctx, svc, to);
	verdict = choose(svc, &client, &backend_id, backend);
	if (verdict != VERDICT_TRANSLATE) {
		if (to->proto != IPPROTO_UDP)
			return reject(verdict);
		/* Nothing is sent yet: packets are rejected as long as there is no endpoint. */
		origin_forget(get_socket_cookie(ctx));
		return PROCEED;
	}
	origin_remember(ctx, to, svc->id, backend_id, *backend);
	return PROCEED;
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct target to = target4(ctx);
	struct backend *backend = NULL;
	int proceed = handle_connect(ctx, &to, &backend);

	if (proceed == PROCEED && backend)
		set_target4(ctx, &backend->addr, backend->port);
	return proceed;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct target to = target6(ctx);
	struct backend *backend = NULL;
	int proceed = handle_connect(ctx, &to, &backend);

	if (proceed == PROCEED && backend)
		set_target6(ctx, &backend->addr, backend->port);
	return proceed;
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct target to = target4(ctx), goes = {};
	int proceed = handle_sendmsg(ctx, &to, &goes);

	if (proceed == PROCEED && goes.port)
		set_target4(ctx, &goes.addr, goes.port);
	return proceed;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct target to = target6(ctx), goes = {};
	int proceed = handle_sendmsg(ctx, &to, &goes);

	if (proceed == PROCEED && goes.port)
		set_target6(ctx, &goes.addr, goes.port);
	return proceed;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct target from = target4(ctx);

	if (handle_recvmsg(ctx, &from))
		set_target4(ctx, &from.addr, from.port);
	return PROCEED;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct target from = target6(ctx);

	if (handle_recvmsg(ctx, &from))
		set_target6(ctx, &from.addr, from.port);
	return PROCEED;
}

/* Returns the cookie by which the socket's origin is kept. */
static __always_inline u64 origin_cookie(struct bpf_sock_addr *ctx)
{
	return is_mptcp(ctx->protocol) ? subflow_cookie((u64)ctx->sk) : get_socket_cookie(ctx);
}

int getpeername4(struct bpf_sock_addr *ctx)
{
	struct target peer = target4(ctx);

	if (origin_recall(origin_cookie(ctx), &peer))
		set_target4(ctx, &peer.addr, peer.port);
	return PROCEED;
}

int getpeername6(struct bpf_sock_addr *ctx)
{
	struct target peer = target6(ctx);

	if (origin_recall(origin_cookie(ctx), &peer))
		set_target6(ctx, &peer.addr, peer.port);
	return PROCEED;
}

/* Runs when the socket is closed (BPF_PROG_TYPE_CGROUP_SOCK). */
int sock_release(struct bpf_sock *ctx)
{
	const u64 cookie = get_socket_cookie(ctx);

	if (is_mptcp(ctx->protocol)) {
		subflow_forget((u64)ctx);
		return PROCEED;
	}
	origin_forget(cookie);
	if (service_protocol(ctx->protocol) == IPPROTO_UDP)
		peers_forget(cookie);
	return PROCEED;
}
