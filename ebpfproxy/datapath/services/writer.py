"""Brings the maps of Services to the wanted state, without a reader seeing a mixture.

For each service port, ``placement`` writes new backends and slots where no program looks yet, and ``plan``
says what else differs; then ``publish`` lets readers see the change. What it replaced is used again after a
grace period (``retirement``). A start reuses what is in the maps (``adopt``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from contextlib import suppress

from ebpfproxy.config.datapath import MAGLEV_DEFAULT_SIZE
from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.flows.removed_backends import Removal, RemovedBackends
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.services import plan
from ebpfproxy.datapath.services.absences import Absences
from ebpfproxy.datapath.services.adopt import adopt, service_names
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.capacity import CapacityError, CapacityErrors
from ebpfproxy.datapath.services.counters import ServiceCounts
from ebpfproxy.datapath.services.frontend_table import Frontends
from ebpfproxy.datapath.services.held_ids import HeldIds
from ebpfproxy.datapath.services.host_sources import HostSources
from ebpfproxy.datapath.services.ids import Ids
from ebpfproxy.datapath.services.lost_frontends import LostFrontends
from ebpfproxy.datapath.services.measures import Measures
from ebpfproxy.datapath.services.placement import ExhaustedError, Placed, Placer, no_room
from ebpfproxy.datapath.services.plan import ALL_ACTIVE, NO_IDS, Change, InactiveBackends, Published
from ebpfproxy.datapath.services.publish import Publisher, Tables
from ebpfproxy.datapath.services.redirects import Redirects
from ebpfproxy.datapath.services.retirement import Retired, Retirement
from ebpfproxy.datapath.services.selection_table import SelectionTable
from ebpfproxy.services.model import ServicePort, ServicePortKey


class Writer:
    """The only writer of the maps of Services, by way of those classes that each write one of them.

    One thread uses it. ``wait_for_readers`` runs a grace period at once; it is called only where ids or slots
    ran out, and where maps are adopted.
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
        self._absences = Absences(absence, clock)
        self._host_sources = HostSources(source_towards)
        self._wait_for_readers = wait_for_readers
        self._counts = ServiceCounts(maps)
        self._measures = Measures(maps)
        self._is_adopted = maps.adopted
        #: True until the first complete state.
        self._is_first_state = maps.adopted
        self._capacity_errors = CapacityErrors()

        names = service_names(maps)
        self._selections = SelectionTable(maps, names)
        selected = frozenset(each for number in names for each in self._selections.backends(number))
        self._backends = Backends(maps, selected)
        self._unsettled = self._backends.unsettled()
        self._placer = Placer(self._selections, self._backends, maglev_size)
        self._removed_backends = RemovedBackends(maps)
        self._lost = LostFrontends(self._removed_backends, names)
        self._frontends = Frontends(maps, self._lost.note)
        if maps.adopted:
            # Programs may be using what an agent that was killed had replaced, and they had cached.
            wait_for_readers()
        self._redirects = Redirects(maps, self._frontends)
        tables = Tables(self._selections, self._backends, self._frontends, self._removed_backends)
        self._publisher = Publisher(maps, tables)
        self._published, self._strangers, self._nameless = adopt(maps, names, tables)
        self._service_ids: Ids[ServicePortKey] = Ids(
            maps["service_names"].spec.max_entries,
            {name: number for number, name in names.items()},
            # Whoever got one would have frontends and source ranges of somebody else.
            self._nameless,
        )
        self._measures.keep(names.keys(), set(self._backends.numbers()))
        self._open_ids = HeldIds(maps)
        self._retirement = Retirement(
            self._selections, self._backends, self._service_ids, self._measures, self._open_ids
        )

    # -- what is there

    @property
    def service_ports(self) -> int:
        return len(self._published)

    @property
    def frontends(self) -> int:
        return self._frontends.count()

    @property
    def backends(self) -> int:
        return len(self._backends)

    @property
    def backends_end(self) -> int:
        """One more than the highest id of a backend."""
        return self._backends.end

    @property
    def free_slots(self) -> int:
        return self._selections.free_slots

    @property
    def needs_client_key(self) -> bool:
        """True if the choice for any Service depends on the client."""
        return any(entry.needs_client_key for _, entry in self._frontends.items())

    def names(self) -> dict[int, ServicePortKey]:
        """The service ports by id."""
        return {number: name for name, number in self._service_ids.items()}

    def owned(self) -> list[Owned]:
        """The hashes and tries that nothing else writes, with what they should hold."""
        return [
            *self._publisher.owned(self._service_ids.items, self._published),
            self._removed_backends.owned(),
            *self._frontends.owned(),
        ]

    # -- changes

    def apply(
        self,
        changed: Collection[ServicePort],
        removed: Iterable[ServicePortKey] = (),
        *,
        complete: bool = False,
    ) -> list[CapacityError]:
        """Programs a change. ``complete``: ``changed`` is all there is, everything else goes.

        Returns the service ports that did not fit; they keep what they had.
        """
        change = Change()
        problems: list[CapacityError] = []
        if complete and not self._published:
            self._backends.add_ahead(changed)
        for port in changed:
            problems += self._place(port, change)
        gone: Collection[ServicePortKey] = set(removed)
        if complete:
            gone = (self._published.keys() | self._capacity_errors.keys) - {port.key for port in changed}
        for key in gone:
            if known := self._published.get(key):
                change.withdraw(known)
        self._measures.forget(change.reused, ())
        self._publisher.publish(change)
        # Each is tried again as a whole: only what lacks is written.
        problems += [self._capacity_errors.add(*each) for each in change.refusals()]
        for key in gone:
            self._drop(key, change)
            self._capacity_errors.discard(key)
        self._publisher.settle(change)
        if complete:
            self._drop_leftovers()
        return problems

    @property
    def capacity_errors(self) -> list[CapacityError]:
        """The service ports that do not fit, or not as they should, now."""
        return self._capacity_errors.problems

    def retry(self) -> None:
        """Tries again what did not fit, if something has been given back since."""
        if self._capacity_errors.keys and self._publisher.has_freed:
            self._publisher.has_freed = False
            self.apply(self._capacity_errors.ports)

    def _place(self, port: ServicePort, change: Change) -> list[CapacityError]:
        """Writes what no program looks at yet, and plans the rest. Returns what is wrong, if anything."""
        self._capacity_errors.discard(port.key)
        try:
            self._try_place(port, change, self._placer.maglev_size)
            return []
        except ExhaustedError as error:
            why = no_room(error)
            retired = self._free_now(change)
        for size in (*([self._placer.maglev_size] if retired else []), *self._placer.smaller_sizes(port)):
            try:
                self._try_place(port, change, size)
            except ExhaustedError as error:
                why = no_room(error)
            else:
                if size == self._placer.maglev_size:
                    return []
                why = f"its Maglev table has only {size} places, unlike on other nodes: no room for more"
                break
        else:
            self._place_known(port, change)
        return [self._capacity_errors.add(port, why)]

    def _place_known(self, port: ServicePort, change: Change) -> None:
        """Serves what does not fit without its new backends, so that those leave that are gone."""
        if (known := self._published.get(port.key)) is None:
            return
        there = self._backends.known_ids(plan.backends_of(port))
        part = plan.restricted(port, there.keys())
        for size in (self._placer.maglev_size, *self._placer.smaller_sizes(part)):
            with suppress(*ExhaustedError):
                self._try_place(part, change, size)
                # What a map refuses of it is tried again with all of its backends.
                change.placed[known.id] = port, known
                return
        # Those that have come back are waited for no longer, and stay.
        self._absences.wait_for(port.key, known.inactive.absent.difference(there.values()))

    def _free_now(self, change: Change) -> Retired:
        """Waits for readers, so that what is retired can be used. Returns that."""
        # What this change has retired so far is in use where the new sets are only planned.
        self._publisher.publish_sets(change)
        # An id that something is open to would not be free.
        self._end_absences(change, self._absences.cut_short(lambda n: not self._backends.is_open(n)))
        self._publisher.publish_sets(change)
        retired = self.take_retired()
        if retired:
            self._wait_for_readers()
            self.reclaim(retired)
        return retired

    def _try_place(self, port: ServicePort, change: Change, maglev_size: int) -> None:
        """Raises one of ``ExhaustedError`` with everything as it was."""
        known = self._published.get(port.key) or Published(-1)
        placed = self._placer.place(port, known, maglev_size, lambda: self._new_service(port.key, change))
        self._published[port.key] = known
        known.made_from = placed.made_from
        self._retirement.add_ranges(known.id, change.select(known, placed.before, placed.after))
        self._plan(port, known, placed, change)

    def _plan(self, port: ServicePort, known: Published, placed: Placed, change: Change) -> None:
        """Plans what readers will see of a service port whose backends and slots are in place."""
        ids = placed.ids
        change.placed[known.id] = port, known
        if name := self._publisher.unnamed(known.id):
            change.names[known.id] = name
        held = placed.selected | known.unselected
        selected = ids.unselected.union(*ids.selected)
        absent = self._absences.wait_for(port.key, held - selected) if held else NO_IDS
        known.unselected = ids.unselected | absent if absent else ids.unselected
        self._hold(known, held, selected | absent if absent else selected, ids.inactive(absent), change)
        change.set_members(known, ids.members if port.affinity_seconds else plan.NO_MEMBERS)
        entries = plan.entries_of(port, known.id, self._host_sources.towards)
        change.set_entries(known, entries, self._frontends.get)
        if port.source_ranges or known.sources:
            change.set_sources(known, frozenset(port.source_ranges or ()))

    def _new_service(self, key: ServicePortKey, change: Change) -> int:
        may_be_old = self._is_adopted or self._service_ids.recycles
        held: Container[int] = self._open_ids if may_be_old else ()
        number = self._service_ids.add(key, held)
        change.names[number] = key
        if may_be_old:
            # A killed agent may have left words behind an id that nothing named any more.
            self._selections.clear(number)
            self._counts.clear(number)
            change.reused.append(number)
        return number

    def _held(self, known: Published) -> set[int]:
        """The backends that a service port refers to, as the maps have it."""
        return self._selections.backends(known.id) | known.unselected

    def _hold(
        self,
        known: Published,
        before: set[int],
        after: frozenset[int],
        inactive: InactiveBackends,
        change: Change,
    ) -> None:
        """Notes the backends that a service port uses; its flows are told to leave the others."""
        is_removed = self._removal_test(known.id)
        is_first = self._is_first_state and is_removed is not None
        if before == after and inactive == known.inactive and not is_first:
            return
        if before or is_removed is not None:
            change.remove(known, before, after, inactive, is_removed, is_first=is_first)
        self._backends.hold(after - before if before else after, before - after, known.inactive, inactive)
        known.inactive = inactive

    def _removal_test(self, service_id: int) -> Callable[[int], bool] | None:
        """Says if a backend was removed from a service, or may have been: see :attr:`Backends.unsettled`."""
        removed, unsettled = self._removed_backends, self._unsettled
        if not removed and not unsettled:
            return None
        return lambda number: number in unsettled or BackendUse(service_id, number) in removed

    def _drop(self, key: ServicePortKey, change: Change) -> None:
        if (known := self._published.pop(key, None)) is None:
            return
        held = self._held(known)
        # Connections outlive their Service, as in kube-proxy; what has no connection does not.
        # What an earlier agent waited for is not waited for yet.
        waiting = known.inactive.absent if self._is_first_state else NO_IDS
        stay = frozenset(held - waiting - self._absences.forget(key))
        self._hold(known, held, stay, InactiveBackends(idle=stay), change)
        self._backends.hold(NO_IDS, stay, known.inactive, ALL_ACTIVE)
        used = [each for each in self._selections.ranges(known.id) if each[1]]
        self._retirement.add_ranges(known.id, used)
        change.deleted.append(known.id)
        self._retirement.add_service(key)

    def _drop_leftovers(self) -> None:
        """Deletes what a killed agent left half done: entries and backends of no service port."""
        self._frontends.drop_leftovers({known.id for known in self._published.values()})
        self._backends.drop_leftovers()
        self._publisher.drop_members(self._strangers)
        self._publisher.drop_sources(self._nameless)
        self._retirement.add_nameless(self._nameless)
        self._strangers, self._nameless = [], set()
        self._is_first_state, self._unsettled = False, NO_IDS

    # -- endpoints that were removed, and may come back

    @property
    def next_absence(self) -> float | None:
        """When :meth:`end_absences` has something to do, by the clock."""
        return self._absences.next

    def end_absences(self) -> None:
        """Removes the backends of endpoints that did not come back in time."""
        if self._absences.is_due:
            change = Change()
            self._end_absences(change, self._absences.over())
            self._publisher.publish_sets(change)

    def _end_absences(self, change: Change, over: Iterable[tuple[ServicePortKey, set[int]]]) -> None:
        for key, gone in over:
            known = self._published[key]
            held = self._held(known)
            known.unselected -= gone
            inactive = known.inactive._replace(absent=known.inactive.absent - gone)
            self._hold(known, held, frozenset(held - gone), inactive, change)

    # -- backends that were removed, and what is still open to them

    @property
    def removed_backends(self) -> dict[BackendUse, Removal]:
        """Backends that were removed lately: their flows and sockets have to end."""
        return self._removed_backends.current

    def take_removed_backends(self) -> dict[BackendUse, Removal]:
        """Those since the last call; the first call also returns those of an earlier agent."""
        return self._removed_backends.take_fresh()

    def is_current(self, use: BackendUse, removal: Removal) -> bool:
        """Says if this is still so: the backend may have come back. Any thread may ask."""
        return self._removed_backends.is_current(use, removal)

    def forget_removed_backends(self, ended: Mapping[BackendUse, Removal]) -> None:
        """Forgets removals: nothing is open to their backends any more."""
        self._removed_backends.forget(ended)
        self._publisher.has_freed |= self._retirement.free_unused()
        if ended:
            # What went on after its Service was gone has been counted again for the id.
            self._measures.keep(self.names().keys(), set(self._backends.numbers()))

    def take_losers(self) -> Container[int] | None:
        """Ids of services that may have lost UDP frontends since the last call, whose sockets have to end."""
        return self._lost.take()

    def has_udp_frontend(self, service_id: int, address: bytes, port: int) -> bool:
        """Says if a service has one there, as it is published. Any thread may ask."""
        return self._frontends.has_udp(service_id, address, port)

    @property
    def redirects(self) -> Redirects:
        """Connected datagram sockets whose backend is gone."""
        return self._redirects

    # -- what was replaced

    def take_retired(self) -> Retired:
        """Everything that is retired so far; :meth:`reclaim` takes it after a grace period."""
        return self._retirement.take()

    def reclaim(self, retired: Retired) -> None:
        """Frees ids and ranges that no program can hold any more."""
        self._publisher.has_freed |= bool(retired)
        self._retirement.free(retired)

    # -- the node

    def set_own_addresses(self, addresses: frozenset[bytes], answered: frozenset[bytes]) -> None:
        """Sets this node's addresses, and those of them at which its own processes answer."""
        self._frontends.set_own_addresses(addresses)
        self._frontends.set_answered_addresses(answered)

    def set_node_addresses(self, addresses: frozenset[bytes]) -> None:
        self._frontends.set_node_addresses(addresses)

    def set_primary_addresses(self, addresses: tuple[bytes, ...]) -> None:
        """Sets the node's own address of each family."""
        self._host_sources.primary = addresses
        self.follow_routes()

    def follow_routes(self) -> None:
        """Asks the routes again by which addresses this node asks at frontends with source ranges."""
        towards = self._host_sources.cached().towards
        if changed := plan.host_flags(self._published.values(), self._frontends.get, towards):
            self._frontends.write(changed)
