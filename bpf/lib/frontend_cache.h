/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cache of frontends keeps what look-ups have found, in an array that needs no helper, one
 * cache line for each. A look-up in a hash takes a call, and two or three lines, of which most are
 * cold.
 *
 * The maps services4 and services6 hold what is true. After each change of them the agent advances
 * frontend_generation (datapath/services/frontend_table.py), and no line counts any more. A line's
 * check says that it is whole and of this generation: two CPUs may write one at once.
 */
#ifndef EBPFPROXY_FRONTEND_CACHE_H
#define EBPFPROXY_FRONTEND_CACHE_H

#include "addr.h"
#include "maps.h"
#include "options.h"

/* Any odd factors do. The last one keeps a line of zeros from being whole. */
#define FRONTEND_FACTOR_1 0x9e3779b97f4a7c15ULL
#define FRONTEND_FACTOR_2 0xc2b2ae3d27d4eb4fULL
#define FRONTEND_FACTOR_3 0x165667b19e3779f9ULL
#define FRONTEND_FACTOR_4 0xbf58476d1ce4e5b9ULL
#define FRONTEND_FACTOR_5 0x94d049bb133111ebULL
#define FRONTEND_FACTOR_6 0xff51afd7ed558ccdULL
#define FRONTEND_NOT_ZERO 0xd6e8feb86659fd93ULL

/* Each word of a line is read once. */
#define line_word(line, field) (*(const volatile u64 *)&(line)->field)

/* Sums up a key. */
static __always_inline u64 frontend_sum(u64 upper, u64 lower, u64 port)
{
	return upper * FRONTEND_FACTOR_1 + lower * FRONTEND_FACTOR_2 + port * FRONTEND_FACTOR_3;
}

/* Sums up a line; @sum is that of its key. */
static __always_inline u64 frontend_check(u64 sum, u64 first, u64 second, u64 generation)
{
	return sum + first * FRONTEND_FACTOR_4 + second * FRONTEND_FACTOR_5 +
	       generation * FRONTEND_FACTOR_6 + FRONTEND_NOT_ZERO;
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
	const u64 sum =
		frontend_sum(line_word(line, upper), line_word(line, lower), line_word(line, port));

	return line_word(line, check) ==
	       frontend_check(sum, line_word(line, first), line_word(line, second), generation);
}

#endif
