/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Services at the socket (BPF_PROG_TYPE_CGROUP_SOCK_ADDR): connect() and unconnected sends go to a
 * backend's own address, and the application is told the frontend's address back. Packets then need
 * no translation. Sockets and addresses of no Service are left exactly as they are.
 */
#include "lib/compat.h"
#include "lib/addr.h"
#include "lib/maps.h"
#include "lib/options.h"
#include "lib/service.h"
#include "lib/origin.h"
#include "lib/peers.h"
#include "lib/service_cidr.h"

/* What a cgroup program answers the kernel. */
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
	return bpf_get_netns_cookie(ctx) == CONSTANT(HOST_NETNS_COOKIE);
}

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

/* The address that a socket is bound to; false where it has none yet. */
static __always_inline bool bound_address(struct bpf_sock_addr *ctx, struct inet_addr *addr)
{
	struct bpf_sock *sk = ctx->sk;

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
static __always_inline bool is_left_to_loopback(struct bpf_sock_addr *ctx, const struct target *to)
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
	return !svc || svc->flags & SERVICE_OWN || is_left_to_loopback(ctx, to) ||
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
static __always_inline bool is_nobodys(struct bpf_sock_addr *ctx, const struct target *to)
{
	if (!is_served(ctx) || !is_unallocated(&to->addr))
		return false;
	if (to->proto == IPPROTO_UDP && has_asked(&to->addr))
		return false;
	count_unallocated(&to->addr, UNALLOCATED_SOCKET);
	return true;
}

static __always_inline int reject(enum verdict verdict)
{
	if (HAVE_SET_RETVAL)
		bpf_set_retval(verdict == VERDICT_REFUSE ? -ECONNREFUSED : -EHOSTUNREACH);
	return REJECT;
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

/* An unconnected socket may have no peer, and be told of many. */
static __always_inline bool is_connected(struct bpf_sock_addr *ctx)
{
	return ctx->sk->dst_port != 0;
}

/* Leaves the backend in @backend where there is one to go to. */
static __always_inline int connecting(struct bpf_sock_addr *ctx, const struct target *to,
				      struct backend **backend)
{
	struct service *svc = find_service(ctx, to);
	struct client client;
	enum verdict verdict;
	u32 backend_id;

	if (skip_translation(ctx, to, svc)) {
		if (!svc && to->proto != IPPROTO_UDP && is_unused_port(ctx, to))
			return reject(VERDICT_REFUSE);
		if (!svc && to->proto != IPPROTO_UDP && is_nobodys(ctx, to))
			return reject(VERDICT_DROP);
		origin_forget(get_socket_cookie(ctx));
		return PROCEED;
	}
	client = client_of(ctx, svc, to);
	verdict = choose(svc, &client, &backend_id, backend);
	if (verdict != VERDICT_TRANSLATE) {
		if (to->proto != IPPROTO_UDP)
			return reject(verdict);
		/* Nothing is sent yet: packets are refused, as long as there is no endpoint. */
		origin_forget(get_socket_cookie(ctx));
		return PROCEED;
	}
	origin_remember(ctx, to, svc->id, backend_id, *backend);
	return PROCEED;
}

/* Says if an unconnected socket has this backend for another frontend: its answers look alike. */
static __always_inline bool is_shared(u64 cookie, const struct backend *backend)
{
	return peer_by_backend(cookie, &backend->addr, backend->port) != NULL;
}

#define OTHER_TRIES 2

/* Another backend than those that the socket has for other frontends, if it is soon found. */
static __always_inline bool choose_other(u64 cookie, const struct service *svc, u32 *backend_id,
					 struct backend **backend)
{
	const u32 policy = svc->flags & SERVICE_LOCAL ? POLICY_LOCAL : POLICY_CLUSTER;
	union selection range = selection_of(svc->id * POLICIES + policy);
	u32 at = slot_at(&range, bpf_get_prandom_u32());

	if (!range.count)
		return false;
#pragma clang loop unroll(disable)
	for (int i = 0; i < OTHER_TRIES; i++) {
		union slot *slot = map_lookup(slots, &at);
		u32 id;

		if (!slot)
			break;
		id = slot->backend_id;
		*backend = map_lookup(backends, &id);
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

/* Says if packets to the frontend pass a device of ours on their way to the backend. */
static __always_inline bool packets_serve(struct bpf_sock_addr *ctx, const struct service *svc,
					  const struct backend *backend)
{
	return !in_host_namespace(ctx) ||
	       (svc->kind != KIND_NODE_PORT && !addr_is_this_node(&backend->addr));
}

/* The flow of this socket's port to a frontend gets another port from the packet programs. */
static __always_inline void note_clash(struct bpf_sock_addr *ctx, const struct target *to)
{
	struct clash_key key = {
		.frontend = to->addr,
		.frontend_port = to->port,
		.client_port = bpf_htons(ctx->sk->src_port),
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
 * A first datagram to a frontend, or one whose backend has left. Of two frontends with one backend
 * the socket could not tell the answers apart: for the second another backend is taken, or else
 * its datagrams are left to packets, where the flow gets another port.
 */
static __always_inline int sending_anew(struct bpf_sock_addr *ctx, const struct target *to,
					const struct service *svc, struct peer *peer,
					struct backend **backend)
{
	struct client client = client_of(ctx, svc, to);
	const u64 cookie = get_socket_cookie(ctx);
	/* Before the choice: what departs meanwhile is noticed at the next datagram. */
	const u32 epoch = epoch_of(svc->id);
	enum verdict verdict;
	u32 backend_id;

	verdict = service_choose(svc, &client, &backend_id, backend);
	if (verdict != VERDICT_TRANSLATE) {
		count_service(svc->id, verdict);
		return reject(verdict);
	}
	/* A free place is found by neither address. */
	if (peer)
		peer->frontend_port = peer->backend_port = 0;
	if (is_shared(cookie, *backend)) {
		struct backend *only = *backend;

		if (needs_client_key(svc) || !choose_other(cookie, svc, &backend_id, backend)) {
			*backend = only;
			if (packets_serve(ctx, svc, only)) {
				note_clash(ctx, to);
				*backend = NULL;
				return PROCEED;
			}
		}
	}
	if (!peer)
		peer = peer_place(ctx, cookie, !packets_serve(ctx, svc, *backend));
	if (peer) {
		peer_write(peer, to, svc, backend_id, *backend, epoch);
	} else {
		count_full();
		if (packets_serve(ctx, svc, *backend)) {
			/* What it has of others may come to have the same backend. */
			if (peers_page(cookie, 0))
				note_clash(ctx, to);
			*backend = NULL;
			return PROCEED;
		}
	}
	count_service(svc->id, VERDICT_TRANSLATE);
	count_backend(backend_id);
	return PROCEED;
}

/*
 * Says if a connected socket sends to the very address that it is connected to: it was, while
 * nobody served that. It gets no answer from elsewhere. (The kernel names the peer of an
 * IPv4-mapped one at each datagram.)
 */
static __always_inline bool is_to_peer(struct bpf_sock_addr *ctx, const struct target *to)
{
	struct inet_addr peer = addr_of_v4(ctx->sk->dst_ip4);

	if ((__be16)ctx->sk->dst_port != to->port)
		return false;
	if (!addr_is_v4(&to->addr)) {
		peer.word[0] = ctx->sk->dst_ip6[0];
		peer.word[1] = ctx->sk->dst_ip6[1];
		peer.word[2] = ctx->sk->dst_ip6[2];
		peer.word[3] = ctx->sk->dst_ip6[3];
	}
	return addr_equal(&peer, &to->addr);
}

/* Leaves in @goes where the datagram is to go, if that is another address than @to. */
static __always_inline int sending(struct bpf_sock_addr *ctx, const struct target *to,
				   struct target *goes)
{
	struct service *svc = find_service(ctx, to);
	struct backend *backend = NULL;
	int answer = PROCEED;
	struct peer *peer;

	if (skip_translation(ctx, to, svc)) {
		if (!svc && is_unused_port(ctx, to))
			return reject(VERDICT_REFUSE);
		return !svc && is_nobodys(ctx, to) ? reject(VERDICT_DROP) : PROCEED;
	}
	if (is_connected(ctx) && (origin_sends(ctx, to, goes) || is_to_peer(ctx, to)))
		return PROCEED;
	peer = peer_by_frontend(get_socket_cookie(ctx), to);
	if (peer)
		backend = peer_backend(peer, svc, to->proto);
	if (backend) {
		count_service(svc->id, VERDICT_TRANSLATE);
		count_backend(peer->backend_id);
	} else {
		answer = sending_anew(ctx, to, svc, peer, &backend);
	}
	if (answer == PROCEED && backend) {
		goes->addr = backend->addr;
		goes->port = backend->port;
	}
	return answer;
}

/* A datagram's source: of the connected peer, or of one that an unconnected socket sent to. */
static __always_inline bool receiving(struct bpf_sock_addr *ctx, struct target *from)
{
	const u64 cookie = get_socket_cookie(ctx);

	if (is_connected(ctx))
		return origin_recall(cookie, from) || peer_recall(cookie, from);
	return peer_recall(cookie, from) || origin_recall(cookie, from);
}

int connect4(struct bpf_sock_addr *ctx)
{
	struct target to = target4(ctx);
	struct backend *backend = NULL;
	int answer = connecting(ctx, &to, &backend);

	if (answer == PROCEED && backend)
		set_target4(ctx, &backend->addr, backend->port);
	return answer;
}

int connect6(struct bpf_sock_addr *ctx)
{
	struct target to = target6(ctx);
	struct backend *backend = NULL;
	int answer = connecting(ctx, &to, &backend);

	if (answer == PROCEED && backend)
		set_target6(ctx, &backend->addr, backend->port);
	return answer;
}

int sendmsg4(struct bpf_sock_addr *ctx)
{
	struct target to = target4(ctx), goes = {};
	int answer = sending(ctx, &to, &goes);

	if (answer == PROCEED && goes.port)
		set_target4(ctx, &goes.addr, goes.port);
	return answer;
}

int sendmsg6(struct bpf_sock_addr *ctx)
{
	struct target to = target6(ctx), goes = {};
	int answer = sending(ctx, &to, &goes);

	if (answer == PROCEED && goes.port)
		set_target6(ctx, &goes.addr, goes.port);
	return answer;
}

int recvmsg4(struct bpf_sock_addr *ctx)
{
	struct target from = target4(ctx);

	if (receiving(ctx, &from))
		set_target4(ctx, &from.addr, from.port);
	return PROCEED;
}

int recvmsg6(struct bpf_sock_addr *ctx)
{
	struct target from = target6(ctx);

	if (receiving(ctx, &from))
		set_target6(ctx, &from.addr, from.port);
	return PROCEED;
}

/* The cookie by which the socket's origin is kept. */
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

/* BPF_PROG_TYPE_CGROUP_SOCK: the socket is closed. */
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
