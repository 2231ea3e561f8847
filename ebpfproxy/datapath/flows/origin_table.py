"""Origins: which frontend a socket asked for, and which backend it got (``bpf/lib/origin.h``).

Programs alone write them: what the agent changes, it changes by a program (``record_programs``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.abi.socket_layout import (
    ORIGIN,
    ORIGIN_KIND_AT,
    OriginKind,
    is_connected,
    origin_key,
    split_origins,
)
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import WindowedArray
from ebpfproxy.datapath.kernel.maps import MapSet

#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 1024
_NO_REST: Callable[[], None] = lambda: None  # noqa: E731


class OriginTable:
    """``sock_origin``, an array of slots, and the hash of connected sockets whose slot another one has."""

    def __init__(self, maps: MapSet) -> None:
        slots = maps["sock_origin"]
        assert isinstance(slots, WindowedArray)
        self._slots = slots
        self._overflow = maps["sock_origin_overflow"]

    def connected(self, rest: Callable[[], None] = _NO_REST) -> Iterator[bytes]:
        """Packed origins of connected sockets, many at a time. ``rest`` is called after each of them.

        A socket that is connected or closed meanwhile may be among them, or not.
        """
        yield from self._in_slots(rest, OriginKind.CONNECTED)
        yield from self._in_overflow(OriginKind.CONNECTED, rest)

    def closed(self, rest: Callable[[], None] = _NO_REST) -> Iterator[bytes]:
        """The same of closed TCP sockets whose connection still goes on; only while traffic is measured."""
        yield from self._in_slots(rest, OriginKind.CLOSED)
        yield from self._in_overflow(OriginKind.CLOSED, rest)

    def unconnected(self, rest: Callable[[], None] = _NO_REST) -> Iterator[bytes]:
        """The same of unconnected datagram sockets: the first frontend that each has sent to."""
        return self._in_slots(rest, OriginKind.UNCONNECTED)

    def open(self) -> Iterator[bytes]:
        """The same of connected and unconnected sockets, in half of the time of one after the other."""
        yield from self._in_slots(_NO_REST, OriginKind.CONNECTED, OriginKind.UNCONNECTED)
        yield from self._in_overflow(OriginKind.CONNECTED, _NO_REST)

    def _in_slots(self, rest: Callable[[], None], *wanted_kinds: OriginKind) -> Iterator[bytes]:
        size, wanted = ORIGIN.size, re.compile(b"[" + re.escape(bytes(wanted_kinds)) + b"]")
        for window in self._slots.windows():
            # The kinds alone are copied first: most slots are free.
            kinds = window[ORIGIN_KIND_AT::size]
            found = [place.start() * size for place in wanted.finditer(kinds)]
            for some in (found[at : at + _BATCH] for at in range(0, len(found), _BATCH)):
                yield b"".join([window[at : at + size] for at in some])
                rest()

    def _in_overflow(self, kind: OriginKind, rest: Callable[[], None]) -> Iterator[bytes]:
        size = ORIGIN.size
        for _, values, count in bpf.map_lookup_batches(self._overflow.fd, U64.size, size, _BATCH):
            found = bytes(values[: count * size])
            if found[ORIGIN_KIND_AT::size].count(kind) != count:
                found = b"".join(each for each in split_origins(found) if each[ORIGIN_KIND_AT] == kind)
            yield found
            rest()

    def of(self, cookie: int) -> bytes | None:
        """The packed origin of a connected socket."""
        place = U32.pack(cookie & self._slots.spec.max_entries - 1)
        found = self._slots.lookup(place)
        if found is not None and found[: U64.size] == origin_key(cookie, OriginKind.CONNECTED):
            return found
        elsewhere = self._overflow.lookup(U64.pack(cookie))
        return elsewhere if elsewhere is not None and is_connected(elsewhere) else None


def each_of(batches: Iterator[bytes]) -> Iterator[bytes]:
    return (origin for batch in batches for origin in split_origins(batch))
