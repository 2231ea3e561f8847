/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Comparisons and choices without a branch, for loops: for a bit that is known from a branch the
 * verifier walks each path through the loop separately.
 *
 * A bit is 0 or 1, never a mask: the verifier of Linux 6.18 also walks both ways for an AND with a
 * scalar that is 0 or -1. The barriers keep clang from making masks, or branches, of bits.
 */
#ifndef EBPFPROXY_BRANCHLESS_H
#define EBPFPROXY_BRANCHLESS_H

#include "compat.h"

static __always_inline u64 sign_of(u64 value)
{
	u64 bit = value >> 63;

	barrier_var(bit);
	return bit;
}

/* @value is below 2^63. */
static __always_inline u64 is_zero(u64 value)
{
	return sign_of(value - 1);
}

/* Both are below 2^63. */
static __always_inline u64 is_less(u64 a, u64 b)
{
	return sign_of(a - b);
}

/* Returns @if_set where @bit is 1, @otherwise where it is 0. */
static __always_inline u64 select(u64 bit, u64 if_set, u64 otherwise)
{
	return otherwise + (if_set - otherwise) * bit;
}

#endif
