"""Shared by tests of the writer: their own maps, service ports, and the expected contents of maps."""

from __future__ import annotations

import math
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from ebpfproxy.config.datapath import MAGLEV_SIZES, Capacity
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.drift.checker import Checker
from ebpfproxy.datapath.drift.compare import Difference
from ebpfproxy.datapath.dump import Dump, FrontendRow
from ebpfproxy.datapath.kernel import maps as maps_module
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    BackendState,
    Family,
    Frontend,
    FrontendKind,
    Policy,
    Protocol,
    ServicePort,
    ServicePortKey,
    format_endpoint,
)

SMALL = Capacity(
    services=16,
    backends=16,
    connected=16,
    unconnected=16,
    slots=64,
    conntrack=1024,
    affinity=64,
    source_ranges=16,
)
#: Few ids, which are soon reused, and slots for the smallest Maglev tables.
FEW_IDS = msgspec.structs.replace(SMALL, services=8, backends=12, slots=4096)
TABLE = MAGLEV_SIZES[0]


def slot_backend(word: int) -> int:
    """Returns the backend id of a slot (``union slot``)."""
    return struct.unpack("=II", word.to_bytes(8, sys.byteorder))[0]  # type: ignore[no-any-return]


def slot_weight(word: int) -> int:
    """Returns the weight of a slot (``union slot``)."""
    return struct.unpack("=II", word.to_bytes(8, sys.byteorder))[1]  # type: ignore[no-any-return]


class KilledError(Exception):
    """Simulates that the agent is killed within a change."""


class Bench:
    """Maps in their own pin folder, with a writer."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.capacity, self.maglev_size = SMALL, TABLE
        self.maps: MapSet | None = None
        self.grace = Grace()
        self.reopen()

    def reopen(self) -> Writer:
        """Opens the maps and adopts their entries, as a new agent does."""
        self.close_maps()
        self.maps = maps_module.open_or_create(self.pins, self.capacity)
        self.writer = Writer(self.maps, self.grace.wait, maglev_size=self.maglev_size)
        self.checker = Checker(self.maps, self.writer.owned())
        return self.writer

    def close_maps(self) -> None:
        if self.maps is not None:
            for each in self.maps.maps.values():
                each.close()
            self.maps = None

    def close(self) -> None:
        # They refer to the arrays' memory.
        del self.writer, self.checker
        self.close_maps()
        self.grace.close()

    def empty(self, capacity: Capacity = SMALL, maglev_size: int = TABLE) -> Writer:
        self.close_maps()
        self.capacity, self.maglev_size = capacity, maglev_size
        shutil.rmtree(self.pins, ignore_errors=True)
        return self.reopen()

    def drift(self) -> list[Difference]:
        """What somebody else than the writer has changed."""
        return self.checker.confirm(self.checker.read(self.checker.begin(), lambda: None))

    @property
    def rows(self) -> list[FrontendRow]:
        assert self.maps is not None
        return Dump(self.maps).frontends()

    def writes(self) -> dict[str, int]:
        assert self.maps is not None
        return {name: each.writes for name, each in self.maps.maps.items()}

    # -- entries as programs read them, without the writer

    @property
    def service_ids(self) -> dict[ServicePortKey, int]:
        assert self.maps is not None
        return {name: number for number, name in Dump(self.maps).names.items()}

    def slots(self, service_id: int, policy: Policy) -> list[tuple[int, int]]:
        """Returns backend id and weight of each slot."""
        assert self.maps is not None
        selections = self.maps.selections()
        words = selections.slots(selections.ranges(service_id)[policy])
        return [(slot_backend(each), slot_weight(each)) for each in words]

    @property
    def records(self) -> dict[int, tuple[Backend, BackendState]]:
        """Returns the backends that are in use, by id."""
        assert self.maps is not None
        table = self.maps.backends()
        return {n: found for n in range(self.capacity.backends) if (found := table.read(n)) is not None}

    @property
    def members(self) -> set[tuple[int, int]]:
        """Returns pairs of selection and backend id."""
        assert self.maps is not None
        return {layout.unpack_member(key) for key, _ in self.maps["members"].items()}

    def count_open(self, number: int, step: int, *, flow: bool) -> None:
        """Counts a connection that begins (1) or ends (-1), as programs do; a ``flow`` or a socket."""
        assert self.maps is not None
        names = ("flows_begun", "flows_ended") if flow else ("sockets_opened", "sockets_closed")
        name = names[step < 0]
        set_load(self.maps, number, **{name: getattr(self.maps.loads()[number], name) + 1})


def set_load(maps: MapSet, number: int, **fields: int) -> None:
    """Stores what programs count for a backend."""
    record = maps.shared("backends").bytes[number * layout.BACKEND_SIZE : (number + 1) * layout.BACKEND_SIZE]
    for name, value in fields.items():
        form = layout.U64 if name in ("sockets_opened", "flows_begun", "datagrams") else layout.U32
        form.pack_into(record, layout.LOAD_OFFSETS[name], value)


def backend(n: int) -> Backend:
    return Backend(bytes([10, 0, *n.to_bytes(2, "big")]), 80, Protocol.TCP)


def port(
    name: str,
    cluster: Collection[int],
    local: list[int] | None = None,
    *,
    external: Policy = Policy.CLUSTER,
    number: int = 80,
    terminating: tuple[int, ...] = (),
    idle: Collection[int] = (),
    drained: Collection[int] = (),
    algorithm: Algorithm = Algorithm.RANDOM,
    weights: Mapping[int, int] | None = None,
    affinity: int = 0,
    address: int | None = None,
) -> ServicePort:
    """Returns a service port with a ClusterIP and a NodePort, consistent as those of the tracker.

    A backend is in one of the sets only, and weights are those of selected backends, without weights of 1.
    """
    ip = bytes([10, 96, 0, address if address is not None else ord(name[0])])
    chosen = {*cluster, *(local or ())}
    remaining_idle = set(idle) - chosen - set(terminating)
    remaining_drained = set(drained) - chosen - set(terminating) - remaining_idle
    return ServicePort(
        key=ServicePortKey("shop", name, "http", Protocol.TCP, Family.IPV4),
        frontends=(
            Frontend(FrontendKind.CLUSTER_IP, ip, number, Protocol.TCP, Policy.CLUSTER, Policy.CLUSTER),
            Frontend(
                FrontendKind.NODE_PORT, bytes(4), 30000 + ord(name[0]), Protocol.TCP, Policy.CLUSTER, external
            ),
        ),
        cluster=tuple(map(backend, sorted(cluster))),
        local=tuple(map(backend, sorted(local or ()))),
        draining=tuple(backend(n) for n in terminating if n not in chosen),
        terminating=frozenset(backend(n) for n in terminating if n in chosen),
        idle=tuple(map(backend, sorted(remaining_idle))),
        drained=tuple(map(backend, sorted(remaining_drained))),
        algorithm=algorithm,
        weights=tuple((backend(n), w) for n, w in sorted((weights or {}).items()) if n in chosen and w != 1),
        affinity_seconds=affinity,
    )


def uses_local(p: ServicePort) -> bool:
    return any(Policy.LOCAL in (f.internal, f.external) for f in p.frontends)


#: The first one of these that applies is the state of a backend whose service ports differ in it.
STATES = (BackendState.ACTIVE, BackendState.DRAINED, BackendState.TERMINATING, BackendState.QUARANTINED)


def states_by_backend(ports: Iterable[ServicePort]) -> dict[Backend, set[BackendState]]:
    """Returns the states of each backend in all service ports that use it."""
    found: dict[Backend, set[BackendState]] = {}
    for p in ports:
        chosen = {*p.cluster, *(p.local if uses_local(p) else ())}
        terminating = p.terminating | set(p.draining)
        for state, backends in (
            (BackendState.ACTIVE, chosen - terminating),
            (BackendState.DRAINED, p.drained),
            (BackendState.TERMINATING, terminating),
            (BackendState.QUARANTINED, p.idle),
        ):
            for each in backends:
                found.setdefault(each, set()).add(state)
    return found


def expected_states(ports: Iterable[ServicePort]) -> dict[Backend, BackendState]:
    return {each: next(s for s in STATES if s in found) for each, found in states_by_backend(ports).items()}


def expected_rows(
    ports: dict[ServicePortKey, ServicePort],
) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """Returns backends and their states by name, frontend and scope, as desired."""
    states = expected_states(ports.values())
    found = {}
    for p in ports.values():
        for f in p.frontends:
            for scope, policy in (("internal", f.internal), ("external", f.external)):
                chosen = p.cluster if policy is Policy.CLUSTER else p.local
                found[p.key.name, format_endpoint(f.address, f.port), scope] = sorted(
                    (format_endpoint(b.address, b.port), str(states[b])) for b in chosen
                )
    return found


def seen_rows(rows: list[FrontendRow]) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    return {
        (r.name, r.frontend.removesuffix("/TCP"), r.scope): [(b.address, b.state) for b in r.backends]
        for r in rows
    }


def check_selection(
    p: ServicePort, policy: Policy, slots: list[tuple[int, int]], ids: Mapping[Backend, int]
) -> None:
    """Checks that the slots of a selection are those of the desired backends and have their weights."""
    chosen = p.cluster if policy is Policy.CLUSTER else p.local if uses_local(p) else ()
    weights = {ids[each]: dict(p.weights).get(each, 1) for each in chosen}
    counts = Counter(number for number, _ in slots)
    assert counts.keys() == weights.keys()
    equal = len(set(weights.values())) <= 1
    if p.algorithm is Algorithm.MAGLEV and len(weights) > 1:
        assert len(slots) == TABLE
        for number, weight in weights.items():
            share = weight / sum(weights.values())
            assert abs(counts[number] - TABLE * share) <= 1 + len(weights) * share
    elif p.algorithm.looks_at_loads:
        assert set(counts.values()) <= {1}
        assert dict(slots) == (dict.fromkeys(weights, 0) if equal else weights)
        return
    else:
        divisor = math.gcd(*weights.values())
        assert counts == {number: weight // divisor for number, weight in weights.items()}
    assert {weight for _, weight in slots} <= {0}, "only algorithms that compare loads have weights in slots"


def check(bench: Bench, wanted: Mapping[ServicePortKey, ServicePort], opened: Mapping[int, Backend]) -> None:
    """Checks that the maps hold the desired state and nothing else."""
    assert bench.drift() == []
    writer, records, service_ids = bench.writer, bench.records, bench.service_ids
    assert service_ids.keys() == wanted.keys()
    assert seen_rows(bench.rows) == expected_rows(dict(wanted))
    for row in bench.rows:
        p = next(p for key, p in wanted.items() if key.name == row.name)
        assert (row.algorithm, row.affinity) == (str(p.algorithm), p.affinity_seconds)

    states = expected_states(wanted.values())
    assert writer.backends == len(states)
    assert set(states.items()) <= set(records.values())
    selected: dict[Backend, set[int]] = {}
    members = set()
    for key, p in wanted.items():
        for policy in Policy:
            slots = bench.slots(service_ids[key], policy)
            numbers = {number for number, _ in slots}
            ids = {records[number][0]: number for number in numbers}
            assert len(ids) == len(numbers), "a backend has one id"
            check_selection(p, policy, slots, ids)
            for each, number in ids.items():
                selected.setdefault(each, set()).add(number)
                assert records[number][1] == states[each]
            if p.affinity_seconds:
                members |= {(service_ids[key] * layout.POLICIES + policy, number) for number in numbers}
    assert all(len(numbers) == 1 for numbers in selected.values()), (
        "a backend has the same id in every selection"
    )
    assert bench.members == members
    for number, each in opened.items():
        assert number in records, "a backend with open connections keeps its record"
        assert records[number][0] == each, "counts of an id belong to one backend"
