"""The sweep of the conntrack map, which ends flows that have timed out.

Programs never look for old entries. A sweep reads the whole map in batches and deletes the pairs of entries
that are over; an entry whose other half is still in use stays.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from ebpfproxy.datapath.abi.flow_layout import (
    BackendUse,
    Entry,
    NatFlags,
    RemovalReason,
    Seen,
    entry_at,
    reversed_at_egress,
    summaries,
)
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import BOTH_FIN, PROTOCOL_NAMES, Timeouts, counters
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Family, Protocol

_NS = 1_000_000_000
#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 1024
#: Looked at once more, then deleted: well under a millisecond from one to the other.
_DELETED_AT_ONCE = 64
#: Plain integers: an operation on an IntFlag takes a microsecond, and is done for each entry.
_NOT_ORIGINAL = int(NatFlags.REPLY | NatFlags.SOURCE)
_REPLY, _SOURCE = int(NatFlags.REPLY), int(NatFlags.SOURCE)
_ENDED = frozenset(seen for seen in range(256) if seen & Seen.RST or seen & BOTH_FIN == BOTH_FIN)


class Sweep(msgspec.Struct, frozen=True):
    """The result of one sweep. ``evicted`` since the previous one: inserted, but neither there nor deleted.

    ``removed``: flows among the expired that were ended because their backend was removed.
    """

    entries: int
    expired: int
    evicted: int
    seconds: float
    removed: Mapping[Family, int] = {}


class Sweeper:
    """Deletes flows that have ended or timed out. One thread uses it."""

    def __init__(
        self,
        maps: MapSet,
        timeouts: Timeouts,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """``clock`` is CLOCK_MONOTONIC in ns; ``rest`` is called between batches."""
        self._map = maps["conntrack"]
        self._loads = maps.loads()
        #: Backends whose flows were seen by the previous sweep.
        self._busy: set[int] = set()
        self._events = maps["packet_events"]
        self._clock = clock
        self._rest = rest
        self._timeouts = timeouts
        #: For most entries the shorter time alone is looked at.
        self._limits: dict[tuple[int, int], int] = {
            (protocol, seen): int(min(timeouts.of(protocol, seen), timeouts.of(protocol, seen, 0)) * _NS)
            for protocol in PROTOCOL_NAMES
            for seen in range(16)
        }
        self._deleted = 0
        #: Inserted less deleted less present, when this sweeper began.
        self._missing: int | None = None

    def sweep(self, removed: Mapping[BackendUse, Removal] | None = None, backends: int = 0) -> Sweep:
        """Deletes what is over now, and the flows of backends that were removed.

        What changes meanwhile may be counted twice or not at all. ``backends``: one more than the highest id
        in use. What is open to each is counted, and its ``loads`` put right.
        """
        began = time.monotonic()
        reasons: dict[tuple[int, int], RemovalReason] = {
            use: each.why for use, each in (removed or {}).items()
        }
        entries = 0
        old: dict[bytes, Entry] = {}
        self._removed: dict[bytes, Entry] = {}
        self._open: Counter[int] = Counter()
        before = {number: self._begun_and_ended(number) for number in self._busy}
        for keys, values, count in self._batches():
            entries += count
            self._collect(keys, values, count, reasons, old)
            self._rest()
        over, deleted = self._delete(self._over(old) | self._removed)
        self._deleted += deleted
        self._open.subtract(entry.use.backend_id for entry in over if _is_open(entry))
        self._correct_loads(before)
        evicted = self._evicted(entries - deleted)
        if evicted:
            self._busy.update(self._loads.with_flows(backends))
        seconds = time.monotonic() - began
        return Sweep(entries - deleted, deleted, evicted, seconds, self._removed_flows())

    def _batches(self) -> Iterator[tuple[memoryview, memoryview, int]]:
        spec = self._map.spec
        return bpf.map_lookup_batches(self._map.fd, spec.key_size, spec.value_size, _BATCH)

    def _collect(
        self,
        keys: memoryview,
        values: memoryview,
        count: int,
        reasons: Mapping[tuple[int, int], RemovalReason],
        old: dict[bytes, Entry],
    ) -> None:
        """Counts open flows, and adds the entries that have been silent for too long."""
        now, limits = self._clock(), self._limits
        opened = []
        for place, (protocol, fields) in enumerate(summaries(keys, values, count)):
            service_id, backend_id, flags, seen, last = fields
            if not flags & _NOT_ORIGINAL and seen not in _ENDED:
                opened.append(backend_id)
            why = reasons.get((service_id, backend_id)) if reasons else None
            # A connection to one that is only not ready goes on.
            if why is RemovalReason.GONE or (why and protocol != Protocol.TCP):
                entry = entry_at(keys, values, place)
                self._removed[entry.key] = entry
            elif now - last > limits.get((protocol, seen), 0):
                entry = entry_at(keys, values, place)
                if self._is_silent(entry, seen, now):
                    old[entry.key] = entry
        self._open.update(opened)

    def _is_silent(self, entry: Entry, seen: int, now: int) -> bool:
        """True if a flow has timed out. ``seen``: that of both halves."""
        protocol, last = entry.protocol, entry.last
        if protocol not in PROTOCOL_NAMES:
            return True
        return (now - last) / _NS > self._timeouts.of(protocol, seen, (last - entry.created) / _NS)

    def _lookup(self, key: bytes) -> Entry | None:
        value = self._map.lookup(key)
        return Entry(key, value) if value is not None else None

    def _over(self, old: dict[bytes, Entry]) -> dict[bytes, Entry]:
        """Those whose other half is silent, too, or gone; and that half, if only this one saw the end."""
        over = {}
        now = self._clock()
        for key, entry in old.items():
            partner = entry.partner
            other = self._lookup(partner) if partner not in old else None
            if other is not None and other.partner == key:
                if not self._is_silent(other, other.seen | entry.seen, now):
                    continue
                over[partner] = other
            over[key] = entry
        for entry in [each for each in over.values() if each.flags & _SOURCE]:
            self._keep_masquerade(entry, over)
        return over

    def _keep_masquerade(self, entry: Entry, over: dict[bytes, Entry]) -> None:
        """A masquerade stays as long as its flow: without it the backend would see the client.

        So does a direct flow with a port of its own: its Service's flow is still in the way.
        """
        if entry.key not in over or entry.flags & _REPLY:
            return
        reply = reversed_at_egress(entry.key)
        if reply not in over and self._lookup(reply) is not None:
            del over[entry.key]
            over.pop(entry.partner, None)

    def _delete(self, over: Mapping[bytes, Entry]) -> tuple[list[Entry], int]:
        """Deletes those that are still as they were found; returns them, and how many were there.

        Reading a large map takes long enough for a port to be used again: such an entry is another flow's, or
        goes on. Both halves go together, and masquerades after the flows that they belong to: a packet in
        between begins anew, and does not meet one half.
        """
        gone: list[Entry] = []
        deleted = 0
        doomed: list[bytes] = []
        for pair in pairs(over.values()):
            if all(map(self._is_as_found, pair)):
                doomed += (entry.key for entry in pair)
                gone += pair
            if len(doomed) >= _DELETED_AT_ONCE:
                deleted += self._map.delete_many(doomed)
                doomed = []
                self._rest()
        return gone, deleted + self._map.delete_many(doomed)

    def _is_as_found(self, found: Entry) -> bool:
        """True for the same flow that has been silent since, or whose backend was removed."""
        now = self._lookup(found.key)
        if now is None:
            return True
        if now.created != found.created:
            return False
        if found.key in self._removed:
            return now.use == found.use
        return now.last == found.last

    def _removed_flows(self) -> Mapping[Family, int]:
        """Counts flows by their original direction: one of the two or four entries of each."""
        return Counter(
            Family.IPV4 if len(entry.source) == 4 else Family.IPV6
            for entry in self._removed.values()
            if not entry.flags & _NOT_ORIGINAL
        )

    def _begun_and_ended(self, number: int) -> tuple[int, int]:
        load = self._loads[number]
        return load.flows_begun, load.flows_ended

    def _correct_loads(self, before: dict[int, tuple[int, int]]) -> None:
        """Takes flows that ended without a packet, or were evicted, out of the loads.

        What began or ended during the sweep may or may not be among the open ones: only a count that
        cannot be right is changed, to the nearest that can. A backend that had no flows at the sweep before
        has its turn at the next one.
        """
        self._busy = set(self._open)
        for number, (begun_before, ended_before) in before.items():
            load = self._loads[number]
            seen, known = self._open[number], load.counted_flows
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


def pairs(entries: Iterable[Entry]) -> Iterator[tuple[Entry, ...]]:
    """Yields both halves of a pair together if both are there; those of masquerades last."""
    there = {entry.key: entry for entry in entries}
    for masquerades in (0, _SOURCE):
        done: set[bytes] = set()
        for key, entry in there.items():
            if entry.flags & _SOURCE != masquerades or key in done:
                continue
            partner = there.get(entry.partner)
            if partner is not None and partner is not entry:
                done.add(partner.key)
                yield entry, partner
            else:
                yield (entry,)


def _is_open(entry: Entry) -> bool:
    """True if an entry counts as an open flow: it is the original direction, and not closed."""
    return not entry.flags & _NOT_ORIGINAL and entry.seen not in _ENDED
