/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How connections of sockets begin and end (BPF_PROG_TYPE_SOCK_OPS). It is attached only where
 * something is measured, since TCP calls it some times for every connection of the node, also for
 * those of no Service.
 *
 * A socket's record (origin.h) says which Service and backend it has. This program notes in there
 * that it follows the socket.
 */
#include "lib/compat.h"
#include "lib/measure.h"
#include "lib/origin.h"
#include "lib/socket.h"

/* Says if the socket connects to where its record says: an earlier attempt may have gone there. */
static __always_inline bool goes_to(struct bpf_sock_ops *ctx, const struct peer *peer)
{
	const __be16 port = bpf_htons((u16)bpf_ntohl(ctx->remote_port));
	__be32 addr = ctx->remote_ip6[3];

	barrier_var(addr);
	if (ctx->family == AF_INET)
		addr = ctx->remote_ip4;
	/* No two of the addresses that a socket tries are so alike. */
	return peer->backend_port == port && peer->backend.word[3] == addr;
}

/*
 * Asks for changes of the socket's state. This is never taken back: the flag may as well be that of
 * another program, of which nothing is known here.
 */
static __always_inline void follow_state(struct bpf_sock_ops *ctx)
{
	const u32 flags = ctx->bpf_sock_ops_cb_flags;

	if (!(flags & BPF_SOCK_OPS_STATE_CB_FLAG))
		bpf_sock_ops_cb_flags_set(ctx, flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* The socket is about to send its SYN. */
static __always_inline void connect_begins(struct bpf_sock_ops *ctx, struct origin *known)
{
	known->peer.began = 0;
	if (!goes_to(ctx, &known->peer))
		return;
	known->peer.began = measure_now();
	follow_state(ctx);
}

/* The reply to the SYN is there. */
static __always_inline void connect_done(struct bpf_sock_ops *ctx, struct origin *known)
{
	u64 us = ctx->srtt_us >> 3;

	/* The kernel has measured it more precisely, but not since a SYN that was lost. */
	if (ctx->total_retrans)
		us = measure_since_us(known->peer.began);
	if (MEASURE_CONNECTIONS)
		measure_connect(known->peer.service_id, us);
	if (MEASURE_TRAFFIC)
		/* Another program may have cleared the flag. */
		follow_state(ctx);
	else
		/* Nobody would end the record of a socket that is closed. */
		known->peer.began = 0;
}

/* A segment that was received before the connection is established is a RST. */
static __always_inline void connect_failed(struct bpf_sock_ops *ctx, struct origin *known)
{
	if (MEASURE_CONNECTIONS)
		measure_failure(known->peer.service_id, known->peer.backend_id,
				ctx->segs_in ? FAILURE_RESET : FAILURE_TIMEOUT);
}

/* Counts what the connection has sent and received; the socket itself may be closed. */
static __always_inline void connection_ends(struct bpf_sock_ops *ctx, const struct origin *known)
{
	const u32 service_id = known->peer.service_id;

	if (!MEASURE_TRAFFIC)
		return;
	measure_traffic(service_id, 0, ctx->bytes_acked, ctx->segs_out);
	measure_traffic(service_id, 1, ctx->bytes_received, ctx->segs_in);
}

static __always_inline void state_changes(struct bpf_sock_ops *ctx, u64 cookie)
{
	const u32 before = ctx->args[0];
	struct origin *known;

	if (ctx->args[1] != BPF_TCP_CLOSE || (!MEASURE_TRAFFIC && before != BPF_TCP_SYN_SENT))
		return;
	known = origin_of(cookie);
	if (MEASURE_TRAFFIC && !known)
		known = origin_closed(cookie);
	if (!known || !known->peer.began)
		return;
	if (before == BPF_TCP_SYN_SENT)
		connect_failed(ctx, known);
	else
		connection_ends(ctx, known);
	known->peer.began = 0;
	if (MEASURE_TRAFFIC)
		origin_end(cookie);
}

int sock_ops(struct bpf_sock_ops *ctx)
{
	const u32 op = ctx->op;
	struct origin *known;
	u64 cookie;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB &&
	    op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		return PROCEED;
	cookie = get_socket_cookie(ctx);
	if (op == BPF_SOCK_OPS_STATE_CB) {
		state_changes(ctx, cookie);
		return PROCEED;
	}
	known = origin_of(cookie);
	if (!known)
		return PROCEED;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		connect_begins(ctx, known);
	else if (known->peer.began)
		connect_done(ctx, known);
	return PROCEED;
}
