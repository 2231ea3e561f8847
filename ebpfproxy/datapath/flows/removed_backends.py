"""Backends that were removed from a service a moment ago, as their flows and sockets have to learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import count
from typing import NamedTuple

from ebpfproxy.datapath.abi.flow_layout import BackendUse, Departure, pack_departure, unpack_departure
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet


class Departed(NamedTuple):
    """``serial`` tells a departure from another of the same backend, for the same reason, after a return."""

    why: Departure
    serial: int


class Departures:
    """The ``departures`` map, and the epochs by which flows notice that there is something in it."""

    def __init__(self, maps: MapSet) -> None:
        self._map = maps["departures"]
        self._epochs = maps.shared("epochs").words()
        self._serials: Iterator[int] = count()
        self._known: dict[BackendUse, Departed] = {
            unpack_departure(key): Departed(Departure(U32.unpack(value)[0]), next(self._serials))
            for key, value in self._map.items()
        }
        self._fresh = dict(self._known)

    def __bool__(self) -> bool:
        return bool(self._known)

    def note(self, service_id: int, back: Set[int], departed: Mapping[int, Departure]) -> None:
        """Tells flows of a service which of its backends they must leave, and which have come back."""
        for number in back if self._known else ():
            use = BackendUse(service_id, number)
            if self._known.pop(use, None) is not None:
                self._fresh.pop(use, None)
                self._map.delete(pack_departure(use))
        if not departed:
            return
        departures = {
            BackendUse(service_id, number): Departed(why, next(self._serials))
            for number, why in departed.items()
        }
        self._known.update(departures)
        self._fresh.update(departures)
        self._map.update_many({pack_departure(use): U32.pack(each.why) for use, each in departures.items()})
        # Only after this do flows look there.
        self.look_again(service_id)

    def look_again(self, service_id: int) -> None:
        """Makes flows of a service ask whether their backend, and their frontend, are still its own."""
        self._epochs[service_id] += 1

    def take_fresh(self) -> dict[BackendUse, Departed]:
        """Those that have been noted since the last time, or were there at the start."""
        taken, self._fresh = self._fresh, {}
        return taken

    @property
    def current(self) -> dict[BackendUse, Departed]:
        """All that flows and sockets may still have to learn of."""
        return dict(self._known)

    @property
    def absent(self) -> dict[int, set[int]]:
        """Backends that may come back, by service id: another agent is to wait for them, too."""
        found: dict[int, set[int]] = {}
        for use, departed in self._known.items():
            if departed.why is Departure.ABSENT:
                found.setdefault(use.service_id, set()).add(use.backend_id)
        return found

    def forget(self, ended: Mapping[BackendUse, Departed]) -> None:
        """Nothing knows of what these were about any more, but connections that still wait."""
        over = [
            use
            for use, departed in ended.items()
            if self._known.get(use) == departed and departed.why is not Departure.ABSENT
        ]
        for use in over:
            del self._known[use]
        self._map.delete_many([pack_departure(use) for use in over])
