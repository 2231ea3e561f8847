/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cache of frontends keeps what look-ups have found, in an array that needs no helper, one
 * cache line for each. A look-up in a hash takes a call, and two or three lines, of which most are
 * cold.
 *
 * The maps services4 and services6 hold what is true. Before each change of them the agent marks
 * frontend_generation, and afterwards sets it to another random number
 * (datapath/services/frontend_cache.py): no line counts any more. None is used or written in
 * between, not even if the agent is killed there. Then cache_frontend() in records.c fills in all.
 *
 * A line also has the range of slots that its frontend chooses from, which changes more often. It
 * has a check of its own, which begins with the line's.
 *
 * A line's check says that it is whole and of this generation: two CPUs may write one at once. Who
 * can choose a frontend's address could choose one for which a line of two halves looked whole, if
 * the check were a sum; so it mixes, beginning with the number, which nobody knows. Highest bits
 * that cancel out between two words do so whatever the number is: of a key, the check also has the
 * sum, in which these do not.
 */
#ifndef EBPFPROXY_FRONTEND_CACHE_H
#define EBPFPROXY_FRONTEND_CACHE_H

#include "addr.h"
#include "maps.h"
#include "options.h"
#include "service.h"

/* Any odd factors do. */
#define FRONTEND_FACTOR_1 0x9e3779b97f4a7c15ULL
#define FRONTEND_FACTOR_2 0xc2b2ae3d27d4eb4fULL
#define FRONTEND_FACTOR_3 0x165667b19e3779f9ULL
#define FRONTEND_MIXED_BY 0xbf58476d1ce4e5b9ULL
/* Keeps a line of zeros from being whole. */
#define FRONTEND_NOT_ZERO 0xd6e8feb86659fd93ULL

/* Each word of a line is read once. */
#define line_word(line, field) (*(const volatile u64 *)&(line)->field)

/* Sums up a key, for its place. */
static __always_inline u64 frontend_sum(u64 upper, u64 lower, u64 port)
{
	return upper * FRONTEND_FACTOR_1 + lower * FRONTEND_FACTOR_2 + port * FRONTEND_FACTOR_3;
}

static __always_inline u64 frontend_mix(u64 mixed, u64 word)
{
	mixed ^= word;
	mixed ^= mixed >> 32;
	return mixed * FRONTEND_MIXED_BY;
}

/* Mixes the key of a line. */
static __always_inline u64 frontend_mix_key(u64 generation, u64 upper, u64 lower, u64 port)
{
	u64 mixed = frontend_mix(generation ^ FRONTEND_NOT_ZERO, upper);

	return frontend_mix(frontend_mix(mixed, lower), port) ^ frontend_sum(upper, lower, port);
}

/* Returns the check of a line; @mixed is its key's. */
static __always_inline u64 frontend_check(u64 mixed, u64 first, u64 second)
{
	return frontend_mix(frontend_mix(mixed, first), second);
}

static __always_inline struct frontend_line *frontend_line_of(u64 sum)
{
	u32 at = ((sum ^ sum >> 32) * 0x9e3779b97f4a7c15ULL >> 48) & FRONTEND_LINE_MASK;

	return map_lookup(frontend_cache, &at);
}

static __always_inline u64 frontend_generation(void)
{
	return *(const volatile u64 *)map_value(frontend_generation);
}

/*
 * The agent marks this before each change of a Service's ranges, and counts it up afterwards
 * (datapath/services/frontend_cache.py).
 */
static __always_inline u64 range_generation(u32 service_id)
{
	const u64 *all = map_value(range_generations);

	return *(const volatile u64 *)(all + service_id % RANGE_GENERATIONS);
}

/* Returns the check of a line's range; @check is the line's, so the range is of no other line. */
static __always_inline u64 frontend_range_check(u64 check, u64 generation, u64 range)
{
	return frontend_mix(frontend_mix(check, generation), range);
}

/* Says if the line is of this key, if it is whole. */
static __always_inline bool frontend_has_key(const struct frontend_line *line, u64 upper, u64 lower,
					     u64 port)
{
	return !((line_word(line, upper) ^ upper) | (line_word(line, lower) ^ lower) |
		 (line_word(line, port) ^ port));
}

/* Says if a line is whole and of this generation, whatever its key is. */
static __always_inline bool frontend_is_valid(const struct frontend_line *line, u64 generation)
{
	const u64 mixed = frontend_mix_key(generation, line_word(line, upper),
					   line_word(line, lower), line_word(line, port));

	return line_word(line, check) ==
	       frontend_check(mixed, line_word(line, first), line_word(line, second));
}

/* A frontend that was found, and its line of the cache, if it is there: this has @check. */
struct found {
	struct service service;
	struct frontend_line *line;
	u64 check;
};

/* A frontend's key as words, and where it is cached. */
struct frontend_place {
	u64 upper;
	u64 lower;
	u64 port;
	u64 mixed;
	u64 generation;
	struct frontend_line *line;
};

static __always_inline u64 word_of(u32 low, u32 high)
{
	return low | (u64)high << 32;
}

static __always_inline bool frontend_place_of(const struct target *to, u64 generation,
					      struct frontend_place *place)
{
	place->upper = word_of(to->addr.word[0], to->addr.word[1]);
	place->lower = word_of(to->addr.word[2], to->addr.word[3]);
	place->port = to->port | (u64)to->proto << 16;
	place->generation = generation;
	place->mixed = frontend_mix_key(generation, place->upper, place->lower, place->port);
	place->line = frontend_line_of(frontend_sum(place->upper, place->lower, place->port));
	return place->line;
}

/*
 * Writes what was found, after the place's generation was read: a change that the look-up may have
 * missed makes the line invalid. A valid line of another frontend stays: two that are in use do not
 * take turns.
 */
static __always_inline void frontend_write(const struct frontend_place *place,
					   const union service_words *words, struct found *found)
{
	struct frontend_line *line = place->line;

	found->service = words->service;
	found->line = NULL;
	if (place->generation & GENERATION_CHANGING)
		return;
	if (frontend_is_valid(line, place->generation) &&
	    !frontend_has_key(line, place->upper, place->lower, place->port))
		return;
	found->line = line;
	found->check = frontend_check(place->mixed, words->first, words->second);
	line->upper = place->upper;
	line->lower = place->lower;
	line->port = place->port;
	line->first = words->first;
	line->second = words->second;
	line->check = found->check;
}

/* Copies what the agent has written of the frontend with exactly this address. */
static __always_inline bool copy_service(const struct target *to, struct found *found)
{
	const union service_words *in_map;
	struct frontend_place place;
	union service_words words;

	if (!frontend_place_of(to, frontend_generation(), &place))
		return false;
	if (frontend_has_key(place.line, place.upper, place.lower, place.port)) {
		words.first = line_word(place.line, first);
		words.second = line_word(place.line, second);
		found->service = words.service;
		found->line = place.line;
		found->check = frontend_check(place.mixed, words.first, words.second);
		if (line_word(place.line, check) == found->check)
			return true;
	}
	order_loads();
	in_map = (const void *)service_lookup(to, SCOPE_INTERNAL);
	if (!in_map)
		return false;
	words.first = in_map->first;
	words.second = in_map->second;
	frontend_write(&place, &words, found);
	return true;
}

/* Notes a range in its frontend's line; @generation was read before the range. */
static __always_inline void range_write(const struct found *found, u64 generation,
					union selection range)
{
	if (generation & GENERATION_CHANGING)
		return;
	found->line->range = range.word;
	found->line->range_check = frontend_range_check(found->check, generation, range.word);
}

/*
 * Returns the range that a frontend chooses from, which may be RANGE_OF_BACKENDS. It is noted in
 * the frontend's line as the frontend itself is: selections would be another cold line.
 */
static __always_inline union selection range_of(const struct found *found)
{
	const u32 index = selection_index(&found->service, policy_of(&found->service));
	struct frontend_line *line = found->line;
	union selection range;
	u64 generation;

	if (!line)
		return selection_of(index);
	generation = range_generation(found->service.id);
	range.word = line_word(line, range);
	if (line_word(line, range_check) ==
	    frontend_range_check(found->check, generation, range.word))
		return range;
	order_loads();
	range = selection_of(index);
	range_write(found, generation, range);
	return range;
}

#endif
