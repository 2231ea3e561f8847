"""Backends in their map: ids that stay, records, and the state that follows from all service ports.

A backend is held by the service ports that refer to it. When none does, it is retired; after a grace period
it is *gone*, and its id is not used again while anything is open to it, so that what is counted for an id
belongs to one backend.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence, Set
from itertools import chain, islice

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import BackendRecords
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.filter import Bits, backend_hashes
from ebpfproxy.datapath.services.ids import Ids
from ebpfproxy.datapath.services.plan import ALL_ACTIVE, NO_IDS, InactiveBackends, backends_of
from ebpfproxy.services.model import Backend, BackendState, ServicePort

#: How many service ports get ids for their backends together: records of a whole first list take megabytes.
_AT_ONCE = 2048


class Backends:
    """The only writer of the ``backends`` map.

    Raises IdsExhaustedError where an id is needed and none is left.
    """

    def __init__(self, maps: MapSet, selected: frozenset[int] = NO_IDS) -> None:
        """``selected``: the ids in selections that were there before."""
        self._maps, self._map = maps, maps.shared("backends")
        #: The record of a backend, without what programs count.
        size = layout.BACKEND.size
        self._kept = BackendRecords(self._map.keep(size), self._map.spec.max_entries, size)
        #: Programs take a socket with another peer for one that has no record: bits stay.
        self._filter, self._ports = Bits(maps.shared("backend_filter")), Bits(maps.shared("backend_ports"))
        self._counts: tuple[Counter[int], ...] = tuple(Counter() for _ in InactiveBackends._fields)
        self._fresh: list[Backend] = []
        self._retired: list[int] = []
        self._turned: set[int] = set()
        self._resting: set[int] = set()
        #: Those whose record has another state than ACTIVE.
        self._inactive: set[int] = set()
        self._selected = selected
        known = self._read() if maps.adopted else {}
        #: In selections, but without a record, since somebody has overwritten or unpinned one of the maps.
        #: They belong to no backend, and are retired once no service port selects them any more.
        self._unrecorded = selected.difference(known.values())
        resting = chain(self._retired, self._unrecorded)
        self._ids: Ids[Backend] = Ids(self._map.spec.max_entries, known, resting)
        #: How many service ports hold each of the ids that were ever given out.
        self._refs = array("I", bytes(4 * self._ids.end))
        self._map.reach(self._ids.end)
        self._records, self._loads = maps.backends(), maps.loads()

    def __len__(self) -> int:
        return len(self._ids)

    def _read(self) -> dict[Backend, int]:
        """Ids of those that are there. The others are gone, or an agent was killed before it said so."""
        found: dict[Backend, int] = {}
        for number in self._kept.ids():
            known = self._kept.read(number)
            if known is None:  # somebody else has written there
                if number not in self._selected:
                    self._retired.append(number)
                continue
            backend, state = known
            if state is not BackendState.ACTIVE:
                self._inactive.add(number)
            if state is BackendState.GONE and number not in self._selected:
                self._retired.append(number)
                continue
            other = found.setdefault(backend, number)
            if other != number:
                found[backend], left = (number, other) if number in self._selected else (other, number)
                if left not in self._selected:
                    self._retired.append(left)
        return found

    def known(self, numbers: Set[int]) -> set[int]:
        """Those of these ids that were there before, and are not gone."""
        return set(self.numbers()).intersection(numbers)

    def numbers(self) -> list[int]:
        """All ids in use."""
        return self._ids.numbers()

    def unsettled(self) -> frozenset[int]:
        """Those that were there before, in no selection, but active: no agent has said what they are."""
        return frozenset(self.numbers()).difference(self._selected, self._inactive)

    # -- ids

    def ids_of(self, backends: Sequence[Backend]) -> array[int]:
        """The ids of backends, no two of which are the same, in their order; new ones where there is none."""
        try:
            return array("Q", map(self._ids.of, backends))
        except KeyError:
            self._add([each for each in backends if self._ids.get(each) is None])
            return array("Q", map(self._ids.of, backends))

    def set_of(self, backends: Collection[Backend]) -> frozenset[int]:
        """The same without an order."""
        return frozenset(self.ids_of(tuple(backends))) if backends else NO_IDS

    def add_ahead(self, ports: Iterable[ServicePort]) -> None:
        """Gives ids to the backends of a first list that have none, many at once, which takes a third of the
        time; to none of the service ports from where there may be no room on.

        Ids of those that then do not fit for another reason are among the leftovers.
        """
        rest = iter(ports)
        while some := list(islice(rest, _AT_ONCE)):
            wanted = list(chain.from_iterable(map(backends_of, some)))
            if not self._ids.has_fresh(len(wanted)):
                return
            first, new = self._ids.add_missing(wanted)
            self._write_new(range(first, first + len(new)), new)

    def _add(self, backends: Sequence[Backend]) -> None:
        """Gives ids to backends that have none. They are fresh until it is known that all of it fits."""
        numbers = self._ids.add_all(backends)
        self._fresh += backends
        self._write_new(numbers, backends)

    def _write_new(self, numbers: Sequence[int], backends: Sequence[Backend]) -> None:
        """Writes records, which nothing refers to yet."""
        self._refs.frombytes(bytes((self._ids.end - len(self._refs)) * self._refs.itemsize))
        if self._map.reach(self._ids.end):
            self._records, self._loads = self._maps.backends(), self._maps.loads()
        packed = layout.pack_backends(backends, BackendState.ACTIVE)
        for records in (self._kept, self._records):
            records.write_new(numbers, packed)
        self._inactive.difference_update(numbers if self._inactive else ())
        self._filter.set_all(backend_hashes(packed))
        self._ports.set({each.port for each in backends})
        self._map.writes += len(backends)

    def known_ids(self, backends: Iterable[Backend]) -> dict[Backend, int]:
        """The ids of those that have one."""
        return {each: number for each in backends if (number := self._ids.get(each)) is not None}

    def is_open(self, number: int) -> bool:
        """Says if connections or flows are open to a backend."""
        return self._loads[number].open_now > 0

    def keep_fresh(self) -> None:
        """Keeps the new ids: the service port that needs them fits."""
        self._fresh = []

    def drop_fresh(self) -> None:
        """Frees the new ids at once: the service port did not fit, and no program has seen them."""
        for backend in self._fresh:
            number = self._ids.forget(backend)
            self._clear(number)
            self._ids.give_back(number)
        self._fresh = []

    def drop_leftovers(self) -> None:
        """Retires those that were adopted and that no service port holds."""
        self._selected = NO_IDS
        if 0 not in self._refs:
            return
        for number in self.numbers():
            if not self._refs[number]:
                self._retire(number)

    def _clear(self, number: int) -> None:
        for records in (self._kept, self._records):
            records.clear(number)
        self._inactive.discard(number)
        self._map.writes += 1

    @property
    def end(self) -> int:
        """One more than the highest id in use."""
        return self._ids.end

    # -- held by service ports

    def adopt(self, held: Set[int], *, absent: frozenset[int], idle: frozenset[int]) -> InactiveBackends:
        """Notes that an adopted service port holds these; returns those that are not active.

        ``absent``: those of them whose endpoint may come back, which no state says. ``idle``: those that are
        known to be so, though they may have another state because of another service port.
        """
        for number in held:
            self._refs[number] += 1
        by_state: dict[int, set[int]] = {}
        for number in (self._inactive & held) - absent - idle:
            by_state.setdefault(self._kept.state(number), set()).add(number)
        if not (by_state or absent or idle):
            return ALL_ACTIVE
        # An agent was killed before its change came to pass.
        self._turned |= absent | idle | by_state.get(BackendState.GONE, set())
        leaving, quarantined, drained = (
            frozenset(by_state.get(state, NO_IDS))
            for state in (BackendState.TERMINATING, BackendState.QUARANTINED, BackendState.DRAINED)
        )
        inactive = InactiveBackends(leaving, idle | quarantined, drained, absent)
        self._recount(ALL_ACTIVE, inactive)
        return inactive

    def hold(self, came: Set[int], went: Set[int], before: InactiveBackends, after: InactiveBackends) -> None:
        """A service port takes some and lets others go."""
        refs = self._refs
        for number in came:
            refs[number] += 1
        for number in went:
            refs[number] -= 1
        if before != after:
            self._turned.update(n for old, new in zip(before, after, strict=True) for n in old ^ new)
            self._recount(before, after)
        # A new one is active: a hundred thousand of them need not be settled.
        self._turned.update(self._inactive & came if self._inactive else (), went)

    def settle(self) -> None:
        """Stores the state of all that were taken or let go, and retires those that no service port holds."""
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
        """The state by all service ports: active while it is for any, quarantined once it is idle for all."""
        leaving, idle, drained, absent = (counts[number] for counts in self._counts)
        if leaving + idle + drained + absent < self._refs[number]:
            return BackendState.ACTIVE
        if drained:
            return BackendState.DRAINED
        return BackendState.TERMINATING if leaving else BackendState.QUARANTINED

    def _set_state(self, number: int, state: BackendState) -> None:
        if self._kept.state(number) != state:
            for records in (self._kept, self._records):
                records.set_state(number, state)
            self._map.writes += 1
            if state is BackendState.ACTIVE:
                self._inactive.discard(number)
            else:
                self._inactive.add(number)

    # -- their end

    def _retire(self, number: int) -> None:
        known = self._kept.read(number)
        assert known is not None or number in self._unrecorded, f"backend {number} is held but not written"
        if known is not None and self._ids.get(known[0]) == number:
            self._ids.forget(known[0])
        # Stored at once: its endpoint may come back, as another record, before a killed agent starts again.
        self._set_state(number, BackendState.GONE)
        self._retired.append(number)

    def take_retired(self) -> list[int]:
        """Those retired so far, which :meth:`reclaim` needs after a grace period."""
        taken, self._retired = self._retired, []
        return taken

    def reclaim(self, retired: Iterable[int]) -> list[int]:
        """Returns the ids that are free now."""
        self._resting.update(retired)
        return self._free(retired)

    def free_unused(self) -> list[int]:
        """Frees ids of backends that are gone, if nothing is open to them any more; returns them."""
        return self._free(list(self._resting))

    def _free(self, numbers: Iterable[int]) -> list[int]:
        freed = []
        for number in numbers:
            if self.is_open(number) or self._refs[number]:
                continue
            self._resting.remove(number)
            self._clear(number)
            self._loads.clear(number)
            self._ids.give_back(number)
            freed.append(number)
        return freed
