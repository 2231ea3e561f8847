"""Decisions of programs, for the command that reads them: what it asks for, its lease, and the ring.

A command holds a lease in the ``tracing`` map, and renews it. The agent sees it there and attaches programs
that report decisions (``agent.tracing``). When the lease ends, by the command or by its death, programs
report nothing from that moment on, and the agent attaches the plain ones again.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

from ebpfproxy.datapath.abi.decision_layout import (
    POD_NAME,
    PROGRAMS_AT,
    WANTED_AT,
    Decision,
    Lost,
    TracingPrograms,
    Wanted,
    pack_wanted,
    unpack_decision,
)
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC, U32, pack_address, unpack_address
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.ringbuf import RingBuffer

#: How long a lease lasts that is not renewed.
LEASE_SECONDS = 3.0


class TracingInUseError(Exception):
    """Another command traces on this node."""


class Tracing:
    """The ``tracing`` map. A command writes all of it but ``programs``, by which the agent answers."""

    def __init__(self, maps: MapSet) -> None:
        shared = maps.shared("tracing")
        self._memory = shared.memory
        # ctypes stores each with one instruction: programs read them meanwhile.
        self._until = ct.c_uint64.from_buffer(shared.memory)
        self._programs = ct.c_uint32.from_buffer(shared.memory, PROGRAMS_AT)

    @property
    def is_wanted(self) -> bool:
        """True while a command holds the lease."""
        return time.monotonic_ns() < self._until.value

    @property
    def programs(self) -> TracingPrograms:
        return TracingPrograms(self._programs.value)

    @programs.setter
    def programs(self, now: TracingPrograms) -> None:
        self._programs.value = now

    def want(self, wanted: Wanted) -> None:
        """From now on these are reported; programs need not be replaced for that."""
        self._memory[WANTED_AT:PROGRAMS_AT] = pack_wanted(wanted)

    def renew(self) -> None:
        self._until.value = time.monotonic_ns() + int(LEASE_SECONDS * NSEC_PER_SEC)

    def end(self) -> None:
        self._until.value = 0


@contextmanager
def lease(maps: MapSet) -> Iterator[Tracing]:
    """Holds the lease, which the caller renews; at first nothing is wanted. Raises TracingInUseError."""
    # The lock ends with the process, however that ends.
    folder = os.open(maps.folder / "maps", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TracingInUseError("another ebpfproxy trace runs on this node") from None
        tracing = Tracing(maps)
        tracing.want(Wanted(frozenset()))
        tracing.programs = TracingPrograms.PLAIN
        tracing.renew()
        try:
            yield tracing
        finally:
            tracing.end()
    finally:
        os.close(folder)


def trace_services(maps: MapSet, ids: Iterable[int]) -> None:
    """Sets the Services that ``Wanted.by_service`` is about."""
    maps["traced_services"].bring({U32.pack(number): U32.pack(1) for number in ids})


def lost(maps: MapSet) -> Lost:
    """All that were lost since the maps were made."""
    for _, (_, limited, full, *_) in maps["decision_state"].nonzero_counters():
        return Lost(limited, full)
    return Lost(0, 0)


class DecisionReader:
    """Reads decisions. There is one reader on a node: it holds the lease."""

    def __init__(self, maps: MapSet) -> None:
        self._records: list[bytes] = []
        self._ring = RingBuffer(maps["decisions"].fd, self._records.append)

    def read(self) -> list[Decision]:
        """Those that have come since the last time, without waiting for any."""
        self._ring.consume()
        found = []
        for record in self._records:
            # Programs of another version may know more kinds, and more of each.
            with suppress(IndexError, struct.error):
                found.append(unpack_decision(record))
        self._records.clear()
        return found

    def close(self) -> None:
        self._ring.close()


class PodNames:
    """The ``pod_names`` map: the pods behind endpoints' addresses, which the agent writes for who traces."""

    def __init__(self, maps: MapSet) -> None:
        self._map = maps["pod_names"]

    def bring(self, names: Mapping[bytes, str]) -> None:
        """Makes the map hold these, by address; those without room are left out."""
        self._map.bring(
            {pack_address(address): POD_NAME.pack(name.encode()) for address, name in names.items()}
        )

    def of(self, address: bytes) -> str:
        """``namespace/name``, empty where it is not known."""
        found = self._map.lookup(pack_address(address))
        return _name(found) if found else ""

    def addresses(self, name: str) -> list[bytes]:
        """The addresses of a pod."""
        return [unpack_address(key) for key, value in self._map.items() if _name(value) == name]


def _name(packed: bytes) -> str:
    return packed.rstrip(b"\0").decode(errors="replace")
