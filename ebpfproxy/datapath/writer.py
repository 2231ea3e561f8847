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
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Set

import msgspec

from ebpfproxy.datapath import layout
from ebpfproxy.datapath.filter import BitFilter, address_hash
from ebpfproxy.datapath.ids import Ids, IdsExhaustedError
from ebpfproxy.datapath.layout import U32, Departure, ServiceFlags
from ebpfproxy.datapath.maps import Map, MapSet
from ebpfproxy.datapath.ranges import Ranges, RangesExhaustedError
from ebpfproxy.services.model import (
    Backend,
    BackendState,
    Frontend,
    FrontendKind,
    Policy,
    ServicePort,
    ServicePortKey,
)

#: Every other empty frozenset would be an object of 216 bytes, and nearly all of these are empty.
_NO_KEYS: frozenset[int] = frozenset()
_NO_SOURCES: frozenset[bytes] = frozenset()


class _Programmed(msgspec.Struct):
    """What the maps hold for one service port, beyond what can be read from them."""

    id: int
    entries: tuple[bytes, ...] = ()
    sources: frozenset[bytes] = _NO_SOURCES
    #: Backends in no selection, which only serve old connections: draining or idle ones.
    unselected: frozenset[int] = _NO_KEYS
    leaving: frozenset[int] = _NO_KEYS
    idle: frozenset[int] = _NO_KEYS


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
    vanished: list[tuple[int, bytes]] = msgspec.field(default_factory=list)
    closed: list[bytes] = msgspec.field(default_factory=list)


class Writer:
    """The only writer of the services', selections', slots' and backends' maps, and of what goes with them.

    ``wait_for_readers`` runs a grace period at once; it is called only where ids or slots ran out.
    """

    def __init__(self, maps: MapSet, wait_for_readers: Callable[[], None]) -> None:
        self._maps = maps
        self._wait_for_readers = wait_for_readers
        self._selections = maps.shared("selections")
        self._words = self._selections.words()
        self._slots = maps.shared("slots")
        self._backends = maps.shared("backends")
        self._fence = threading.Lock()
        self._retired = _nothing_retired()
        self._refs = array("I", bytes(4 * self._backends.spec.max_entries))
        self._leaving: Counter[int] = Counter()
        self._idle: Counter[int] = Counter()
        self._addresses = BitFilter(maps.shared("address_filter"))
        self._ports = BitFilter(maps.shared("port_filter"))
        self._cluster_ips: Counter[bytes] = Counter()
        self._epochs = maps.shared("epochs").words()
        self._departures: dict[bytes, Departure] = {
            key: Departure(U32.unpack(value)[0]) for key, value in maps["departures"].items()
        }
        self._own_addresses: frozenset[bytes] = frozenset()
        self._entries: dict[bytes, bytes] = {}
        self._programmed: dict[ServicePortKey, _Programmed] = {}
        self._node_addresses: frozenset[bytes] = frozenset()
        self._fresh_backends: list[Backend] = []
        self._adopting = True
        self._adopt()
        self._adopting = False

    # -- what is there

    @property
    def service_ports(self) -> int:
        return len(self._programmed)

    @property
    def frontends(self) -> int:
        return len(self._entries)

    @property
    def backends(self) -> int:
        return len(self._backend_ids)

    @property
    def free_slots(self) -> int:
        return self._ranges.free

    def _adopt(self) -> None:
        names = {
            U32.unpack(key)[0]: layout.unpack_name(value)
            for key, value in self._maps["service_names"].items()
        }
        entries_of: dict[int, list[bytes]] = {}
        for table in ("services4", "services6"):
            for key, value in self._maps[table].items():
                entry = layout.unpack_service(value)
                if entry.flags & ServiceFlags.ADDRESS:
                    continue
                self._entries[key] = value
                self._note_entry(key, entry.kind)
                entries_of.setdefault(entry.id, []).append(key)
        sources_of: dict[int, set[bytes]] = {}
        for key, _ in self._maps["source_ranges"].items():
            sources_of.setdefault(layout.source_range_service(key), set()).add(key)
        used: list[tuple[int, int]] = []
        for number, name in names.items():
            known = _Programmed(
                number, tuple(entries_of.get(number, ())), frozenset(sources_of.get(number, _NO_SOURCES))
            )
            used += [chosen for policy in Policy if (chosen := self._range(number, policy))[1]]
            held = self._held(known)
            known.leaving = (
                frozenset(n for n in held if self._state(n) == BackendState.TERMINATING) or _NO_KEYS
            )
            for backend_id in held:
                self._refs[backend_id] += 1
            self._leaving.update(known.leaving)
            self._programmed[name] = known
        self._ranges = Ranges(self._slots.spec.max_entries, used)
        self._service_ids: Ids[ServicePortKey] = Ids(
            self._maps["service_stats"].spec.max_entries, {name: number for number, name in names.items()}
        )
        self._backend_ids: Ids[Backend] = Ids(self._backends.spec.max_entries, self._adopted_backends())
        self._node_addresses = frozenset(
            layout.unpack_address(key) for key, _ in self._maps["node_addresses"].items()
        )

    def _range(self, service_id: int, policy: int) -> tuple[int, int]:
        """Base and count of the slots in use."""
        if service_id < 0:
            return 0, 0
        return layout.selection_range(self._words[service_id * layout.POLICIES + policy])

    def _slot_ids(self, base: int, count: int) -> array[int]:
        size = layout.SLOT_SIZE
        return array("Q", bytes(self._slots.bytes[base * size : (base + count) * size]))

    def _held(self, known: _Programmed) -> set[int]:
        """The backends that a service port refers to, as the maps have it."""
        cluster, local = (self._slot_ids(*self._range(known.id, policy)) for policy in Policy)
        return {*cluster, *local, *known.unselected}

    def _adopted_backends(self) -> dict[Backend, int]:
        if not self._maps.adopted:
            return {}
        memory, stride = self._backends.bytes, self._backends.stride
        found: dict[Backend, int] = {}
        for number in range(self._backends.spec.max_entries):
            # The protocol's byte tells a taken place from a free one without unpacking it.
            if memory[number * stride + layout.BACKEND_PROTOCOL_OFFSET]:
                known = layout.unpack_backend(bytes(memory[number * stride : (number + 1) * stride]))
                if known is not None:
                    found[known[0]] = number
        return found

    # -- changes

    def apply(
        self,
        changed: Iterable[ServicePort],
        removed: Iterable[ServicePortKey] = (),
        *,
        complete: bool = False,
    ) -> list[str]:
        """Programs a change. ``complete``: ``changed`` is all there is, everything else goes.

        Returns one sentence for each service port that did not fit; it keeps what it had.
        """
        plan = _Plan()
        problems: list[str] = []
        wanted: set[ServicePortKey] = set()
        for port in changed:
            wanted.add(port.key)
            problem = self._place(port, plan)
            if problem:
                problems.append(problem)
        gone: Collection[ServicePortKey] = set(removed)
        if complete:
            gone = self._programmed.keys() - wanted
        for key in gone:
            self._withdraw(key, plan)
        problems += self._publish(plan)
        for key in gone:
            self._drop(key)
        if complete:
            self._drop_leftovers()
        return problems

    def _place(self, port: ServicePort, plan: _Plan) -> str | None:
        """Writes what nobody looks at yet, and plans the rest."""
        try:
            self._try_place(port, plan)
            return None
        except (IdsExhaustedError, RangesExhaustedError):
            self._wait_for_readers()
            self.reclaim(self.take_retired())
        try:
            self._try_place(port, plan)
            return None
        except IdsExhaustedError as error:
            return f"{_describe(port.key)}: no room for its backends or the service: {error}"
        except RangesExhaustedError as error:
            return f"{_describe(port.key)}: no room for its slots: {error}"

    def _try_place(self, port: ServicePort, plan: _Plan) -> None:
        """Raises IdsExhaustedError or RangesExhaustedError with everything as it was."""
        known = self._programmed.get(port.key)
        uses_local = any(Policy.LOCAL in (f.internal, f.external) for f in port.frontends)
        sets = (port.cluster, port.local if uses_local else ())
        if known is None:
            # The id is taken last, so that a port that does not fit leaves nothing behind.
            known = _Programmed(-1)
        before = [self._range(known.id, policy) for policy in Policy]
        after = list(before)
        try:
            ids = [array("Q", map(self._backend_id, each)) for each in sets]
            # What only the unused set has serves old connections only, like those that are draining.
            unused = port.terminating.difference(*sets)
            draining = self._ids_of((*port.draining, *unused))
            idle = self._ids_of(port.idle)
            for policy in Policy:
                if ids[policy] != self._slot_ids(*before[policy]):
                    after[policy] = self._write_slots(ids[policy])
            if known.id < 0:
                known.id = self._new_service(port.key, plan)
                self._programmed[port.key] = known
        except (IdsExhaustedError, RangesExhaustedError):
            for old, new in zip(before, after, strict=True):
                if new != old and new[1]:
                    self._ranges.release(*new)
            self._drop_unheld(self._fresh_backends)
            raise
        finally:
            self._fresh_backends = []
        held = self._held(known)
        for policy in Policy:
            if after[policy] == before[policy]:
                continue
            if before[policy][1]:
                self._retired.ranges.append(before[policy])
            index = known.id * layout.POLICIES + policy
            plan.words[index] = layout.selection_word(*after[policy])
        known.unselected = draining | idle if idle else draining
        leaving = draining | self._ids_of(port.terminating) if port.terminating else draining
        self._hold(known, held, known.unselected.union(*ids), leaving, idle)
        self._plan_entries(port, known, plan)

    def _ids_of(self, backends: Collection[Backend]) -> frozenset[int]:
        return frozenset(map(self._backend_id, backends)) if backends else _NO_KEYS

    def _backend_id(self, backend: Backend) -> int:
        number = self._backend_ids.get(backend)
        if number is None:
            number = self._backend_ids.add(backend)
            self._fresh_backends.append(backend)
            self._store_backend(number, layout.pack_backend(backend, BackendState.ACTIVE))
            if self._maps.adopted or self._backend_ids.recycles:
                self._maps["backend_stats"].update(U32.pack(number), self._maps["backend_stats"].zero)
        return number

    def _store_backend(self, number: int, packed: bytes) -> None:
        start = number * self._backends.stride
        self._backends.bytes[start : start + len(packed)] = packed
        self._backends.writes += 1

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

    def _hold(
        self,
        known: _Programmed,
        before: Set[int],
        after: Set[int],
        leaving: frozenset[int],
        idle: frozenset[int],
        *,
        departs: bool = True,
    ) -> None:
        """Counts references, so that a backend's state and end follow from its users."""
        came, went = after - before, before - after
        turned = (leaving ^ known.leaving) | (idle ^ known.idle)
        if not (came or went or turned):
            return
        for number in came:
            self._refs[number] += 1
        _recount(self._leaving, known.leaving, leaving)
        _recount(self._idle, known.idle, idle)
        for number in went:
            self._refs[number] -= 1
        if departs:
            self._note_departures(known.id, came | (known.idle - idle), went, idle - known.idle)
        known.leaving, known.idle = leaving, idle
        for number in came | turned | went:
            if not self._refs[number]:
                self._retire_backend(number)
            else:
                self._store_state(number)

    def _note_departures(self, service_id: int, back: Set[int], gone: Set[int], idle: Set[int]) -> None:
        """Tells flows of a service which of its backends they must leave."""
        for number in back if self._departures else ():
            key = layout.pack_departure(service_id, number)
            if self._departures.pop(key, None) is not None:
                self._maps["departures"].delete(key)
        departed = dict.fromkeys(gone, Departure.GONE) | dict.fromkeys(idle, Departure.IDLE)
        if not departed:
            return
        entries = {layout.pack_departure(service_id, number): why for number, why in departed.items()}
        self._departures.update(entries)
        self._maps["departures"].update_many({key: U32.pack(why) for key, why in entries.items()})
        # Only after this do flows look there.
        self._epochs[service_id] += 1

    @property
    def departures(self) -> dict[bytes, Departure]:
        """Of the last moments, by packed key, for a sweep to end their flows."""
        return dict(self._departures)

    def forget_departures(self, swept: Mapping[bytes, Departure]) -> None:
        """A sweep that began after these has ended their flows."""
        for key, why in swept.items():
            if self._departures.get(key) == why:
                del self._departures[key]
                self._maps["departures"].delete(key)

    def _state(self, number: int) -> int:
        return self._backends.bytes[number * self._backends.stride + layout.BACKEND_STATE_OFFSET]

    def _store_state(self, number: int) -> None:
        """Active while any user has it so; quarantined once it is idle for all."""
        idle, leaving = self._idle[number], self._leaving[number]
        state = BackendState.ACTIVE
        if idle + leaving == self._refs[number]:
            state = BackendState.TERMINATING if leaving else BackendState.QUARANTINED
        at = number * self._backends.stride + layout.BACKEND_STATE_OFFSET
        if self._backends.bytes[at] != state:
            self._backends.bytes[at] = state
            self._backends.writes += 1

    def _retire_backend(self, number: int) -> None:
        start = number * self._backends.stride
        known = layout.unpack_backend(bytes(self._backends.bytes[start : start + layout.BACKEND_SIZE]))
        assert known is not None, f"backend {number} is held but not written"
        self._backend_ids.forget(known[0])
        self._retired.backends.append(number)

    def _drop_unheld(self, backends: Iterable[Backend]) -> None:
        for backend in backends:
            number = self._backend_ids.get(backend)
            if number is not None and not self._refs[number]:
                self._retire_backend(number)

    def _plan_entries(self, port: ServicePort, known: _Programmed, plan: _Plan) -> None:
        entries: dict[bytes, bytes] = {}
        for frontend in port.frontends:
            entries.update(_entries_of(frontend, known.id, port))
        for key, value in entries.items():
            if self._entries.get(key) != value:
                plan.entries[key] = value
        plan.vanished += [(known.id, key) for key in known.entries if key not in entries]
        known.entries = tuple(entries)
        sources = _NO_SOURCES
        if port.source_ranges:
            sources = frozenset(layout.pack_source_range(known.id, *each) for each in port.source_ranges)
        plan.sources.update(dict.fromkeys(sources - known.sources, U32.pack(1)))
        plan.closed += known.sources - sources
        known.sources = sources

    def _withdraw(self, key: ServicePortKey, plan: _Plan) -> None:
        known = self._programmed.get(key)
        if known is not None:
            plan.vanished += [(known.id, entry) for entry in known.entries]
            plan.closed += known.sources

    def _publish(self, plan: _Plan) -> list[str]:
        """Lets readers see the plan, each step after what it refers to."""
        full = [
            f"service_names: no room for service id {U32.unpack(key)[0]}"
            for key in self._maps["service_names"].update_many(plan.names)
        ]
        full += [
            f"source_ranges: no room for a prefix of service id {layout.source_range_service(key)}"
            for key in self._maps["source_ranges"].update_many(plan.sources)
        ]
        # Lock and unlock order the stores before with those after it, on CPUs that would swap them.
        with self._fence:
            pass
        for index, word in plan.words.items():
            self._words[index] = word
        self._selections.writes += len(plan.words)
        for table in ("services4", "services6"):
            size = self._maps[table].spec.key_size
            batch = {key: value for key, value in plan.entries.items() if len(key) == size}
            # What a filter does not know would pass untouched: it learns first, and forgets last.
            for key, value in batch.items():
                self._note_entry(key, layout.unpack_service(value).kind)
            refused = set(self._maps[table].update_many(batch))
            for key, value in batch.items():
                replaced = value if key in refused else self._entries.get(key)
                if replaced is not None:
                    self._forget_entry(key, layout.unpack_service(replaced).kind)
                if key not in refused:
                    self._entries[key] = value
            full += [f"{table}: no room for {describe_frontend(key)}" for key in refused]
        for service_id, key in plan.vanished:
            # A frontend that another service port has taken over is the other's.
            present = self._entries.get(key)
            if present is not None and layout.unpack_service(present).id == service_id:
                self._delete_entry(key)
        for key in plan.closed:
            self._maps["source_ranges"].delete(key)
        return full

    def _table_of(self, key: bytes) -> Map:
        return self._maps["services4" if len(key) == self._maps["services4"].spec.key_size else "services6"]

    def _delete_entry(self, key: bytes) -> None:
        self._table_of(key).delete(key)
        kind = layout.unpack_service(self._entries.pop(key)).kind
        self._forget_entry(key, kind)

    def _note_entry(self, key: bytes, kind: FrontendKind) -> None:
        """Its address and port are of interest; a cluster IP gets an entry for all its other ports, too."""
        frontend = layout.unpack_service_key(key)
        self._ports.add(frontend.port)
        if kind is FrontendKind.NODE_PORT:
            return
        address = frontend.address
        self._addresses.add(address_hash(address))
        if kind is FrontendKind.CLUSTER_IP:
            self._cluster_ips[address] += 1
            if self._cluster_ips[address] == 1 and not self._adopting:
                self._close_other_ports(address)

    def _close_other_ports(self, address: bytes) -> None:
        key, value = layout.pack_cluster_ip(address)
        # Without room for it such ports are not rejected, and nothing else is different.
        self._table_of(key).update_many({key: value})

    def _forget_entry(self, key: bytes, kind: FrontendKind) -> None:
        frontend = layout.unpack_service_key(key)
        address = frontend.address
        if kind is FrontendKind.CLUSTER_IP:
            self._cluster_ips[address] -= 1
            if not self._cluster_ips[address]:
                del self._cluster_ips[address]
                other_ports, _ = layout.pack_cluster_ip(address)
                self._table_of(other_ports).delete(other_ports)
        if kind is not FrontendKind.NODE_PORT:
            self._addresses.remove(address_hash(address))
        self._ports.remove(frontend.port)

    def _drop(self, key: ServicePortKey) -> None:
        known = self._programmed.pop(key, None)
        if known is None:
            return
        held = self._held(known)
        # Connections outlive their Service, as in kube-proxy; what has no connection does not.
        self._hold(known, held, held, _NO_KEYS, frozenset(held))
        self._hold(known, held, _NO_KEYS, _NO_KEYS, _NO_KEYS, departs=False)
        for policy in Policy:
            chosen = self._range(known.id, policy)
            if chosen[1]:
                self._retired.ranges.append(chosen)
        self._maps["service_names"].delete(U32.pack(known.id))
        self._service_ids.forget(key)
        self._retired.services.append(known.id)

    def _drop_leftovers(self) -> None:
        """What a killed agent left half done: entries and backends of no service port."""
        ids = {known.id for known in self._programmed.values()}
        for key, value in list(self._entries.items()):
            if layout.unpack_service(value).id not in ids:
                self._delete_entry(key)
        self._drop_unheld([backend for backend, _ in self._backend_ids.items()])
        if self._maps.adopted:
            self._repair_cluster_ips()
        self._addresses.drop_leftovers()
        self._ports.drop_leftovers()

    def _repair_cluster_ips(self) -> None:
        """The entries for other ports are those of the cluster IPs, whatever was adopted."""
        found = {
            address
            for table in ("services4", "services6")
            for key, value in self._maps[table].items()
            if layout.unpack_service(value).flags & ServiceFlags.ADDRESS
            and (address := layout.unpack_service_key(key).address)
        }
        for address in self._cluster_ips.keys() - found:
            self._close_other_ports(address)
        for address in found - self._cluster_ips.keys():
            key, _ = layout.pack_cluster_ip(address)
            self._table_of(key).delete(key)

    # -- what was replaced

    def take_retired(self) -> Retired:
        """What is retired so far; give it to :meth:`reclaim` after a grace period."""
        taken, self._retired = self._retired, _nothing_retired()
        return taken

    def reclaim(self, retired: Retired) -> None:
        """Ids and ranges that no program can hold any more are free again."""
        for base, count in retired.ranges:
            self._ranges.release(base, count)
        for number in retired.backends:
            self._store_backend(number, bytes(layout.BACKEND_SIZE))
            self._backend_ids.give_back(number)
        for number in retired.services:
            for policy in Policy:
                self._words[number * layout.POLICIES + policy] = 0
            self._selections.writes += layout.POLICIES
            self._service_ids.give_back(number)

    # -- the node

    def set_own_addresses(self, addresses: frozenset[bytes]) -> None:
        """All addresses of this node: answers to masqueraded clients come to one of them."""
        for address in addresses - self._own_addresses:
            self._addresses.add(address_hash(address))
        for address in self._own_addresses - addresses:
            self._addresses.remove(address_hash(address))
        self._own_addresses = addresses

    def set_node_addresses(self, addresses: frozenset[bytes]) -> None:
        """The addresses at which this node's NodePorts answer."""
        table = self._maps["node_addresses"]
        table.update_many({layout.pack_address(a): U32.pack(1) for a in addresses - self._node_addresses})
        for address in self._node_addresses - addresses:
            table.delete(layout.pack_address(address))
        self._node_addresses = addresses


def _recount(counts: Counter[int], before: frozenset[int], after: frozenset[int]) -> None:
    counts.update(after - before)
    for number in before - after:
        counts[number] -= 1
        if not counts[number]:
            del counts[number]


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
            layout.pack_service(service_id, flags, kind, 0, owner.affinity_seconds),
        )


def _describe(key: ServicePortKey) -> str:
    name = f":{key.port_name}" if key.port_name else ""
    return f"{key.namespace}/{key.name}{name} ({key.family})"


def describe_frontend(packed: bytes) -> str:
    """``10.96.0.1:443/TCP`` for a key of the services' maps."""
    key = layout.unpack_service_key(packed)
    return layout.format_frontend(key.address, key.port, key.protocol)
