/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The translations of flows so far. A reply is translated as the reverse of what was done to a
 * packet before it, and an ICMP error as the packet that it quotes: all else breaks a rule.
 */
#include <stdlib.h>
#include <string.h>

#include "packets.h"

/* More than a run has; one that has more accepts all replies. */
#define PLACES (1U << 22)
#define MOST   (PLACES / 4 * 3)

static uint64_t *places;
static uint32_t taken;

struct ends ends_of(const struct view *v)
{
	return (struct ends) { v->src, v->dst, v->sport, v->dport, v->proto };
}

struct ends quoted_ends(const struct view *v)
{
	return (struct ends) { v->inner_src, v->inner_dst, v->inner_sport, v->inner_dport,
			       v->inner_proto };
}

struct ends reversed(const struct ends *e)
{
	return (struct ends) { e->dst, e->src, e->dport, e->sport, e->proto };
}

static uint64_t mixed(uint64_t hash, uint64_t word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

static uint64_t hash_ends(uint64_t hash, const struct ends *e)
{
	uint64_t words[4];

	memcpy(words, &e->src, 16);
	memcpy(words + 2, &e->dst, 16);
	for (int i = 0; i < 4; i++)
		hash = mixed(hash, words[i]);
	return mixed(hash, (uint64_t)e->sport << 32 | (uint32_t)e->dport << 8 | e->proto);
}

/* Returns the place of a translation, or the free one where it belongs. */
static uint64_t *place_of(const struct ends *in, const struct ends *out, uint64_t *hash)
{
	uint32_t at;

	if (!places)
		places = calloc(PLACES, sizeof(*places));
	if (!places)
		die("translations");
	*hash = hash_ends(hash_ends(0, in), out);
	*hash += !*hash;
	for (at = *hash >> 40; places[at % PLACES] && places[at % PLACES] != *hash; at++)
		;
	return &places[at % PLACES];
}

static void note(const struct ends *in, const struct ends *out)
{
	uint64_t hash, *place = place_of(in, out, &hash);

	if (*place || taken >= MOST)
		return;
	*place = hash;
	taken++;
}

/* Notes what the original direction has become, from which its replies follow. */
void note_translation(const struct ends *in, const struct ends *out)
{
	const struct ends reply = reversed(out), answered = reversed(in);

	note(in, out);
	note(&reply, &answered);
}

bool is_known_translation(const struct ends *in, const struct ends *out)
{
	uint64_t hash;

	return *place_of(in, out, &hash) || taken >= MOST;
}

/* A flow has begun whose first packet became nobody knows what. */
void note_begun(const struct ends *in)
{
	note(in, in);
}

bool has_begun(const struct ends *in)
{
	return is_known_translation(in, in);
}
