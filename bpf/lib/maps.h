/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Maps belong to the agent, which creates and pins them (datapath/kernel/maps.py): programs of any
 * version can be loaded against maps that live on. Compiled programs refer to a map, or to a
 * constant that is known at the load, by a number; whoever loads them puts the file descriptor or
 * the value in its place (datapath/programs/bytecode.py).
 */
#ifndef EBPFPROXY_MAPS_H
#define EBPFPROXY_MAPS_H

#define MAP(name)		 ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, MAP_NUMBER_##name))
#define map_lookup(name, key)	 bpf_map_lookup_elem(MAP(name), (void *)(key))
#define map_update(name, key, v) bpf_map_update_elem(MAP(name), key, v, BPF_ANY)
#define map_delete(name, key)	 bpf_map_delete_elem(MAP(name), (void *)(key))
/* A source register that has no meaning to the kernel: never loaded as it is. */
#define LOAD_TIME_CONSTANT 15
#define CONSTANT(name)	   bpf_pseudo_fd(LOAD_TIME_CONSTANT, CONSTANT_NUMBER_##name)

#endif
