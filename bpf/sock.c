/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services at the socket (BPF_PROG_TYPE_CGROUP_SOCK_ADDR): connect() and unconnected sends go to a
 * backend's own address, and the application sees the frontend's address. Packets then need no
 * translation. Sockets and addresses of no Service are left exactly as they are.
 */
#include "lib/compat.h"
#include "lib/datagram.h"
#include "lib/decision_socket.h"
#include "lib/measure.h"
#include "lib/origin.h"
#include "lib/peers.h"
#include "lib/socket.h"
#include "lib/socket_service.h"

/* Forgets what the socket connected to before. */
static __always_inline void forget_origin(struct bpf_sock_addr *ctx)
{
	const u64 cookie = cookie_if_any(ctx);

	if (cookie)
		origin_forget(cookie);
}

/* Handles a connection that is not translated; @svc is NULL where it goes to no Service. */
static __always_inline int connect_as_is(struct bpf_sock_addr *ctx, const struct target *to,
					 const struct service *svc, bool is_known)
{
	/* A socket of ping's has no port. Whether there is an echo is for packets to tell. */
	if (to->proto == IPPROTO_ICMP || to->proto == IPPROTO_ICMPV6)
		return PROCEED;
	if (!svc && to->proto != IPPROTO_UDP) {
		if (is_unused_port(ctx, to, is_known))
			return refuse(ctx, to, NULL, CHOICE_REFUSE);
		if (is_unallocated_target(ctx, to))
			return refuse(ctx, to, NULL, CHOICE_DROP);
	}
	/*
	 * A helper is called for the cookie of a TCP socket only where its peer may be a backend.
	 * If the socket failed to connect to a Service before, and connects to somebody else now,
	 * the agent's sweep removes the record then.
	 */
	if (HAVE_SOCKET_FIELDS || to->proto != IPPROTO_TCP || may_be_backend(&to->addr, to->port))
		forget_origin(ctx);
	return PROCEED;
}

/* Reads what a choice and its record need: all of it is cold where a Service is rarely used. */
static __always_inline void touch_for_choice(u64 cookie, const struct service *svc)
{
	const struct origin *slot = origin_slot(cookie);
	const u64 *choices = choices_of(svc->id);

	if (slot)
		touch(slot);
	if (choices)
		touch(choices);
}

/* Sets @backend where there is one to connect to. */
static __always_inline int handle_connect(struct bpf_sock_addr *ctx, const struct target *to,
					  struct backend **backend)
{
	const bool is_known = address_of_interest(&to->addr);
	struct chooser who = { .is_socket = true };
	struct service *svc = NULL;
	union selection range;
	struct client client;
	enum choice choice;
	struct found found;
	u32 backend_id;

	if (find_service_copy(ctx, to, is_known, &found))
		svc = &found.service;
	if (skip_translation(ctx, to, svc))
		return connect_as_is(ctx, to, svc, is_known);
	who.socket = get_socket_cookie(ctx);
	touch_for_choice(who.socket, svc);
	client = client_of(ctx, svc, to);
	range = range_of(&found);
	choice = service_choose(svc, &range, &who, &client, &backend_id, backend);
	if (choice != CHOICE_BACKEND) {
		count_service(svc->id, choice);
		if (to->proto != IPPROTO_UDP)
			return refuse(ctx, to, svc, choice);
		/* Nothing is sent yet: packets are rejected as long as there is no endpoint. */
		forget_origin(ctx);
		return PROCEED;
	}
	if (to->proto == IPPROTO_UDP && is_sent_by_device(ctx, to, svc, *backend)) {
		forget_origin(ctx);
		*backend = NULL;
		return PROCEED;
	}
	if (!origin_remember(ctx, who.socket, to, svc->id, backend_id, *backend)) {
		/* A resolver compares the source of a reply with the address that it has asked. */
		if (to->proto == IPPROTO_UDP && leave_to_packets(ctx, to, svc, *backend)) {
			*backend = NULL;
			return PROCEED;
		}
		load_count_datagram(*backend);
	}
	count_service(svc->id, CHOICE_BACKEND);
	decision_chosen(ctx, to, svc, &client, backend_id);
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
	return is_mptcp(ctx->protocol) ? subflow_cookie((u64)socket_of(ctx))
				       : known_socket_cookie(ctx);
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

/*
 * Says if something may be recorded of a socket, as far as its peer tells. A TCP socket may have
 * failed to connect. Most accepted sockets are told by their peer's port. For others the cookie
 * tells more than the peer's address does, if it can be read.
 */
static __always_inline bool may_have_record(struct bpf_sock *ctx)
{
	struct inet_addr peer = addr_of_v4(ctx->dst_ip4);

	if (ctx->protocol != IPPROTO_TCP || !ctx->dst_port)
		return true;
	if (HAVE_SOCKET_FIELDS)
		return may_be_backend_port(ctx->dst_port);
	if (ctx->family == AF_INET6) {
		peer.word[0] = ctx->dst_ip6[0];
		peer.word[1] = ctx->dst_ip6[1];
		peer.word[2] = ctx->dst_ip6[2];
		peer.word[3] = ctx->dst_ip6[3];
	}
	return may_be_backend(&peer, ctx->dst_port);
}

/*
 * Counts a connection that its client gives up. When the socket's state changes after this, its
 * record is gone.
 */
static __always_inline void note_abandoned(struct bpf_sock *ctx)
{
	struct origin *known;
	u64 cookie;

	if (!MEASURE_CONNECTIONS || ctx->state != BPF_TCP_SYN_SENT)
		return;
	if (is_mptcp(ctx->protocol))
		cookie = subflow_cookie((u64)ctx);
	else if (ctx->protocol == IPPROTO_TCP)
		cookie = closed_cookie_if_any(ctx);
	else
		return;
	known = origin_of(cookie);
	if (known && known->peer.began)
		measure_failure(known->peer.service_id, known->peer.backend_id, FAILURE_ABANDONED);
}

/* Says if the connection of a socket that is closed goes on, and its record with it. */
static __always_inline bool outlives_socket(struct bpf_sock *ctx, u64 cookie)
{
	return MEASURE_TRAFFIC && ctx->protocol == IPPROTO_TCP && ctx->state != BPF_TCP_CLOSE &&
	       ctx->state != BPF_TCP_SYN_SENT && origin_close(cookie);
}

/* Runs when the socket is closed (BPF_PROG_TYPE_CGROUP_SOCK). */
int sock_release(struct bpf_sock *ctx)
{
	u64 cookie;

	note_abandoned(ctx);
	if (is_mptcp(ctx->protocol)) {
		subflow_forget((u64)ctx, MEASURE_TRAFFIC && ctx->state != BPF_TCP_SYN_SENT);
		return PROCEED;
	}
	if (!may_have_record(ctx))
		return PROCEED;
	cookie = closed_cookie_if_any(ctx);
	if (cookie && !outlives_socket(ctx, cookie))
		socket_forget(cookie);
	return PROCEED;
}
