"""Backends in their map: ids that stay, records, and the state that follows from all who use them.

A backend is held by the service ports that refer to it. When nobody does, it is retired; after a grace period
it is *gone*, and its id rests until nothing is open to it any more, so that what is counted for an id is
always of one backend.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Set
from typing import NamedTuple

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.ids import Ids
from ebpfproxy.services.model import Backend, BackendState

#: Every other empty frozenset would be an object of 216 bytes, and nearly all of these are empty.
NO_IDS: frozenset[int] = frozenset()


class InactiveBackends(NamedTuple):
    """Which of a service port's backends are not simply active, by what they are instead."""

    leaving: frozenset[int] = NO_IDS
    idle: frozenset[int] = NO_IDS
    drained: frozenset[int] = NO_IDS
    #: Their endpoint was removed, and may come back.
    absent: frozenset[int] = NO_IDS


ALL_ACTIVE = InactiveBackends()


class Backends:
    """The only writer of the ``backends`` map.

    Raises IdsExhaustedError where an id is needed and none is left.
    """

    def __init__(self, maps: MapSet, selected: Set[int] = NO_IDS) -> None:
        """``selected``: who is in a selection of those that were there before."""
        self._map = maps.shared("backends")
        self._stats = maps["backend_stats"]
        self._loads = maps.shared("loads").bytes.cast("I")
        self._no_load = memoryview(bytes(layout.LOAD_SIZE)).cast("I")
        self._adopted = maps.adopted
        self._refs = array("I", bytes(4 * self._map.spec.max_entries))
        self._counts: tuple[Counter[int], ...] = tuple(Counter() for _ in InactiveBackends._fields)
        self._fresh: list[Backend] = []
        self._retired: list[int] = []
        self._turned: set[int] = set()
        self._resting: set[int] = set()
        self._selected = selected
        known = self._read() if maps.adopted else {}
        self._ids: Ids[Backend] = Ids(self._map.spec.max_entries, known, self._retired)

    def __len__(self) -> int:
        return len(self._ids)

    def _read(self) -> dict[Backend, int]:
        """Ids of those that are there. The others are gone, or an agent was killed before it said so."""
        memory, stride = self._map.bytes, self._map.stride
        found: dict[Backend, int] = {}
        for number in range(self._map.spec.max_entries):
            # The protocol's byte tells a taken place from a free one without unpacking it.
            if not memory[number * stride + layout.BACKEND_PROTOCOL_OFFSET]:
                continue
            known = layout.unpack_backend(bytes(memory[number * stride : (number + 1) * stride]))
            if known is None:
                continue
            backend, state = known
            if state is BackendState.GONE and number not in self._selected:
                self._retired.append(number)
                continue
            other = found.setdefault(backend, number)
            if other != number:
                found[backend], left = (number, other) if number in self._selected else (other, number)
                self._retired.append(left)
        return found

    def known(self, numbers: Set[int]) -> set[int]:
        """Those of these ids that were there before, and are not gone."""
        return {n for _, n in self._ids.items() if n in numbers}

    def busy(self) -> set[int]:
        """Of those that were there before, in no selection: who has something open."""
        return {n for _, n in self._ids.items() if n not in self._selected and self._load(n).open_now}

    def _load(self, number: int) -> layout.Load:
        size = layout.LOAD_WORDS
        return layout.load_of(self._loads[number * size : (number + 1) * size])

    # -- ids

    def id_of(self, backend: Backend) -> int:
        """Its id; a new one where it has none."""
        number = self._ids.get(backend)
        if number is None:
            number = self._ids.add(backend)
            self._fresh.append(backend)
            self._store(number, layout.pack_backend(backend, BackendState.ACTIVE))
            if self._adopted or self._ids.recycles:
                self._stats.update(U32.pack(number), self._stats.zero)
        return number

    def ids_of(self, backends: Collection[Backend]) -> frozenset[int]:
        return frozenset(map(self.id_of, backends)) if backends else NO_IDS

    def keep_fresh(self) -> None:
        """Those with new ids are wanted."""
        self._fresh = []

    def drop_fresh(self) -> None:
        """They are not: what asked for them did not fit. Their ids are free: no program has seen them."""
        for backend in self._fresh:
            number = self._ids.forget(backend)
            self._store(number, bytes(layout.BACKEND_SIZE))
            self._ids.give_back(number)
        self._fresh = []

    def drop_leftovers(self) -> None:
        """Of those that were adopted, whom nobody holds."""
        self._drop_unheld([backend for backend, _ in self._ids.items()])

    def _drop_unheld(self, backends: Iterable[Backend]) -> None:
        for backend in backends:
            number = self._ids.get(backend)
            if number is not None and not self._refs[number]:
                self._retire(number)

    def _store(self, number: int, packed: bytes) -> None:
        start = number * self._map.stride
        self._map.bytes[start : start + len(packed)] = packed
        self._map.writes += 1

    @property
    def end(self) -> int:
        """One more than the highest id in use."""
        return self._ids.end

    # -- who holds them

    def adopt(self, held: Set[int]) -> InactiveBackends:
        """A service port that was there before holds these; returns how they stand."""
        for number in held:
            self._refs[number] += 1
            if self._state(number) == BackendState.GONE:
                # An agent was killed before its change came to pass.
                self._turned.add(number)
        inactive = InactiveBackends(
            *(
                frozenset(n for n in held if self._state(n) == state) or NO_IDS
                for state in (BackendState.TERMINATING, BackendState.QUARANTINED, BackendState.DRAINED)
            )
        )
        self._recount(ALL_ACTIVE, inactive)
        return inactive

    def hold(self, came: Set[int], went: Set[int], before: InactiveBackends, after: InactiveBackends) -> None:
        """A service port takes some and lets others go."""
        turned = {n for old, new in zip(before, after, strict=True) for n in old ^ new}
        for number in came:
            self._refs[number] += 1
        for number in went:
            self._refs[number] -= 1
        self._recount(before, after)
        # Who is new is active; a hundred thousand of them need not be looked at again.
        known = (n for n in came if self._state(n) != BackendState.ACTIVE)
        self._turned.update(turned, known, went)

    def settle(self) -> None:
        """Of all that were taken and let go: says how they stand now, and retires whom nobody holds."""
        turned, self._turned = self._turned, set()
        for number in turned:
            if not self._refs[number]:
                self._retire(number)
            else:
                self._set_state(number, self._state_by_users(number))

    def _recount(self, before: InactiveBackends, after: InactiveBackends) -> None:
        for counts, old, new in zip(self._counts, before, after, strict=True):
            counts.update(new - old)
            for number in old - new:
                counts[number] -= 1
                if not counts[number]:
                    del counts[number]

    def _state_by_users(self, number: int) -> BackendState:
        """Active while any user has it so; quarantined once it is idle for all."""
        leaving, idle, drained, absent = (counts[number] for counts in self._counts)
        if leaving + idle + drained + absent < self._refs[number]:
            return BackendState.ACTIVE
        if drained:
            return BackendState.DRAINED
        return BackendState.TERMINATING if leaving else BackendState.QUARANTINED

    def _state(self, number: int) -> int:
        return self._map.bytes[number * self._map.stride + layout.BACKEND_STATE_OFFSET]

    def _set_state(self, number: int, state: BackendState) -> None:
        at = number * self._map.stride + layout.BACKEND_STATE_OFFSET
        if self._map.bytes[at] != state:
            self._map.bytes[at] = state
            self._map.writes += 1

    # -- their end

    def _retire(self, number: int) -> None:
        start = number * self._map.stride
        known = layout.unpack_backend(bytes(self._map.bytes[start : start + layout.BACKEND_SIZE]))
        assert known is not None, f"backend {number} is held but not written"
        if self._ids.get(known[0]) == number:
            self._ids.forget(known[0])
        # At once: its endpoint may come back, and be another record, before a killed agent starts again.
        self._set_state(number, BackendState.GONE)
        self._retired.append(number)

    def take_retired(self) -> list[int]:
        """For :meth:`reclaim` after a grace period."""
        taken, self._retired = self._retired, []
        return taken

    def reclaim(self, retired: Iterable[int]) -> None:
        self._resting.update(retired)
        self._free(retired)

    def free_unused(self) -> None:
        """Ids of backends that are gone come back into use, where nothing is open to them any more."""
        self._free(list(self._resting))

    def _free(self, numbers: Iterable[int]) -> None:
        size = layout.LOAD_WORDS
        for number in numbers:
            if self._load(number).open_now or self._refs[number]:
                continue
            self._resting.remove(number)
            self._store(number, bytes(layout.BACKEND_SIZE))
            self._loads[number * size : (number + 1) * size] = self._no_load
            self._ids.give_back(number)
