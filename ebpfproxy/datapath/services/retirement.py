"""What a change has replaced: out of use, but perhaps not yet out of every program's sight.

Ids and ranges of slots are used again after a grace period (``datapath.kernel.grace``).
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from ebpfproxy.datapath.abi.arrays import Range
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.held_ids import HeldIds
from ebpfproxy.datapath.services.ids import Ids
from ebpfproxy.datapath.services.measures import Measures
from ebpfproxy.datapath.services.selection_table import SelectionTable
from ebpfproxy.services.model import ServicePortKey


class Retired(msgspec.Struct, frozen=True):
    """Ids and ranges that one grace period is for."""

    services: list[int]
    backends: list[int]
    ranges: list[Range]
    #: The services that chose from these ranges.
    selected: set[int]

    def __bool__(self) -> bool:
        return bool(self.services or self.backends or self.ranges)


def _nothing() -> Retired:
    return Retired([], [], [], set())


class Retirement:
    """Collects what is replaced until a grace period begins, and frees it when that is over."""

    def __init__(
        self,
        selections: SelectionTable,
        backends: Backends,
        service_ids: Ids[ServicePortKey],
        measures: Measures,
        held: HeldIds,
    ) -> None:
        """``held`` is told of ids that are retired."""
        self._selections = selections
        self._backends = backends
        self._service_ids = service_ids
        self._measures = measures
        self._held = held
        self._retired = _nothing()

    def add_ranges(self, service_id: int, ranges: Iterable[Range]) -> None:
        """Retires ranges that a service chose from."""
        before = len(self._retired.ranges)
        self._retired.ranges.extend(ranges)
        if len(self._retired.ranges) > before:
            self._retired.selected.add(service_id)

    def add_service(self, key: ServicePortKey) -> None:
        """Retires the id of a service port."""
        number = self._service_ids.forget(key)
        self._retired.services.append(number)
        self._held.retire(number)

    def add_nameless(self, service_ids: Iterable[int]) -> None:
        """Retires ids that no service port has."""
        self._retired.services.extend(service_ids)

    def take(self) -> Retired:
        """Everything that is retired so far, backends included."""
        taken, self._retired = self._retired, _nothing()
        taken.backends.extend(self._backends.take_retired())
        return taken

    def free(self, retired: Retired) -> None:
        # A program that read a range just before it was replaced may have cached it just after.
        self._selections.renew(retired.selected)
        for used in retired.ranges:
            self._selections.release(used)
        self._measures.forget(retired.services, self._backends.reclaim(retired.backends))
        for number in retired.services:
            self._selections.clear(number)
            self._service_ids.give_back(number)

    def free_unused(self) -> bool:
        """Frees ids of backends that are gone, once nothing is open to them. Returns False without any."""
        freed = self._backends.free_unused()
        self._measures.forget((), freed)
        return bool(freed)
