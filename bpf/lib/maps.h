/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The agent creates and pins the maps (datapath/kernel/maps.py), so that programs of any version
 * can be loaded against maps that live on. Compiled programs refer to a map, or to a constant that
 * is known at the load, by a number; the loader replaces it by the file descriptor or the value
 * (datapath/programs/bytecode.py).
 */
#ifndef EBPFPROXY_MAPS_H
#define EBPFPROXY_MAPS_H

#include "compat.h"

/* Returns what lies in memory as these two words, one after the other. */
static __always_inline u64 two_words(u32 first, u32 second)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return first | (u64)second << 32;
#else
	return (u64)first << 32 | second;
#endif
}

#define MAP(name) ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, MAP_NUMBER_##name))
/* Returns the value of an array that has one; the verifier knows its address. */
#define map_value(name)	      ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_VALUE, MAP_NUMBER_##name))
#define map_lookup(name, key) bpf_map_lookup_elem(MAP(name), (void *)(key))
/*
 * Looks up a number by what fills a word of the stack: the verifier takes a shorter key for another
 * state with each other thing that lies beside it.
 */
#define map_at(name, number)                                                                       \
	({                                                                                         \
		const u64 key_ = two_words(number, 0);                                             \
		map_lookup(name, &key_);                                                           \
	})
#define map_update(name, key, v) bpf_map_update_elem(MAP(name), key, v, BPF_ANY)
#define map_delete(name, key)	 bpf_map_delete_elem(MAP(name), (void *)(key))
/*
 * This source register has no meaning to the kernel: such an instruction is never loaded as it is.
 */
#define LOAD_TIME_CONSTANT 15
#define CONSTANT(name)	   bpf_pseudo_fd(LOAD_TIME_CONSTANT, CONSTANT_NUMBER_##name)
/* The constant is the BTF id of a kernel function; where it is 0, nothing may lead to the call. */
#define KERNEL_FUNCTION(name) ((void *)(0x7f000000UL + CONSTANT_NUMBER_##name))

#endif
