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

static bool in_networks(const addr *a)
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

static bool is_end(const addr *a, uint16_t port, uint8_t proto)
{
	return find_frontend(a, port, proto) || find_backend(a, port, proto);
}

static bool has_end(const addr *a)
{
	return has_address(world.frontends, world.frontend_count, a) ||
	       has_address(world.backends, world.backend_count, a);
}

bool may_be_served(const struct view *v)
{
	if (!v->version)
		return false;
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
