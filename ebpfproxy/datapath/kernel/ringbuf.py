"""Reading a ring buffer (BPF_MAP_TYPE_RINGBUF, Linux 5.8) by libbpf, which knows its memory barriers.

A ring has one reader: two would share its records between them.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable

from ebpfproxy.datapath.kernel.libbpf import RING_CALLBACK, check, lib


class RingBuffer:
    """A reader of the ring with this descriptor, which must stay open. Close it."""

    def __init__(self, fd: int, receive: Callable[[bytes], None]) -> None:
        """``receive`` gets each record; it must not raise. Raises BpfError."""

        def called(_: int, data: int, size: int) -> int:
            receive(ct.string_at(data, size))
            return 0

        # libbpf keeps its address.
        self._callback = RING_CALLBACK(called)
        self._ring = lib.ring_buffer__new(fd, self._callback, None, None)
        if not self._ring:
            check(-ct.get_errno(), "open ring buffer")

    def consume(self) -> int:
        """Passes on the records that are there, without waiting for any; returns how many."""
        return check(lib.ring_buffer__consume(self._ring), "read ring buffer")

    def close(self) -> None:
        lib.ring_buffer__free(self._ring)
        self._ring = None
