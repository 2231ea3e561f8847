/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Maps belong to the agent, which creates and pins them (datapath/maps.py) and compiles their file
 * descriptors in as MAP_FD_name: programs of any version can be loaded against maps that live on.
 */
#ifndef EBPFPROXY_MAPS_H
#define EBPFPROXY_MAPS_H

#define MAP(name)		 ((void *)bpf_pseudo_fd(BPF_PSEUDO_MAP_FD, MAP_FD_##name))
#define map_lookup(name, key)	 bpf_map_lookup_elem(MAP(name), (void *)(key))
#define map_update(name, key, v) bpf_map_update_elem(MAP(name), key, v, BPF_ANY)
#define map_delete(name, key)	 bpf_map_delete_elem(MAP(name), (void *)(key))

#endif
