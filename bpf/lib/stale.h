/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Staleness: whether the backend of a flow or socket may still be used. Packets and sockets share
 * these rules.
 */
#ifndef EBPFPROXY_STALE_H
#define EBPFPROXY_STALE_H

#include "addr.h"
#include "load.h"
#include "maps.h"

static __always_inline u64 epoch_of(u32 service_id)
{
	u64 *epoch = map_at(epochs, service_id);

	return epoch ? *(volatile u64 *)epoch : 0;
}

/* Says if nothing has left the Service of a flow since its backend was last found to be in it. */
static __always_inline bool has_its_backend(const struct nat *nat)
{
	return nat->flags & (NAT_REPLY | NAT_SOURCE) ||
	       nat->epoch == (u16)epoch_of(nat->service_id);
}

/* Returns the backend with this id; NULL where the id belongs to another backend by now. */
static __always_inline struct backend *backend_known(u32 id, const struct inet_addr *addr,
						     __be16 port, u8 proto)
{
	struct backend *backend = backend_of(id);

	return backend && backend->proto == proto && backend->port == port &&
			       addr_equal(&backend->addr, addr)
		       ? backend
		       : NULL;
}

/*
 * Says if a backend has left its Service. Datagrams also leave a backend that is merely not ready,
 * as they have no connection to lose.
 */
static __always_inline bool has_departed(u32 service_id, u32 backend_id, bool is_connection)
{
	struct departure_key key = { service_id, backend_id };
	u32 *departed = map_lookup(departures, &key);

	return departed && (*departed == DEPARTED_GONE || !is_connection);
}

#endif
