"""Numbers of the kernel's BPF interface (include/uapi/linux/bpf.h)."""

from __future__ import annotations

# enum bpf_map_type
MAP_HASH = 1
MAP_ARRAY = 2
MAP_PROG_ARRAY = 3
MAP_PERCPU_HASH = 5
MAP_PERCPU_ARRAY = 6
MAP_LRU_HASH = 9
MAP_LPM_TRIE = 11
MAP_ARRAY_OF_MAPS = 12
MAP_RINGBUF = 27

# Map creation flags
F_NO_PREALLOC = 1 << 0
F_MMAPABLE = 1 << 10
#: A link that is created with it comes before all others of its hook.
F_BEFORE = 1 << 3

# enum bpf_prog_type
PROG_SCHED_CLS = 3
PROG_XDP = 6
PROG_CGROUP_SOCK = 9
PROG_SOCK_OPS = 13
PROG_CGROUP_SOCK_ADDR = 18
PROG_EXT = 28

# enum bpf_func_id
FUNC_GET_NETNS_COOKIE = 122
FUNC_REDIRECT_NEIGH = 152
FUNC_SET_RETVAL = 187
