/* SPDX-License-Identifier: Apache-2.0 */
/* The model: which packets can be a Service's. */
#include <string.h>

#include "packets.h"

/* NodePorts answer on all of 127.0.0.0/8, and the unspecified address means the loopback's. */
static bool is_address(const addr *a, const addr *b)
{
	static const addr one = { { [15] = 1 } }, any = { { 0 } };

	return same_addr(a, b) || (a->b[10] == 0xff && !memcmp(a, b, 13) && a->b[12] == 127) ||
	       (same_addr(a, &one) && same_addr(b, &any));
}

static const struct endpoint *find_endpoint(const struct endpoint *in, uint32_t count,
					    const addr *a, uint16_t port, uint8_t proto)
{
	if (proto == UDPLITE)
		proto = UDP;
	for (uint32_t i = 0; i < count; i++)
		if (in[i].port == port && in[i].proto == proto && is_address(&in[i].a, a))
			return &in[i];
	return NULL;
}

const struct endpoint *find_frontend(const addr *a, uint16_t port, uint8_t proto)
{
	return find_endpoint(world.frontends, world.frontend_count, a, port, proto);
}

const struct endpoint *find_backend(const addr *a, uint16_t port, uint8_t proto)
{
	return find_endpoint(world.backends, world.backend_count, a, port, proto);
}

static bool has_address(const struct endpoint *in, uint32_t count, const addr *a)
{
	for (uint32_t i = 0; i < count; i++)
		if (is_address(&in[i].a, a))
			return true;
	return false;
}

bool in_networks(const addr *a)
{
	for (uint32_t i = 0; i < world.network_count; i++) {
		const uint32_t whole = world.networks[i].length / 8,
			       rest = world.networks[i].length % 8;

		if (!memcmp(a, &world.networks[i].a, whole) &&
		    (!rest || !((a->b[whole] ^ world.networks[i].a.b[whole]) >> (8 - rest))))
			return true;
	}
	return false;
}

static bool is_among(const addr *in, uint32_t count, const addr *a)
{
	for (uint32_t i = 0; i < count; i++)
		if (same_addr(&in[i], a))
			return true;
	return false;
}

bool is_own(const addr *a)
{
	return is_among(world.own, world.own_count, a);
}

/* Packets to this address end on this node. */
bool is_here(const addr *a)
{
	return is_own(a) || is_among(world.here, world.here_count, a);
}

/* They do not; of addresses that are in no line nobody knows. */
bool is_elsewhere(const addr *a)
{
	return is_among(world.addresses, world.address_count, a) && !is_here(a);
}

bool has_backend_port(uint16_t port)
{
	for (uint32_t i = 0; i < world.backend_count; i++)
		if (world.backends[i].port == port)
			return true;
	return false;
}

static bool is_node_port(uint16_t port, uint8_t proto)
{
	for (uint32_t i = 0; i < world.frontend_count; i++)
		if (world.frontends[i].is_node_port && world.frontends[i].port == port &&
		    world.frontends[i].proto == proto)
			return true;
	return false;
}

/*
 * With DSR a flow may have come in at another node's NodePort, and a filter tells which ports of
 * this node's addresses are a backend's, of any protocol.
 */
static bool is_end_of_dsr(const addr *a, uint16_t port, uint8_t proto)
{
	return is_node_port(port, proto) || (is_here(a) && has_backend_port(port));
}

static bool is_end(const addr *a, uint16_t port, uint8_t proto)
{
	return find_frontend(a, port, proto) || find_backend(a, port, proto) ||
	       (world.accepts_dsr && is_end_of_dsr(a, port, proto));
}

static bool has_end(const addr *a)
{
	return has_address(world.frontends, world.frontend_count, a) ||
	       has_address(world.backends, world.backend_count, a);
}

bool may_be_served(const struct program *p, const struct view *v)
{
	if (!v->version)
		return false;
	if (v->has_option && world.accepts_dsr && p->is_ingress)
		return true;
	if (in_networks(&v->dst))
		return true;
	if (v->is_error)
		return is_end(&v->inner_src, v->inner_sport, v->inner_proto) ||
		       is_end(&v->inner_dst, v->inner_dport, v->inner_proto);
	if (v->is_later && v->chain_is_known)
		return has_end(&v->src) || has_end(&v->dst);
	return v->has_ports &&
	       (is_end(&v->src, v->sport, v->proto) || is_end(&v->dst, v->dport, v->proto));
}

/*
 * Says if a translation is one between a Service and its client, and not one that only gives a
 * client another source. Later fragments have no ports: where their client has the address of a
 * backend, both are possible.
 */
bool is_service_step(const struct view *v, const struct view *w, bool *is_unsure)
{
	const bool to_other = !same_addr(&v->dst, &w->dst), of_other = !same_addr(&v->src, &w->src);

	*is_unsure = false;
	if (!v->is_later)
		return ((to_other || v->dport != w->dport) &&
			find_frontend(&v->dst, v->dport, v->proto) &&
			find_backend(&w->dst, w->dport, v->proto)) ||
		       ((of_other || v->sport != w->sport) &&
			find_backend(&v->src, v->sport, v->proto) &&
			find_frontend(&w->src, w->sport, v->proto));
	if (of_other && has_address(world.backends, world.backend_count, &v->src) &&
	    has_address(world.frontends, world.frontend_count, &w->src))
		*is_unsure = has_address(world.backends, world.backend_count, &w->dst);
	else if (!to_other || !has_address(world.frontends, world.frontend_count, &v->dst) ||
		 !has_address(world.backends, world.backend_count, &w->dst))
		return false;
	else
		*is_unsure = has_address(world.backends, world.backend_count, &v->src);
	return true;
}
