"""Compares the maps that the agent alone writes with what it has written.

Reading is for a worker, which takes its time; what it suspects is confirmed in the thread that writes the
maps, between two of its changes: what is half published is never taken for drift. A hash is compared by a
digest of all its entries, so that nothing is packed twice while nothing changes; an array is compared with
its writer's copy, a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.drift.compare import Difference, differences, differing_elements, digest
from ebpfproxy.datapath.kernel.bpf_map import SharedArray
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned

#: A table that changes each time while it is read is confirmed all the same after so many readings.
_READINGS = 3


class TableReading(msgspec.Struct):
    """One table, as it is read. ``writes`` counts what the agent had written to it before."""

    name: str
    writes: int
    #: What is to be digested; None if nothing has been written since ``wanted`` was computed.
    entries: Iterable[tuple[bytes, bytes]] | None
    wanted: int
    found: int = 0


class Reading(NamedTuple):
    """``parts`` are those of arrays' copies from which the arrays differed when they were read."""

    tables: list[TableReading]
    arrays: list[str]
    parts: dict[str, list[slice]]


class Checker:
    """Finds differences. All but :meth:`read` belongs to the thread that writes the maps."""

    def __init__(self, maps: MapSet, owned: Iterable[Owned]) -> None:
        self._maps = maps
        self._tables = {each.map.spec.name: each for each in owned}
        #: Digests of what tables should hold, with their number of writes.
        self._digests: dict[str, tuple[int, int]] = {}
        self._unsettled: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The maps that are compared."""
        return [*self._tables, *(each.spec.name for each in self._arrays())]

    def _arrays(self) -> list[SharedArray]:
        return [each for each in self._maps.maps.values() if isinstance(each, SharedArray) and each.is_kept]

    def begin(self) -> Reading:
        """What :meth:`read` is to read."""
        tables = []
        for name, (table, entries) in self._tables.items():
            writes, wanted = self._digests.get(name, (-1, 0))
            is_known = writes == table.writes
            tables.append(TableReading(name, table.writes, None if is_known else entries(), wanted))
        return Reading(tables, [each.spec.name for each in self._arrays()], {})

    def read(self, reading: Reading, rest: Callable[[], None]) -> Reading:
        """Reads all maps, in any thread; ``rest`` is called after each part."""
        for each in reading.tables:
            if each.entries is not None:
                each.wanted, each.entries = digest(each.entries), None
                rest()
            each.found = digest(self._maps[each.name].items())
            rest()
        for name in reading.arrays:
            found = list(self._maps.shared(name).differing())
            if found:
                reading.parts[name] = found
            rest()
        return reading

    def confirm(self, reading: Reading) -> list[Difference]:
        """The differences that there are now, where a reading suspects any."""
        found: list[Difference] = []
        for each in reading.tables:
            self._digests[each.name] = each.writes, each.wanted
            if self._is_suspect(each):
                found += self._compare(each.name)
        for name, parts in reading.parts.items():
            array = self._maps.shared(name)
            for part in parts:
                found += _compare_part(array, part)
        return found

    def _is_suspect(self, each: TableReading) -> bool:
        if each.found == each.wanted:
            self._unsettled.pop(each.name, None)
            return False
        if each.writes != self._maps[each.name].writes:
            self._unsettled[each.name] = self._unsettled.get(each.name, 0) + 1
            return self._unsettled[each.name] >= _READINGS
        return True

    @property
    def is_unsettled(self) -> bool:
        """True if a table differed that the agent itself was writing: it should be read again soon."""
        return bool(self._unsettled)

    def _compare(self, name: str) -> Iterator[Difference]:
        self._unsettled.pop(name, None)
        # Whatever the digest was made of: it is made anew.
        self._digests.pop(name, None)
        table, entries = self._tables[name]
        yield from differences(name, dict(entries()), table.items())


def _compare_part(array: SharedArray, part: slice) -> Iterator[Difference]:
    wanted, found = bytes(array.keep()[part]), array.owned(part)
    return differing_elements(array.spec.name, part.start, array.kept_size, wanted, found)
