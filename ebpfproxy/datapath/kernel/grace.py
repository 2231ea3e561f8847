"""Waiting until every CPU has left the BPF programs that were running."""

from __future__ import annotations

import os

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel import bpf


class Grace:
    """An RCU grace period on demand.

    The kernel returns from the update of a map of maps only when no program can still see the old inner
    map (``maybe_wait_bpf_programs`` in kernel/bpf/syscall.c); programs in these hooks run inside an RCU
    read section, so none that started before is left. It takes some milliseconds.
    """

    def __init__(self) -> None:
        self._inner = bpf.map_create(uapi.MAP_ARRAY, "grace_inner", 4, 4, 1)
        self._outer = bpf.map_create(uapi.MAP_ARRAY_OF_MAPS, "grace", 4, 4, 1, inner_fd=self._inner)

    def wait(self) -> None:
        bpf.map_update(self._outer, bytes(4), U32.pack(self._inner))

    def close(self) -> None:
        os.close(self._outer)
        os.close(self._inner)
