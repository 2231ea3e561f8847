"""What programs have counted, and whose counts these are, read again and again.

With 10,000 Services most is as it was: what has not changed is compared as bytes, and not decoded again.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import Loads, backend_ids
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import UNALLOCATED, PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.counters import ServiceCounts
from ebpfproxy.datapath.services.measures import Measured, MeasureReader
from ebpfproxy.services.model import Backend, BackendState, ServicePortKey

#: Records of backends that are compared together.
_TOGETHER = 64

Names = Mapping[int, ServicePortKey]


class ServicePorts:
    """Names and backends by service id."""

    def __init__(self, maps: MapSet) -> None:
        self._maps, self._selections = maps, maps.selections()
        self._places = len(maps.backends())
        self._seen: tuple[bytes | None, bytes] = None, b""
        self._packed: dict[bytes, bytes] = {}
        self._slots: dict[int, bytes] = {}
        #: Another object when any has changed.
        self.names: Names = {}
        #: Ids of those that new connections get, whatever the policy.
        self.backends: dict[int, array[int]] = {}
        #: The number of service ports that have a backend, by its id.
        self.users: Counter[int] = Counter()
        #: More than the highest id of these.
        self.backends_end = 0

    def refresh(self) -> Collection[int]:
        """Reads again what may have changed; returns the ids of those that have other backends."""
        # The agent tells of each change once it is made: one that is made meanwhile is read the next time.
        seen = self._maps["programmed"].lookup(U32.pack(0)), self._selections.all_words()
        if seen == self._seen:
            return ()
        self._seen = seen
        changed = set(self._read_names())
        for number, slots in self._selections.packed_slots(self.names):
            if self._slots.get(number) != slots:
                self._slots[number] = slots
                self._set_backends(number, backend_ids(array("Q", slots)))
                changed.add(number)
        return changed

    def _set_backends(self, number: int, slots: array[int]) -> None:
        # Somebody else may have stored ids that no backend can have.
        ids = array("I", (each for each in dict.fromkeys(slots) if each < self._places))
        self.users.subtract(self.backends.get(number, ()))
        self.users.update(ids)
        self.backends[number] = ids
        self.backends_end = max(self.backends_end, 1 + max(ids, default=-1))

    def _read_names(self) -> list[int]:
        """Returns the ids that have no name any more."""
        packed = dict(self._maps["service_names"].items())
        if packed == self._packed:
            return []
        changed = {key: value for key, value in packed.items() if self._packed.get(key) != value}
        read = dict(layout.known_names(changed.items()))
        # Somebody else may have written some, which stand for no Service.
        for key in changed:
            if U32.unpack(key)[0] not in read:
                del packed[key]
        names = dict(self.names)
        removed = [U32.unpack(key)[0] for key in self._packed.keys() - packed.keys()]
        for number in removed:
            self.users.subtract(self.backends[number])
            for known in (names, self._slots, self.backends):
                del known[number]
        self._packed, self.names = packed, names | read
        return removed


#: Connections and datagrams of a service port since it has its id: chosen, refused, dropped.
Counts = tuple[int, int, int]


class Reading(NamedTuple):
    """All counts at one moment (CLOCK_MONOTONIC, in seconds)."""

    at: float
    names: Names
    #: The counts by service id; one without counts is missing.
    services: Mapping[int, Counts]
    #: Records by backend id, up to the highest that a service port has.
    loads: Loads
    open: Sequence[int]
    #: The number that is open to the backends of a service id; 0 is missing.
    open_of: Mapping[int, int]
    packets: Mapping[PacketEvent, int]
    #: Sockets that were refused because no Service has the address that they wanted.
    unallocated: int
    measured: Measured


class Reader:
    """Reads one set of maps. One thread uses it."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps
        self._counts, self._loads, self._backends = ServiceCounts(maps), maps.loads(), maps.backends()
        self._measures = MeasureReader(maps)
        self.ports = ServicePorts(maps)
        self._packed = b""
        self._open: list[int] = []
        self._open_of: dict[int, int] = {}

    def read(self, at: float) -> Reading:
        changed = self.ports.refresh()
        services = dict(self._counts.read(self.ports.names))
        packed = self._loads.packed(self.ports.backends_end)
        loads = Loads(memoryview(packed), self.ports.backends_end)
        if packed != self._packed:
            self._open = self._count_open(loads, packed)
            self._packed = packed
            self._open_of = dict(self._open_sums(self.ports.backends))
        elif changed:
            kept = {number: count for number, count in self._open_of.items() if number not in changed}
            self._open_of = kept | dict(self._open_sums(changed))
        return Reading(
            at=at,
            names=self.ports.names,
            services=services,
            loads=loads,
            open=self._open,
            open_of=self._open_of,
            packets=counters(self._maps["packet_events"]),
            unallocated=self._count_unallocated(),
            measured=self._measures.read(),
        )

    def backend(self, number: int) -> tuple[Backend, BackendState] | None:
        return self._backends.read(number)

    def _count_open(self, loads: Loads, packed: bytes) -> list[int]:
        end, size = len(loads), layout.BACKEND_SIZE * _TOGETHER
        found = self._open[:end] + [0] * (end - len(self._open))
        starts = range(0, len(packed), size)
        changed = [packed[at : at + size] != self._packed[at : at + size] for at in starts]
        first = 0
        for is_changed, run in groupby(changed):
            last = first + sum(1 for _ in run)
            if is_changed:
                ids = slice(first * _TOGETHER, min(last * _TOGETHER, end))
                found[ids] = loads.open_now(ids.start, ids.stop)
            first = last
        return found

    def _open_sums(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """How many are open to the backends of these service ports, if any are."""
        opened, backends = self._open.__getitem__, self.ports.backends
        sums = ((number, sum(map(opened, backends.get(number, ())))) for number in numbers)
        return ((number, count) for number, count in sums if count)

    def _count_unallocated(self) -> int:
        found = dict(self._maps["unallocated"].nonzero_counters())
        return sum(sum(found.get(index, ())) for (path, _), index in UNALLOCATED.items() if path == "socket")
