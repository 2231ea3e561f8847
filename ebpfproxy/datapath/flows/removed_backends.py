"""Backends that were removed from a service a moment ago, as their flows and sockets have to learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import count
from typing import NamedTuple

from ebpfproxy.datapath.abi.flow_layout import BackendUse, RemovalReason, pack_departure, unpack_departure
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned


class Removal(NamedTuple):
    """``serial`` tells two removals of one backend apart that have the same reason."""

    why: RemovalReason
    serial: int


#: Somebody else may have written others.
_REASONS = frozenset(RemovalReason)


class RemovedBackends:
    """The ``departures`` map, and the epochs by which flows notice that there is something in it."""

    def __init__(self, maps: MapSet) -> None:
        self._map = maps["departures"]
        self._epochs = maps.shared("epochs")
        self._kept_epochs, self._shown_epochs = self._epochs.kept_words(), self._epochs.words()
        self._serials: Iterator[int] = count()
        self._known: dict[BackendUse, Removal] = {
            unpack_departure(key): Removal(RemovalReason(why), next(self._serials))
            for key, value in self._map.items()
            if (why := U32.unpack(value)[0]) in _REASONS
            and unpack_departure(key).service_id < self._epochs.spec.max_entries
        }
        self._fresh = dict(self._known)
        #: Removals that the map has no room for; flows learn of them once others are forgotten.
        self._unwritten: set[BackendUse] = set()
        # An agent that was killed may have written removals, and not told flows to look there.
        for service_id in {use.service_id for use in self._known}:
            self.look_again(service_id)

    def __bool__(self) -> bool:
        return bool(self._known)

    def __contains__(self, use: BackendUse) -> bool:
        return use in self._known

    def withdraw(self, service_id: int, back: Set[int]) -> None:
        """Tells flows of a service which of its backends have come back.

        This comes before any program can choose them: the sweep and the search for stale sockets end what
        uses a removed backend, also what has just begun.
        """
        for number in back if self._known else ():
            use = BackendUse(service_id, number)
            if self._known.pop(use, None) is not None:
                self._fresh.pop(use, None)
                self._unwritten.discard(use)
                self._map.delete(pack_departure(use))

    def note(self, service_id: int, gone: Mapping[int, RemovalReason]) -> None:
        """Tells flows of a service which of its backends they must leave."""
        if not gone:
            return
        removals = {
            BackendUse(service_id, number): Removal(why, next(self._serials)) for number, why in gone.items()
        }
        self._known.update(removals)
        self._fresh.update(removals)
        self._write(removals)
        # Only after this do flows look there.
        self.look_again(service_id)

    def _write(self, removals: Mapping[BackendUse, Removal]) -> None:
        refused = self._map.update_many(dict(_packed(removals)))
        self._unwritten.difference_update(removals)
        self._unwritten.update(map(unpack_departure, refused))

    def look_again(self, service_id: int) -> None:
        """Makes flows of a service ask whether their backend, and their frontend, are still its own."""
        self._kept_epochs[service_id] += 1
        self._shown_epochs[service_id] = self._kept_epochs[service_id]

    def owned(self) -> Owned:
        """The map, with what it should hold."""
        return Owned(self._map, lambda: _packed(self._written()))

    def _written(self) -> dict[BackendUse, Removal]:
        return {use: each for use, each in self._known.items() if use not in self._unwritten}

    def take_fresh(self) -> dict[BackendUse, Removal]:
        """Returns the removals since the last call; the first call also returns those of an earlier agent."""
        taken, self._fresh = self._fresh, {}
        return taken

    def is_current(self, use: BackendUse, removal: Removal) -> bool:
        """Says if this is the last that is known of the backend. Any thread may ask."""
        return self._known.get(use) == removal

    @property
    def current(self) -> dict[BackendUse, Removal]:
        """All removals that flows and sockets may still have to learn of."""
        return dict(self._known)

    def by_service(self, why: RemovalReason) -> dict[int, set[int]]:
        """Ids of backends that were removed for this reason, by service id."""
        found: dict[int, set[int]] = {}
        for use, removal in self._known.items():
            if removal.why is why:
                found.setdefault(use.service_id, set()).add(use.backend_id)
        return found

    def forget(self, ended: Mapping[BackendUse, Removal]) -> None:
        """Forgets removals of backends that no flow and no socket has any more, unless one may come back."""
        over = [
            use
            for use, removal in ended.items()
            if self._known.get(use) == removal and removal.why is not RemovalReason.ABSENT
        ]
        for use in over:
            del self._known[use]
        self._unwritten.difference_update(over)
        self._map.delete_many([pack_departure(use) for use in over])
        if over and self._unwritten:
            late = {use: self._known[use] for use in self._unwritten}
            self._write(late)
            for service_id in {use.service_id for use in late if use not in self._unwritten}:
                self.look_again(service_id)


def _packed(removals: Mapping[BackendUse, Removal]) -> Iterator[tuple[bytes, bytes]]:
    return ((pack_departure(use), U32.pack(each.why)) for use, each in removals.items())
