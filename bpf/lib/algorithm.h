/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Balancing algorithms: choosing a slot in a range. The agent lays out the slots so that little
 * remains to be done here (datapath/services/slots.py): a backend has as many slots as its weight
 * says, and Maglev hashes the flow into a table.
 */
#ifndef EBPFPROXY_ALGORITHM_H
#define EBPFPROXY_ALGORITHM_H

#include "branchless.h"
#include "load.h"
#include "maps.h"

/* The client of a choice, and what it wants to reach. */
struct client {
	struct inet_addr addr;
	u32 kind;
	u32 flow; /* differs between the flows of one client */
	struct inet_addr frontend;
	bool keeps_backend; /* by session affinity; known where decisions are traced */
};

/* Describes who chooses: a program of packets, or one for the socket with this cookie. */
struct chooser {
	bool is_socket;
	u64 socket;
};

static __always_inline void set_namespace(struct client *client, u64 cookie)
{
	client->kind = CLIENT_NAMESPACE;
	client->addr = (struct inet_addr) { { bpf_htonl(cookie >> 32), bpf_htonl((u32)cookie) } };
}

/* Says if the choice depends on the client; filling in struct client costs helper calls. */
static __always_inline bool needs_client_key(const struct service *svc)
{
	return svc->affinity_seconds || svc->algorithm >= ALGORITHM_DESTINATION_HASH;
}

/* Mixes bits as MurmurHash3's finalizer does; every node computes the same. */
static __always_inline u64 mix(u64 hash)
{
	hash ^= hash >> 33;
	hash *= 0xff51afd7ed558ccdULL;
	hash ^= hash >> 33;
	hash *= 0xc4ceb9fe1a85ec53ULL;
	return hash ^ hash >> 33;
}

static __always_inline u32 hash_of(const struct inet_addr *addr, u32 more)
{
	u64 upper = (u64)bpf_ntohl(addr->word[0]) << 32 | bpf_ntohl(addr->word[1]);
	u64 lower = (u64)bpf_ntohl(addr->word[2]) << 32 | bpf_ntohl(addr->word[3]);

	return mix(mix(upper + more) ^ lower);
}

/*
 * Returns a random number. The kernel's own take calls of two functions; from Linux 6.10 on these
 * take none. Each CPU has a sequence of its own that begins at a number of the kernel's, in the way
 * of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
 *
 * A program at a socket can be preempted between the read and the store, and then takes the
 * sequence back by what others have drawn meanwhile. So these have a second sequence, and each adds
 * its socket's cookie: the same place gives two sockets different numbers.
 */
static __always_inline u32 random_number(const struct chooser *who)
{
	const u32 whose = who->is_socket ? RANDOM_SOCKETS : RANDOM_PACKETS;
	u64 *state = map_at(random_state, whose);
	u64 at;

	if (!state)
		return bpf_get_prandom_u32();
	at = *state;
	if (!at)
		at = (u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32();
	at += 0x9e3779b97f4a7c15ULL;
	*state = at;
	return mix(at ^ who->socket) >> 32;
}

/* Scales a 32-bit number to the range without a division. */
static __always_inline u32 slot_at(const union selection *range, u32 number)
{
	return range->base + (u32)(((u64)number * range->count) >> 32);
}

/*
 * Takes the next slot in turn. All CPUs share one counter: of every range.count choices in a row,
 * each slot gets exactly one.
 */
static __always_inline u32 slot_in_turn(const union selection *range, u32 selection)
{
	u64 *turn = map_at(turns, selection);

	return range->base + (turn ? __sync_fetch_and_add(turn, 1) % range->count : 0);
}

/*
 * Computes what IPVS compares, by weight: open connections. SED and NQ count the new connection as
 * well; NQ does not where the backend is idle.
 */
static __always_inline u64 cost_of(const struct backend *backend, u64 algorithm)
{
	const u64 counts_new = (algorithm + 1) >> 2, spares_idle = algorithm >> 2;
	u64 open = load_open(backend);

	return open + counts_new - (spares_idle & is_zero(open));
}

/*
 * Finds the least loaded of a small set (SEARCHED_SLOTS), or of two random slots (Mitzenmacher,
 * "The power of two choices", 2001). Of equal ones the first that the search meets wins; it begins
 * at a random place.
 */
static __always_inline u32 slot_least_loaded(const union selection *range, u8 algorithm,
					     const struct chooser *who)
{
	const bool is_small = range->count <= SEARCHED_SLOTS;
	const u32 end = range->base + range->count;
	u32 tries = is_small ? range->count : 2;
	u32 at = slot_at(range, random_number(who));
	u64 best_cost = 1, best_weight = 0, best = at;

	for (u32 i = 0; i < SEARCHED_SLOTS; i++) {
		union slot *slot = map_at(slots, at);
		struct backend *backend = slot ? backend_of(slot->backend_id) : NULL;
		u64 cost, weight, better;

		if (!backend)
			break;
		cost = cost_of(backend, algorithm);
		weight = slot->weight;
		weight += is_zero(weight);
		better = is_less(cost * best_weight, best_cost * weight);
		best = select(better, at, best);
		best_cost = select(better, cost, best_cost);
		best_weight = select(better, weight, best_weight);
		at = is_small ? at + 1 : slot_at(range, random_number(who));
		if (at >= end)
			at = range->base;
		/*
		 * Without this clang compares only once, in a form from which the verifier learns
		 * no bound.
		 */
		barrier_var(tries);
		if (i + 1 >= tries)
			break;
	}
	return best;
}

static __always_inline u32 pick_slot(const struct service *svc, const union selection *range,
				     u32 selection, const struct chooser *who,
				     const struct client *client)
{
	const u8 algorithm = svc->algorithm;

	if (algorithm == ALGORITHM_RANDOM)
		return slot_at(range, random_number(who));
	if (algorithm == ALGORITHM_ROUND_ROBIN)
		return slot_in_turn(range, selection);
	if (algorithm < ALGORITHM_DESTINATION_HASH)
		return slot_least_loaded(range, algorithm, who);
	if (algorithm == ALGORITHM_MAGLEV)
		return slot_at(range, hash_of(&client->addr, client->flow));
	if (algorithm == ALGORITHM_SOURCE_HASH)
		return slot_at(range, hash_of(&client->addr, client->kind));
	return slot_at(range, hash_of(&client->frontend, 0));
}

#endif
