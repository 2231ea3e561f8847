/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the agent does to records of sockets. It cannot compare and swap: a program does it for the
 * agent (BPF_PROG_TEST_RUN), and is attached nowhere. The packet is a struct origin; programs
 * return how much they have changed.
 */
#include "lib/compat.h"
#include "lib/origin.h"
#include "lib/peers.h"

static __always_inline bool read_record(const struct __sk_buff *skb, struct origin *record)
{
	const struct origin *packet = (void *)(u64)skb->data;

	if ((void *)(packet + 1) > (void *)(u64)skb->data_end)
		return false;
	*record = *packet;
	return true;
}

static __always_inline bool same_peer(const struct peer *a, const struct peer *b)
{
	return a->backend_id == b->backend_id && a->service_id == b->service_id &&
	       !difference(&a->backend, a->backend_port, &b->backend, b->backend_port);
}

/* Forgets a connected socket that still has the same peer, or an unconnected one that is closed. */
int forget_socket(struct __sk_buff *skb)
{
	struct origin record, *known;
	u64 cookie;

	if (!read_record(skb, &record))
		return false;
	cookie = cookie_of(record.key);
	if (record.key == origin_key(cookie, ORIGIN_CLOSED))
		return origin_end(cookie);
	if (record.key != origin_key(cookie, ORIGIN_CONNECTED))
		return socket_forget(cookie);
	known = origin_of(cookie);
	return known && same_peer(&known->peer, &record.peer) && origin_forget(cookie);
}

/* Forgets what a socket that is closed has beside its first frontend; returns how many pages. */
int forget_pages(struct __sk_buff *skb)
{
	struct origin record, *slot;

	if (!read_record(skb, &record))
		return 0;
	slot = origin_slot(cookie_of(record.key));
	return slot ? pages_forget(slot, cookie_of(record.key)) : 0;
}

/* Inserts a record, unless the socket has it, or, if it is connected, another one. */
int restore_socket(struct __sk_buff *skb)
{
	struct target frontend = {};
	struct origin record, *slot;
	u64 cookie;

	if (!read_record(skb, &record))
		return false;
	cookie = cookie_of(record.key);
	slot = origin_slot(cookie);
	if (!slot)
		return false;
	if (record.key != origin_key(cookie, ORIGIN_CONNECTED)) {
		frontend.addr = record.peer.frontend;
		frontend.port = record.peer.frontend_port;
		return !peer_by_frontend(cookie, &frontend) &&
		       peer_insert(cookie, record.netns, &record.peer, false);
	}
	if (origin_of(cookie) || !origin_insert(slot, cookie, &record.peer, record.netns))
		return false;
	load_restore_socket(record.peer.backend_id);
	return true;
}
