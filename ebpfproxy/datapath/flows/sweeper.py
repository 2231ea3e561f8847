"""The sweep of the conntrack map, which ends flows that have timed out.

A packet's program ends the flow that it begins anew, or whose port it needs; others stay until a sweep. That
reads the whole map in batches, and for each entry runs ``bpf/sweep.c``, which decides and deletes: an entry
whose other half is still in use stays.
"""

from __future__ import annotations

import ctypes as ct
import errno
import fcntl
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from ebpfproxy.datapath.abi.hooks import SWEEP
from ebpfproxy.datapath.abi.layout import NSEC_PER_SEC
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.abi.schema import BYTES_OF_A_RUN, ENTRIES_OF_A_RUN, FLOW_FILTER_BITS, SWEEP_BATCH
from ebpfproxy.datapath.flows.conntrack_table import Timeouts, counters
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Family, Protocol

#: Rows of ``limits`` in struct sweep. The fourth is of protocols that no Service has: they end at once.
_PROTOCOLS = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
#: A packet has to have an Ethernet header; programs do not look at it.
_NO_PACKET = bytes(14)
#: A sweep takes no more than this share of a CPU: after a long one there is a longer rest.
_SHARE = 0.01


class Sweep(msgspec.Struct, frozen=True):
    """The result of one sweep. ``evicted`` since the previous one: inserted, but neither there nor deleted.

    ``removed``: flows among the expired that were ended because their backend was removed.
    ``rest``: for so many seconds there should be no other. ``left``: entries of flows whose backend was
    removed that another CPU was replacing, so that the next sweep has to end them.
    """

    entries: int
    expired: int
    evicted: int
    seconds: float
    removed: Mapping[Family, int] = {}
    rest: float = 0.0
    left: int = 0


class Sweeper:
    """Deletes flows that have ended or timed out. One thread uses it. Close it."""

    def __init__(
        self,
        maps: MapSet,
        timeouts: Timeouts,
        programs: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """``programs``: the folder where they are pinned. ``clock`` is CLOCK_MONOTONIC in ns.

        ``rest`` is called between batches.
        """
        self._maps, self._map = maps, maps["conntrack"]
        self._record = maps.sweep()
        self._keys, self._values = (
            (ct.c_char * (shared.stride * SWEEP_BATCH)).from_buffer(shared.memory)
            for shared in map(maps.shared, ("sweep_keys", "sweep_values"))
        )
        self._loads = maps.loads()
        #: Backends whose flows were seen by the previous sweep.
        self._busy: set[int] = set()
        self._events = maps["packet_events"]
        self._clock = clock
        self._rest = rest
        set_timeouts(maps, timeouts)
        self._marks = itertools.cycle((1, 2))
        self._deleted = 0
        #: Inserted less deleted less present, when this sweeper began.
        self._missing: int | None = None
        self._programs = programs
        self._entries, self._filter = _opened(programs)
        self._lock = os.open(maps.folder, os.O_RDONLY | os.O_DIRECTORY)

    def use(self, programs: Path) -> None:
        """From the next sweep on with the programs in this folder."""
        if programs != self._programs:
            for fd in (self._entries, self._filter):
                os.close(fd)
            self._programs = programs
            self._entries, self._filter = _opened(programs)

    def sweep(self, backends: int = 0) -> Sweep:
        """Deletes what is over now, and the flows of backends that were removed, as ``departures`` has them.

        What changes meanwhile may be counted twice or not at all. ``backends``: one more than the highest id
        in use. What is open to each is counted, and its load put right.
        """
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            return self._sweep(backends)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _sweep(self, backends: int) -> Sweep:
        began, used = time.monotonic(), time.thread_time()
        # The array may be mapped further than it was at the last time.
        self._loads = self._maps.loads()
        self._record.begin(self._clock(), next(self._marks))
        self._loads.forget_seen(backends)
        before = {number: self._begun_and_ended(number) for number in self._busy}
        fd, key_size = self._map.fd, self._map.spec.key_size
        for count in bpf.map_lookup_batches_into(fd, self._keys, self._values, key_size, SWEEP_BATCH):
            self._run(self._entries, count, ENTRIES_OF_A_RUN)
            self._rest()
        self._run(self._filter, (1 << FLOW_FILTER_BITS) // BYTES_OF_A_RUN)
        kept, deleted, removed4, removed6, left = self._record.results
        self._deleted += deleted
        self._correct_loads(before, self._loads.seen(backends))
        evicted = self._evicted(kept)
        if evicted:
            self._busy.update(self._loads.with_flows(backends))
        return Sweep(
            kept,
            deleted,
            evicted,
            time.monotonic() - began,
            {family: n for family, n in ((Family.IPV4, removed4), (Family.IPV6, removed6)) if n},
            (time.thread_time() - used) / _SHARE,
            left,
        )

    def _run(self, program: int, numbers: int, at_once: int = 1) -> None:
        """Runs a program until it has done everything. ``at_once``: so much in a run."""
        self._record.set_numbers(numbers)
        while left := self._record.left:
            try:
                bpf.prog_run(program, _NO_PACKET, -(-left // at_once))
            except BpfError as error:
                if error.errno != errno.EINTR:
                    raise

    def close(self) -> None:
        for fd in (self._entries, self._filter, self._lock):
            os.close(fd)

    def _begun_and_ended(self, number: int) -> tuple[int, int]:
        load = self._loads[number]
        return load.flows_begun, load.flows_ended

    def _correct_loads(self, before: dict[int, tuple[int, int]], open_: Mapping[int, int]) -> None:
        """Takes flows that ended without a packet, or were evicted, out of the loads.

        What began or ended during the sweep may or may not be among the open ones: only a count that
        cannot be right is changed, to the nearest that can. A backend that had no flows at the sweep before
        has its turn at the next one.
        """
        self._busy = set(open_)
        for number, (begun_before, ended_before) in before.items():
            load = self._loads[number]
            seen, known = open_.get(number, 0), load.counted_flows
            lowest = seen - (load.flows_ended - ended_before)
            highest = seen + (load.flows_begun - begun_before)
            right = min(max(known, lowest), highest)
            if right != known:
                self._loads.correct(number, right - known)
            if right:
                self._busy.add(number)

    def _evicted(self, present: int) -> int:
        """How many have vanished from the LRU map since the last time."""
        events = counters(self._events)
        made, ended = events[PacketEvent.FLOWS_MADE], events[PacketEvent.FLOWS_ENDED]
        missing = made - ended - self._deleted - present
        if self._missing is None:
            self._missing = missing
        evicted = max(0, missing - self._missing)
        self._missing = max(missing, self._missing)
        return evicted


def _opened(programs: Path) -> tuple[int, int]:
    entries, of_filter = (bpf.get_pinned(programs / hook.name) for hook in SWEEP.hooks)
    return entries, of_filter


def set_timeouts(maps: MapSet, timeouts: Timeouts) -> None:
    """Tells programs when a flow has timed out, which ``bpf/lib/timeout.h`` needs before the first sweep."""
    maps.sweep().set_limits(_limits(timeouts))


def _limits(timeouts: Timeouts) -> list[int]:
    """``limits`` of struct sweep: nanoseconds by protocol, ``seen``, and if a flow is older than a second."""
    limits = [
        int(timeouts.of(protocol, seen, lasted) * NSEC_PER_SEC)
        for protocol in _PROTOCOLS
        for seen in range(16)
        for lasted in (0.0, math.inf)
    ]
    return limits + [-NSEC_PER_SEC] * 32
