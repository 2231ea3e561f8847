"""The ranges of slots that service ports choose their backends from, by policy."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import Range, Selections, backend_ids
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.frontend_cache import changing_ranges, renew_ranges
from ebpfproxy.datapath.services.ranges import Ranges, RangesExhaustedError
from ebpfproxy.datapath.services.slots import Source

NO_SLOTS: Range = 0, 0


class SelectionTable:
    """The only writer of ``selections`` and ``slots``. A range is base and count, (0, 0) if empty."""

    def __init__(self, maps: MapSet, service_ids: Collection[int]) -> None:
        """``service_ids``: those whose ranges are in use."""
        self._maps = maps
        self._selections, self._slots = maps.shared("selections"), maps.shared("slots")
        self._kept = Selections(self._selections.kept_words(), self._slots.keep())
        used = [chosen for number in service_ids for chosen in self.ranges(number) if chosen[1]]
        self._ranges = Ranges(self._slots.spec.max_entries, used)
        self._slots.reach(max((base + count for base, count in used), default=0))
        self._selections.reach((max(service_ids, default=-1) + 1) * layout.POLICIES)
        self._view = maps.selections()
        # An agent that was killed may have changed a range without saying so.
        renew_ranges(maps)

    @property
    def free_slots(self) -> int:
        return self._ranges.free

    # -- what is there

    def ranges(self, service_id: int) -> tuple[Range, Range]:
        """The ranges of a service by policy."""
        return self._kept.ranges(service_id)

    def slots(self, used: Range) -> array[int]:
        return self._kept.slots(used) if used[1] else array("Q")

    def backends(self, service_id: int) -> set[int]:
        """The backends that a service chooses from, under either policy."""
        cluster, local = map(self.slots, self.ranges(service_id))
        return {*backend_ids(cluster), *backend_ids(local)}

    # -- slots that no program sees yet

    def fits(self, count: int) -> bool:
        return self._ranges.fits(count)

    def make(self, source: Source) -> array[int]:
        """The slots' words. Raises RangesExhaustedError before a table is made that has no room."""
        size = source.size
        if size and not self._ranges.fits(size):
            raise RangesExhaustedError(f"no {size} places in a row")
        return source.slots()

    def place(self, words: array[int]) -> Range:
        """Writes slots to a free range. Raises RangesExhaustedError."""
        if not words:
            return NO_SLOTS
        base = self._ranges.allocate(len(words))
        if self._slots.reach(base + len(words)):
            self._view = self._maps.selections()
        for view in (self._kept, self._view):
            view.write_slots(base, words)
        self._slots.writes += len(words)
        return base, len(words)

    def release(self, used: Range) -> None:
        """Frees a range that no program can be reading."""
        if used[1]:
            self._ranges.release(*used)

    # -- words that programs see at once

    def select(self, chosen: Mapping[tuple[int, int], Range]) -> None:
        """Stores ranges by service id and policy. Readers see the old one or this one, and the slots of it.

        That holds for those that have cached it, too.
        """
        if not chosen:
            return
        service_ids = {number for number, _ in chosen}
        if self._selections.reach((max(service_ids) + 1) * layout.POLICIES):
            self._view = self._maps.selections()
        with changing_ranges(self._maps, service_ids):
            for (service_id, policy), used in chosen.items():
                for view in (self._kept, self._view):
                    view.set_range(service_id, policy, used)
        self._selections.writes += len(chosen)

    def renew(self, service_ids: Collection[int]) -> None:
        """Ends the validity of what programs have cached of ranges of these ids."""
        if service_ids:
            renew_ranges(self._maps, service_ids)

    def clear(self, service_id: int) -> None:
        """Removes the ranges of an id that no program can be using."""
        used = enumerate(self.ranges(service_id))
        self.select({(service_id, policy): NO_SLOTS for policy, each in used if each != NO_SLOTS})
