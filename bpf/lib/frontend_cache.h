/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cache of frontends keeps what look-ups have found, in an array that needs no helper, one
 * cache line for each. A look-up in a hash takes a call, and two or three lines, of which most are
 * cold.
 *
 * The maps services4 and services6 hold what is true. After each change of them the agent sets
 * frontend_generation to another random number (datapath/services/frontend_table.py), and no line
 * counts any more. A line's check says that it is whole and of this generation: two CPUs may write
 * one at once. Who can choose a frontend's address could choose one for which a line of two halves
 * looked whole, if the check were a sum; so it mixes, beginning with the number, which nobody
 * knows.
 */
#ifndef EBPFPROXY_FRONTEND_CACHE_H
#define EBPFPROXY_FRONTEND_CACHE_H

#include "addr.h"
#include "maps.h"
#include "options.h"

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

	return frontend_mix(frontend_mix(mixed, lower), port);
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

#endif
