"""What programs have counted for service ports, by id.

A Service may be used by every CPU at once. One counter for all would be a cache line that wanders between
them; one for each CPU would take memory by capacity and CPUs, however few ids are in use. So there are
``CHOICE_ROWS`` counters for an id, each of some neighbouring CPUs, in rows of an array. What is refused or
dropped is rare, and has one counter. A backend's counts are in its record (``abi.arrays.Loads``): its open
connections are known to all CPUs in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ebpfproxy.datapath.abi.layout import CHOICE_ROWS, REJECTIONS, U32, U64
from ebpfproxy.datapath.kernel.bpf_map import WindowedArray
from ebpfproxy.datapath.kernel.maps import MapSet


class ServiceCounts:
    """Any thread may read; one clears."""

    def __init__(self, maps: MapSet) -> None:
        choices = maps["service_choices"]
        assert isinstance(choices, WindowedArray)
        self._choices = choices
        self._rejections = maps.shared("service_rejections")
        self._services = self._rejections.spec.max_entries

    def clear(self, number: int) -> None:
        """For an id that no program uses: it has a new owner."""
        for row in range(CHOICE_ROWS):
            self._choices.update(U32.pack(row * self._services + number), U64.pack(0))
        REJECTIONS.pack_into(self._rejections.bytes, number * REJECTIONS.size, 0, 0)
        self._rejections.writes += 1

    def read(self, numbers: Iterable[int]) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Chosen, refused and dropped of those of these ids for which something was counted, in order."""
        wanted = sorted(numbers)
        if not wanted:
            return
        end = wanted[-1] + 1
        chosen = self._chosen(end)
        for number in wanted:
            refused, dropped = REJECTIONS.unpack_from(self._rejections.bytes, number * REJECTIONS.size)
            if chosen[number] or refused or dropped:
                yield number, (chosen[number], refused, dropped)

    def _chosen(self, end: int) -> list[int]:
        """The sums of all ids below ``end``. Memory is read so far, and summed up where it is in use."""
        nothing = bytes(U64.size * end)
        rows = (self._choices.read(row * self._services, end) for row in range(CHOICE_ROWS))
        used = [memoryview(row).cast("Q") for row in rows if row != nothing]
        return [sum(counts) for counts in zip(*used, strict=True)] or [0] * end
