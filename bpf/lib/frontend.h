/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Finding the Service and the backend for a packet. */
#ifndef EBPFPROXY_FRONTEND_H
#define EBPFPROXY_FRONTEND_H

#include "conntrack.h"
#include "service.h"

/* Finds the Service as a client in the cluster sees it. */
static __always_inline struct service *find_service(const struct target *to)
{
	struct service *svc = service_by_address(to, SCOPE_INTERNAL);

	if (!svc && addr_is_this_node(&to->addr))
		svc = service_by_node_port(to, SCOPE_INTERNAL);
	return svc;
}

/* Returns what @svc, of two scopes, is for a client outside. */
static __always_inline struct service *outside_service(struct service *svc, const struct target *to)
{
	struct service *other = svc->kind == KIND_NODE_PORT
					? service_by_node_port(to, SCOPE_EXTERNAL)
					: service_by_address(to, SCOPE_EXTERNAL);

	return other ? other : svc;
}

/*
 * Says if the flow belongs to a connected datagram socket whose backend has gone. Then @to becomes
 * the frontend that the socket had connected to.
 */
static __always_inline bool is_redirected(const struct flow *flow, struct target *to)
{
	struct redirect *redirect;
	struct flow key;

	if (flow->proto != IPPROTO_UDP)
		return false;
	key = *flow;
	key.stage = STAGE_INGRESS;
	redirect = map_lookup(sock_redirects, &key);
	if (!redirect)
		return false;
	to->addr = redirect->frontend;
	to->port = redirect->frontend_port;
	return true;
}

/*
 * Finds the Service of a redirected flow. The socket may have connected to a NodePort on the node's
 * loopback.
 */
static __always_inline struct service *redirected_service(const struct target *to)
{
	struct service *svc = service_by_address(to, SCOPE_INTERNAL);

	return svc ? svc : service_by_node_port(to, SCOPE_INTERNAL);
}

/*
 * Finds the Service that this host itself connects to. Packets to the node's own addresses leave by
 * the loopback device.
 */
static __always_inline struct service *service_of_host(const struct target *to)
{
	if (!AT_LOOPBACK)
		return service_by_address(to, SCOPE_INTERNAL);
	return addr_is_loopback(&to->addr) ? service_by_node_port(to, SCOPE_INTERNAL)
					   : find_service(to);
}

/*
 * Says if the frontend of a flow still belongs to the Service: an address or port may have moved to
 * another. Connections stay with the Service that they have.
 */
static __always_inline bool is_owner(const struct flow *flow, u32 service_id)
{
	struct target to = { flow->dst, flow->dport, service_protocol(flow->proto) };
	struct service *svc = AT_LOOPBACK ? service_of_host(&to) : find_service(&to);

	if (!svc && is_redirected(flow, &to))
		svc = redirected_service(&to);
	return svc && svc->id == service_id;
}

/* Says if no client can have this source (RFC 1812, 5.3.7): a reply to it would go astray. */
static __always_inline bool is_martian(const struct inet_addr *src)
{
	u32 first;

	if (!addr_is_v4(src))
		return addr_is_loopback(src) || !(src->word[0] | src->word[1] | src->word[2]) ||
		       (bpf_ntohl(src->word[0]) >> 24) == 0xff;
	first = bpf_ntohl(src->word[3]) >> 24;
	return first == 0 || first == 127 || (first >= 224 && first < 240) ||
	       src->word[3] == 0xffffffff;
}

/*
 * Fills in the client of a packet: its address. For Maglev a flow also has its ports and the
 * frontend.
 */
static __always_inline void set_client(struct client *client, const struct packet *p)
{
	u64 *cookie = map_lookup(client_namespaces, &p->flow.src);

	/*
	 * A pod of this node, or the node itself, is the same client in packets as at the socket.
	 */
	if (AT_LOOPBACK) {
		set_namespace(client, CONSTANT(HOST_NETNS_COOKIE));
	} else if (cookie) {
		set_namespace(client, *cookie);
	} else {
		client->addr = p->flow.src;
		client->kind = CLIENT_ADDRESS;
	}
	client->flow = (u32)bpf_ntohs(p->flow.sport) << 16 | bpf_ntohs(p->flow.dport);
	client->frontend = p->flow.dst;
}

/*
 * Says if source ranges do not allow a packet. To an address of its own this host sends from that
 * address, which stands for the node's there, as in kube-proxy (allowFromNode).
 */
static __always_inline bool is_denied(const struct service *svc, const struct flow *flow)
{
	if (!(svc->flags & SERVICE_SOURCES))
		return false;
	if (AT_LOOPBACK && svc->flags & SERVICE_HOST && addr_equal(&flow->src, &flow->dst))
		return false;
	return !source_allowed(svc, &flow->src);
}

/*
 * Chooses the backend of a new flow. Returns NULL where no backend may or can serve it, with the
 * packet's verdict in @verdict.
 */
static __always_inline struct backend *backend_for(const struct packet *p, struct scratch *s,
						   u32 *id, int *verdict)
{
	const struct service *svc = &s->service;
	struct backend *backend = NULL;

	if (is_denied(svc, &p->flow)) {
		*verdict = drop(EVENT_SOURCE_RANGE);
		return NULL;
	}
	if (needs_client_key(svc))
		set_client(&s->client, p);
	switch (choose(svc, &s->client, id, &backend)) {
	case CHOICE_BACKEND:
		return backend;
	case CHOICE_REFUSE:
		*verdict = rejection(EVENT_NO_ENDPOINT);
		return NULL;
	default:
		*verdict = drop(EVENT_NO_LOCAL_ENDPOINT);
		return NULL;
	}
}

#endif
