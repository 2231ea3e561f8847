"""Brings the maps to the wanted state, in an order in which no reader sees a mixture.

For every change: new backends and their slots are written where nobody looks yet; then the selection word
that names the range is stored, one word for all frontends of a service port; then frontends appear and
disappear. What was replaced is *retired*: ids and ranges return to use only after a grace period
(``datapath.grace``), when no program can still hold them.

On start the maps are adopted as they are: ids, ranges and entries keep their places, and only differences
are written. Leftovers go with the first complete state, not before. One thread uses a Writer.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from typing import NamedTuple

import msgspec

from ebpfproxy.config.datapath import MAGLEV_DEFAULT_SIZE, MAGLEV_SIZES
from ebpfproxy.datapath.abi import flow_layout, layout
from ebpfproxy.datapath.abi.flow_layout import Departure
from ebpfproxy.datapath.abi.layout import U32, U64, ServiceFlags
from ebpfproxy.datapath.flows.origins import LostFrontend
from ebpfproxy.datapath.flows.removed_backends import Departed, Departures
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.backends import ALL_ACTIVE, NO_IDS, Backends, InactiveBackends
from ebpfproxy.datapath.services.frontend_table import Frontends
from ebpfproxy.datapath.services.ids import Ids, IdsExhaustedError
from ebpfproxy.datapath.services.ranges import Ranges, RangesExhaustedError
from ebpfproxy.datapath.services.redirects import Redirects
from ebpfproxy.datapath.services.slots import Source
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    Frontend,
    FrontendKind,
    Policy,
    Protocol,
    ServicePort,
    ServicePortKey,
)

_NO_SOURCES: frozenset[bytes] = frozenset()
_NO_MEMBERS = (NO_IDS, NO_IDS)
_NOTHING_MADE = (None, None)


class CapacityError(NamedTuple):
    """A service port that does not fit, or not as it should; as text it is one line."""

    key: ServicePortKey
    why: str

    def __str__(self) -> str:
        name = f":{self.key.port_name}" if self.key.port_name else ""
        return f"{self.key.namespace}/{self.key.name}{name} ({self.key.family}): {self.why}"


class _Programmed(msgspec.Struct):
    """What the maps hold for one service port, beyond what can be read from them."""

    id: int
    entries: tuple[bytes, ...] = ()
    sources: frozenset[bytes] = _NO_SOURCES
    #: Backends in no selection, which only serve old connections: draining or idle ones.
    unselected: frozenset[int] = NO_IDS
    inactive: InactiveBackends = ALL_ACTIVE
    #: By policy, where there is session affinity: who is in ``members``.
    members: tuple[frozenset[int], frozenset[int]] = _NO_MEMBERS
    #: By policy, what slots that take long were made from, as a hash: the same need not be made again.
    made_from: tuple[int | None, int | None] = _NOTHING_MADE


class Retired(msgspec.Struct, frozen=True):
    """Ids and ranges that are out of use, but perhaps not yet out of every program's sight."""

    services: list[int]
    backends: list[int]
    ranges: list[tuple[int, int]]

    def __bool__(self) -> bool:
        return bool(self.services or self.backends or self.ranges)


def _nothing_retired() -> Retired:
    return Retired([], [], [])


class _Plan(msgspec.Struct):
    """The part of a change that readers can see: it is carried out after everything else is in place."""

    sources: dict[bytes, bytes] = msgspec.field(default_factory=dict)
    names: dict[bytes, bytes] = msgspec.field(default_factory=dict)
    words: dict[int, int] = msgspec.field(default_factory=dict)
    entries: dict[bytes, bytes] = msgspec.field(default_factory=dict)
    members: dict[bytes, bytes] = msgspec.field(default_factory=dict)
    excluded: list[bytes] = msgspec.field(default_factory=list)
    #: Service id, the backends that are back, and those that have left.
    departures: list[tuple[int, Set[int], Mapping[int, Departure]]] = msgspec.field(default_factory=list)
    vanished: list[tuple[int, bytes]] = msgspec.field(default_factory=list)
    closed: list[bytes] = msgspec.field(default_factory=list)
    #: Those that get something new, by service id.
    placed: dict[int, tuple[ServicePort, _Programmed]] = msgspec.field(default_factory=dict)
    #: Service id, and what of it a map had no room for.
    refused: list[tuple[int, str]] = msgspec.field(default_factory=list)


class Writer:
    """The only writer of the services', selections', slots' and backends' maps, and of what goes with them.

    ``wait_for_readers`` runs a grace period at once; it is called only where ids or slots ran out.
    """

    def __init__(
        self,
        maps: MapSet,
        wait_for_readers: Callable[[], None],
        *,
        maglev_size: int = MAGLEV_DEFAULT_SIZE,
        absence: float = 0.0,
        source_towards: Callable[[bytes], bytes] = lambda _: b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``maglev_size``: places in a Maglev table, one of ``MAGLEV_SIZES``.

        ``absence``: for how many seconds of ``clock`` an endpoint that was removed may come back.
        ``source_towards``: the address by which this node asks at another, empty where it cannot.
        """
        self._maps = maps
        self._maglev_size = maglev_size
        self._absence = absence
        self._source_towards = source_towards
        self._primary: tuple[bytes, ...] = ()
        self._clock = clock
        #: Until when absent backends may come back: by service port, and which is next.
        self._absent: dict[ServicePortKey, dict[int, float]] = {}
        self._absences: deque[tuple[float, ServicePortKey]] = deque()
        self._wait_for_readers = wait_for_readers
        self._selections = maps.shared("selections")
        self._words = self._selections.words()
        self._slots = maps.shared("slots")
        self._backends = Backends(maps, self._selected())
        self._departures = Departures(maps)
        self._fence = threading.Lock()
        self._retired = _nothing_retired()
        #: Since the last try at what did not fit.
        self._has_freed = False
        self._unnamed: dict[int, bytes] = {}
        self._lost: set[LostFrontend] = set()
        self._frontends = Frontends(maps, self._note_lost)
        self._redirects = Redirects(maps, self._frontends)
        self._programmed: dict[ServicePortKey, _Programmed] = {}
        self._unplaced: dict[ServicePortKey, tuple[ServicePort, CapacityError]] = {}
        self._adopt()

    # -- what is there

    @property
    def service_ports(self) -> int:
        return len(self._programmed)

    @property
    def frontends(self) -> int:
        return len(self._frontends)

    @property
    def backends(self) -> int:
        return len(self._backends)

    @property
    def backends_end(self) -> int:
        """One more than the highest id of a backend."""
        return self._backends.end

    @property
    def free_slots(self) -> int:
        return self._ranges.free

    def _adopt(self) -> None:
        names = {
            U32.unpack(key)[0]: layout.unpack_name(value)
            for key, value in self._maps["service_names"].items()
        }
        entries_of: dict[int, list[bytes]] = {}
        for key, value in self._frontends.items():
            entries_of.setdefault(layout.unpack_service(value).id, []).append(key)
        sources_of: dict[int, set[bytes]] = {}
        for key, _ in self._maps["source_ranges"].items():
            sources_of.setdefault(layout.source_range_service(key), set()).add(key)
        members = self._adopted_members()
        unselected = self._adopted_unselected()
        for number, absent in self._adopted_absent(names.keys()).items():
            unselected[number] = unselected.get(number, NO_IDS) | absent
        used: list[tuple[int, int]] = []
        for number, name in names.items():
            known = _Programmed(
                number, tuple(entries_of.get(number, ())), frozenset(sources_of.get(number, _NO_SOURCES))
            )
            known.members = members.pop(number, _NO_MEMBERS)
            used += [chosen for policy in Policy if (chosen := self._range(number, policy))[1]]
            known.unselected = unselected.get(number, NO_IDS)
            known.inactive = self._backends.adopt(self._held(known))
            self._programmed[name] = known
        self._strangers = members
        self._ranges = Ranges(self._slots.spec.max_entries, used)
        self._service_ids: Ids[ServicePortKey] = Ids(
            self._maps["service_stats"].spec.max_entries, {name: number for number, name in names.items()}
        )

    def _range(self, service_id: int, policy: int) -> tuple[int, int]:
        """Base and count of the slots in use."""
        if service_id < 0:
            return 0, 0
        return layout.selection_range(self._words[service_id * layout.POLICIES + policy])

    def _selected(self) -> set[int]:
        """The backends in anybody's selection."""
        if not self._maps.adopted:
            return set()
        numbers = [U32.unpack(key)[0] for key, _ in self._maps["service_names"].items()]
        return {b for n in numbers for policy in Policy for b in self._slot_ids(*self._range(n, policy))}

    def _slot_words(self, base: int, count: int) -> array[int]:
        size = layout.SLOT_SIZE
        return array("Q", bytes(self._slots.bytes[base * size : (base + count) * size]))

    def _slot_ids(self, base: int, count: int) -> set[int]:
        """The backends in a range of slots: ``union slot`` begins with the id."""
        return set(array("I", self._slot_words(base, count).tobytes())[::2])

    def _adopted_members(self) -> dict[int, tuple[frozenset[int], frozenset[int]]]:
        """By service id and policy."""
        found: dict[int, tuple[set[int], set[int]]] = {}
        for key, _ in self._maps["members"].items():
            selection, backend_id = layout.unpack_member(key)
            number, policy = divmod(selection, layout.POLICIES)
            found.setdefault(number, (set(), set()))[policy].add(backend_id)
        return {number: (frozenset(a), frozenset(b)) for number, (a, b) in found.items()}

    def _adopted_unselected(self) -> dict[int, frozenset[int]]:
        """By service id: backends in no selection, but with something open, that is told of their end."""
        busy = self._backends.busy()
        found: dict[int, set[int]] = {}
        for name, ids_of in (("sock_origin", flow_layout.origin_ids), ("conntrack", flow_layout.nat_ids)):
            for _, value in self._maps[name].items() if busy else ():
                service, backend = ids_of(value)
                if backend in busy:
                    found.setdefault(service, set()).add(backend)
        return {service: frozenset(each) for service, each in found.items()}

    def _adopted_absent(self, services: Set[int]) -> dict[int, frozenset[int]]:
        """By service id: whom an agent before was waiting for. What cannot come back any more is gone."""
        found = self._departures.absent
        there = self._backends.known({n for absent in found.values() for n in absent}) if found else set()
        for number, absent in found.items():
            if lost := absent - there if number in services else absent:
                self._departures.note(number, NO_IDS, dict.fromkeys(lost, Departure.GONE))
        return {number: frozenset(absent & there) for number, absent in found.items() if number in services}

    def _held(self, known: _Programmed) -> set[int]:
        """The backends that a service port refers to, as the maps have it."""
        cluster, local = (self._slot_ids(*self._range(known.id, policy)) for policy in Policy)
        return cluster | local | known.unselected

    # -- changes

    def apply(
        self,
        changed: Iterable[ServicePort],
        removed: Iterable[ServicePortKey] = (),
        *,
        complete: bool = False,
    ) -> list[CapacityError]:
        """Programs a change. ``complete``: ``changed`` is all there is, everything else goes.

        Returns the service ports that did not fit; they keep what they had.
        """
        plan = _Plan()
        problems: list[CapacityError] = []
        wanted: set[ServicePortKey] = set()
        for port in changed:
            wanted.add(port.key)
            problems += self._place(port, plan)
        gone: Collection[ServicePortKey] = set(removed)
        if complete:
            gone = (self._programmed.keys() | self._unplaced.keys()) - wanted
        for key in gone:
            self._withdraw(key, plan)
        self._publish(plan)
        problems += self._note_refused(plan)
        for key in gone:
            self._drop(key, plan)
            self._unplaced.pop(key, None)
        self._backends.settle()
        self._note_departures(plan)
        if complete:
            self._drop_leftovers()
        return problems

    @property
    def unplaced(self) -> list[CapacityError]:
        """The service ports that do not fit, or not as they should, now."""
        return [problem for _, problem in self._unplaced.values()]

    def retry(self) -> None:
        """Tries again what did not fit, if something has been given back since."""
        if self._unplaced and self._has_freed:
            self._has_freed = False
            self.apply([port for port, _ in self._unplaced.values()])

    def _note_refused(self, plan: _Plan) -> list[CapacityError]:
        """A service port that a map has no room for is tried again as a whole: only what lacks is written."""
        found: dict[int, list[str]] = {}
        for number, why in plan.refused:
            found.setdefault(number, []).append(why)
        problems = []
        for number, refused in found.items():
            port, _ = plan.placed[number]
            more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
            problem = CapacityError(port.key, f"{refused[0]}{more}")
            self._unplaced[port.key] = (port, problem)
            problems.append(problem)
        return problems

    def _place(self, port: ServicePort, plan: _Plan) -> list[CapacityError]:
        """Writes what nobody looks at yet, and plans the rest. Returns what is wrong, if anything."""
        self._unplaced.pop(port.key, None)
        try:
            self._try_place(port, plan, self._maglev_size)
            return []
        except (IdsExhaustedError, RangesExhaustedError) as error:
            why = _no_room(error)
            # What this change has retired so far is in use where the new sets are only planned.
            self._publish_sets(plan)
            self._end_absences(float("inf"), plan)
            self._publish_sets(plan)
            retired = self.take_retired()
            if retired:
                self._wait_for_readers()
                self.reclaim(retired)
        for size in (*([self._maglev_size] if retired else []), *self._smaller_sizes(port)):
            try:
                self._try_place(port, plan, size)
            except (IdsExhaustedError, RangesExhaustedError) as error:
                why = _no_room(error)
            else:
                if size == self._maglev_size:
                    return []
                why = f"its Maglev table has only {size} places, unlike on other nodes: no room for more"
                break
        problem = CapacityError(port.key, why)
        self._unplaced[port.key] = (port, problem)
        return [problem]

    def _smaller_sizes(self, port: ServicePort) -> Iterator[int]:
        """What to try: a Maglev table that is smaller than it should be is better than none."""
        if port.algorithm is Algorithm.MAGLEV:
            for size in reversed(MAGLEV_SIZES):
                if len(port.cluster) <= size < self._maglev_size and self._ranges.fits(size):
                    yield size

    def _try_place(self, port: ServicePort, plan: _Plan, maglev_size: int) -> None:
        """Raises IdsExhaustedError or RangesExhaustedError with everything as it was."""
        known = self._programmed.get(port.key)
        uses_local = any(Policy.LOCAL in (f.internal, f.external) for f in port.frontends)
        sets = (port.cluster, port.local if uses_local else ())
        if known is None:
            # The id is taken last, so that a port that does not fit leaves nothing behind.
            known = _Programmed(-1)
        before = [self._range(known.id, policy) for policy in Policy]
        after = list(before)
        made_from = list(known.made_from)
        try:
            ids = [array("Q", map(self._backends.id_of, each)) for each in sets]
            # What only the unused set has serves old connections only, like those that are draining.
            unused = port.terminating.difference(*sets)
            draining = self._backends.ids_of((*port.draining, *unused))
            terminating = self._backends.ids_of(port.terminating)
            idle, drained = self._backends.ids_of(port.idle), self._backends.ids_of(port.drained)
            for policy, source in enumerate(_sources_of(port, sets, ids, maglev_size)):
                made_from[policy] = source.fingerprint
                if source.fingerprint is None or source.fingerprint != known.made_from[policy]:
                    words = self._slots_of(source)
                    if words != self._slot_words(*before[policy]):
                        after[policy] = self._write_slots(words)
            if known.id < 0:
                known.id = self._new_service(port.key, plan)
                self._programmed[port.key] = known
        except (IdsExhaustedError, RangesExhaustedError):
            for old, new in zip(before, after, strict=True):
                if new != old and new[1]:
                    self._ranges.release(*new)
            self._backends.drop_fresh()
            raise
        self._backends.keep_fresh()
        plan.placed[known.id] = port, known
        self._plan_name(known, plan)
        held = self._held(known)
        known.made_from = (made_from[0], made_from[1]) if any(made_from) else _NOTHING_MADE
        for policy in Policy:
            if after[policy] == before[policy]:
                continue
            if before[policy][1]:
                self._retired.ranges.append(before[policy])
            index = known.id * layout.POLICIES + policy
            plan.words[index] = layout.selection_word(*after[policy])
        known.unselected = draining.union(idle, drained) if idle or drained else draining
        leaving = draining | terminating if terminating else draining
        absent = self._wait_for_absent(port.key, held - known.unselected.union(*ids))
        known.unselected = known.unselected | absent if absent else known.unselected
        inactive = InactiveBackends(leaving, idle, drained, absent)
        self._hold(known, held, known.unselected.union(*ids), inactive, plan)
        wanted = _NO_MEMBERS
        if port.affinity_seconds:
            wanted = frozenset(ids[0]), frozenset(ids[1])
        self._plan_members(known, wanted, plan)
        self._plan_entries(port, known, plan)

    def _slots_of(self, source: Source) -> array[int]:
        """Raises RangesExhaustedError, before a table is made that has no room."""
        if not self._ranges.fits(source.size):
            raise RangesExhaustedError(f"no {source.size} places in a row")
        return source.slots()

    def _plan_name(self, known: _Programmed, plan: _Plan) -> None:
        name = self._unnamed.pop(known.id, None)
        if name is not None:
            plan.names[U32.pack(known.id)] = name

    def _plan_members(
        self, known: _Programmed, wanted: tuple[frozenset[int], frozenset[int]], plan: _Plan
    ) -> None:
        if wanted == known.members:
            return
        for policy in Policy:
            selection = known.id * layout.POLICIES + policy
            came, went = wanted[policy] - known.members[policy], known.members[policy] - wanted[policy]
            plan.members.update({layout.pack_member(selection, n): U32.pack(1) for n in came})
            plan.excluded += [layout.pack_member(selection, n) for n in went]
        known.members = wanted

    def _write_slots(self, ids: array[int]) -> tuple[int, int]:
        """Base and count of a fresh range."""
        if not ids:
            return 0, 0
        base = self._ranges.allocate(len(ids))
        size = layout.SLOT_SIZE
        self._slots.bytes[base * size : (base + len(ids)) * size] = ids.tobytes()
        self._slots.writes += len(ids)
        return base, len(ids)

    def _new_service(self, key: ServicePortKey, plan: _Plan) -> int:
        number = self._service_ids.add(key)
        # A killed agent may have left words behind an id that nothing named any more.
        for policy in Policy:
            self._words[number * layout.POLICIES + policy] = 0
        plan.names[U32.pack(number)] = layout.pack_name(key)
        if self._maps.adopted or self._service_ids.recycles:
            self._maps["service_stats"].update(U32.pack(number), self._maps["service_stats"].zero)
        return number

    def _wait_for_absent(self, key: ServicePortKey, missing: Set[int]) -> frozenset[int]:
        """Those of the missing whose endpoints may come back: they are kept, to be the same then."""
        before = self._absent.pop(key, {})
        if not missing or not self._absence:
            return NO_IDS
        until = self._clock() + self._absence
        if missing - before.keys():
            self._absences.append((until, key))
        self._absent[key] = {number: before.get(number, until) for number in missing}
        return frozenset(missing)

    @property
    def next_absence(self) -> float | None:
        """When :meth:`end_absences` has something to do, by the clock."""
        return self._absences[0][0] if self._absences else None

    def end_absences(self) -> None:
        """Endpoints that did not come back in time are gone."""
        now = self._clock()
        if self._absences and self._absences[0][0] <= now:
            plan = _Plan()
            self._end_absences(now, plan)
            self._publish_sets(plan)

    def _end_absences(self, now: float, plan: _Plan) -> None:
        while self._absences and self._absences[0][0] <= now:
            _, key = self._absences.popleft()
            absent = self._absent.pop(key, {})
            gone = {number for number, until in absent.items() if until <= now}
            if len(gone) < len(absent):
                self._absent[key] = {n: until for n, until in absent.items() if n not in gone}
            if gone:
                known = self._programmed[key]
                held = self._held(known)
                known.unselected -= gone
                inactive = known.inactive._replace(absent=known.inactive.absent - gone)
                self._hold(known, held, held - gone, inactive, plan)

    def _hold(
        self, known: _Programmed, before: Set[int], after: Set[int], inactive: InactiveBackends, plan: _Plan
    ) -> None:
        """Notes whom a service port uses; its flows are told whom it does not any more."""
        came, went = after - before, before - after
        if not (came or went) and inactive == known.inactive:
            return
        was = known.inactive
        away = inactive.idle | inactive.absent
        back = came | (was.idle | was.absent) - away - went if self._departures else NO_IDS
        departed = dict.fromkeys((inactive.idle - was.idle) & before, Departure.IDLE)
        departed |= dict.fromkeys(inactive.absent - was.absent, Departure.ABSENT)
        departed |= dict.fromkeys(went, Departure.GONE)
        if back or departed:
            plan.departures.append((known.id, back, departed))
        self._backends.hold(came, went, known.inactive, inactive)
        known.inactive = inactive

    @property
    def departures(self) -> dict[bytes, Departed]:
        """Of the last moments, by packed key: their flows and sockets have to be ended."""
        return self._departures.current

    def take_departures(self) -> dict[bytes, Departed]:
        """Those since the last time, and at first those that were there."""
        return self._departures.take_fresh()

    def take_lost_frontends(self) -> set[LostFrontend]:
        """Those of UDP that services have lost since the last time: their sockets are somebody else's."""
        taken, self._lost = self._lost, set()
        return taken

    def _note_lost(self, service_id: int, key: bytes) -> None:
        self._departures.look_again(service_id)
        frontend = layout.unpack_service_key(key)
        if frontend.protocol is Protocol.UDP:
            self._lost.add(LostFrontend(service_id, frontend.address, frontend.port))

    def forget_departures(self, ended: Mapping[bytes, Departed]) -> None:
        """Nothing is left of what these were about."""
        self._departures.forget(ended)
        self._backends.free_unused()

    @property
    def redirects(self) -> Redirects:
        """Connected datagram sockets whose backend is gone."""
        return self._redirects

    def _plan_entries(self, port: ServicePort, known: _Programmed, plan: _Plan) -> None:
        entries: dict[bytes, bytes] = {}
        for frontend in port.frontends:
            entries.update(_entries_of(frontend, known.id, port))
        if port.source_ranges:
            ranges = {layout.pack_source_range(known.id, *each) for each in port.source_ranges}
            ask = self._source_towards
            entries = {key: self._for_host(key, value, ranges, ask) for key, value in entries.items()}
        for key, value in entries.items():
            if self._frontends.get(key) != value:
                plan.entries[key] = value
        plan.vanished += [(known.id, key) for key in known.entries if key not in entries]
        known.entries = tuple(entries)
        sources = _NO_SOURCES
        if port.source_ranges:
            sources = frozenset(layout.pack_source_range(known.id, *each) for each in port.source_ranges)
        plan.sources.update(dict.fromkeys(sources - known.sources, U32.pack(1)))
        plan.closed += known.sources - sources
        known.sources = sources

    def _for_host(
        self, key: bytes, value: bytes, ranges: Collection[bytes], source_towards: Callable[[bytes], bytes]
    ) -> bytes:
        """A frontend's entry, with whether this node itself is in its source ranges (packed).

        A node that has the frontend's address asks by that: then its own address counts, as with kube-proxy.
        """
        flags = layout.unpack_service(value).flags & ~ServiceFlags.HOST
        if flags & ServiceFlags.SOURCES:
            address = layout.unpack_service_key(key).address
            source = source_towards(address)
            sources = self._primary if source == address else (source,)
            if any(layout.is_in_source_range(each, source) for source in sources for each in ranges):
                flags |= ServiceFlags.HOST
        return layout.with_service_flags(value, flags)

    def set_primary_addresses(self, addresses: tuple[bytes, ...]) -> None:
        """The node's own address of each family."""
        self._primary = addresses
        self.follow_routes()

    def follow_routes(self) -> None:
        """Asks the routes again by which addresses this node asks at frontends with source ranges."""
        # An address has a frontend for each port, and perhaps for each scope.
        ask = cache(self._source_towards)
        changed = {}
        for known in self._programmed.values():
            for key in known.entries if known.sources else ():
                value = self._frontends.get(key)
                if value is not None and value != (now := self._for_host(key, value, known.sources, ask)):
                    changed[key] = now
        if changed:
            self._frontends.write(changed)

    def _withdraw(self, key: ServicePortKey, plan: _Plan) -> None:
        known = self._programmed.get(key)
        if known is not None:
            plan.vanished += [(known.id, entry) for entry in known.entries]
            plan.closed += known.sources
            self._plan_members(known, _NO_MEMBERS, plan)

    def _publish_sets(self, plan: _Plan) -> None:
        """Lets readers see the part of a plan that says which backends there are to choose from."""
        for key in self._maps["service_names"].update_many(plan.names):
            # There are as many places as ids: the kernel had no memory.
            self._has_freed = True
            self._unnamed[U32.unpack(key)[0]] = plan.names[key]
            plan.refused.append((U32.unpack(key)[0], "no memory for its name"))
        for key in self._maps["members"].update_many(plan.members):
            selection, backend_id = layout.unpack_member(key)
            number, policy = divmod(selection, layout.POLICIES)
            plan.refused.append((number, "no room in members"))
            _, known = plan.placed[number]
            members = list(known.members)
            members[policy] -= {backend_id}
            known.members = (members[0], members[1])
        # Lock and unlock order the stores before with those after it, on CPUs that would swap them.
        with self._fence:
            pass
        for index, word in plan.words.items():
            self._words[index] = word
        self._selections.writes += len(plan.words)
        self._has_freed |= bool(plan.excluded)
        for key in plan.excluded:
            self._maps["members"].delete(key)
        plan.names, plan.members, plan.words, plan.excluded = {}, {}, {}, []
        self._backends.settle()
        self._note_departures(plan)

    def _note_departures(self, plan: _Plan) -> None:
        """Tells flows: not before new ones go elsewhere, or they could choose the same once more."""
        for departure in plan.departures:
            self._departures.note(*departure)
        plan.departures = []

    def _publish(self, plan: _Plan) -> None:
        """Lets readers see the plan, each step after what it refers to."""
        self._publish_sets(plan)
        for key in self._maps["source_ranges"].update_many(plan.sources):
            number = layout.source_range_service(key)
            plan.refused.append((number, "no room in source_ranges"))
            _, known = plan.placed[number]
            known.sources -= {key}
        for key, problem in self._frontends.write(plan.entries).items():
            plan.refused.append((layout.unpack_service(plan.entries[key]).id, problem))
        self._has_freed |= bool(plan.vanished or plan.closed)
        for service_id, key in plan.vanished:
            self._frontends.withdraw(service_id, key)
        for key in plan.closed:
            self._maps["source_ranges"].delete(key)

    def _drop(self, key: ServicePortKey, plan: _Plan) -> None:
        known = self._programmed.pop(key, None)
        if known is None:
            return
        held = self._held(known)
        # Connections outlive their Service, as in kube-proxy; what has no connection does not.
        stay = held - self._absent.pop(key, {}).keys()
        self._hold(known, held, stay, InactiveBackends(idle=frozenset(stay)), plan)
        self._backends.hold(NO_IDS, stay, known.inactive, ALL_ACTIVE)
        for policy in Policy:
            chosen = self._range(known.id, policy)
            if chosen[1]:
                self._retired.ranges.append(chosen)
        self._maps["service_names"].delete(U32.pack(known.id))
        self._unnamed.pop(known.id, None)
        self._service_ids.forget(key)
        self._retired.services.append(known.id)

    def _drop_leftovers(self) -> None:
        """What a killed agent left half done: entries and backends of no service port."""
        ids = {known.id for known in self._programmed.values()}
        self._frontends.drop_leftovers(ids)
        self._backends.drop_leftovers()
        for number, members in self._strangers.items():
            for policy in Policy:
                for backend_id in members[policy]:
                    key = layout.pack_member(number * layout.POLICIES + policy, backend_id)
                    self._maps["members"].delete(key)
        self._strangers = {}

    # -- what was replaced

    def take_retired(self) -> Retired:
        """What is retired so far; give it to :meth:`reclaim` after a grace period."""
        taken, self._retired = self._retired, _nothing_retired()
        taken.backends.extend(self._backends.take_retired())
        return taken

    def reclaim(self, retired: Retired) -> None:
        """Ids and ranges that no program can hold any more are free again."""
        self._has_freed |= bool(retired)
        for base, count in retired.ranges:
            self._ranges.release(base, count)
        self._backends.reclaim(retired.backends)
        for number in retired.services:
            for policy in Policy:
                self._words[number * layout.POLICIES + policy] = 0
            self._selections.writes += layout.POLICIES
            self._service_ids.give_back(number)

    # -- the node

    @property
    def needs_client_key(self) -> bool:
        """Whether any Service looks at who its client is."""
        return any(layout.needs_client_key(value) for _, value in self._frontends.items())

    def set_client_namespaces(self, cookies: Mapping[bytes, int]) -> None:
        """Under which names pods of this node appear as clients: by address in packets."""
        table = self._maps["client_namespaces"]
        wanted = {layout.pack_address(address): U64.pack(cookie) for address, cookie in cookies.items()}
        present = dict(table.items())
        table.update_many({key: value for key, value in wanted.items() if present.get(key) != value})
        for key in present.keys() - wanted.keys():
            table.delete(key)

    def set_own_addresses(self, addresses: frozenset[bytes], answered: frozenset[bytes]) -> None:
        """See ``frontend_table``, as for the next."""
        self._frontends.set_own_addresses(addresses)
        self._frontends.set_answered_addresses(answered)

    def set_node_addresses(self, addresses: frozenset[bytes]) -> None:
        self._frontends.set_node_addresses(addresses)


def _no_room(error: Exception) -> str:
    what = "slots" if isinstance(error, RangesExhaustedError) else "backends or the service"
    return f"no room for its {what}: {error}"


def _sources_of(
    port: ServicePort, sets: Sequence[Sequence[Backend]], ids: Sequence[array[int]], maglev_size: int
) -> Iterator[Source]:
    weights = dict(port.weights)
    for backends, numbers in zip(sets, ids, strict=True):
        chosen = [weights.get(each, 1) for each in backends] if weights else None
        yield Source(port.algorithm, backends, numbers, chosen, maglev_size)


def _entries_of(frontend: Frontend, service_id: int, owner: ServicePort) -> Iterable[tuple[bytes, bytes]]:
    """One entry, or two where the scopes' policies differ."""
    kind, address, port, protocol, internal, external = frontend
    two = ServiceFlags.TWO_SCOPES if internal != external else ServiceFlags(0)
    scopes = [(layout.Scope.INTERNAL, internal)]
    if two:
        scopes.append((layout.Scope.EXTERNAL, external))
    for scope, policy in scopes:
        flags = two | (ServiceFlags.LOCAL if policy == Policy.LOCAL else ServiceFlags(0))
        if kind is FrontendKind.LOAD_BALANCER and owner.source_ranges is not None:
            flags |= ServiceFlags.SOURCES
        yield (
            layout.pack_service_key(address, port, protocol, scope),
            layout.pack_service(service_id, flags, kind, owner.algorithm, owner.affinity_seconds),
        )
