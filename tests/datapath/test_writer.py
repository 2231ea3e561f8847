"""The writer on real maps: any sequence of changes leaves in the maps what was asked for, and no more."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpfproxy.datapath import layout, maglev
from ebpfproxy.datapath import maps as maps_module
from ebpfproxy.datapath.dump import Dump, FrontendRow
from ebpfproxy.datapath.grace import Grace
from ebpfproxy.datapath.layout import Capacity
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.roots import BPFFS, ensure_bpffs
from ebpfproxy.datapath.writer import Writer
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

pytestmark = pytest.mark.root

SMALL = Capacity(
    services=16,
    backends=16,
    connected=16,
    revnat=16,
    slots=64,
    conntrack=1024,
    affinity=64,
    source_ranges=16,
)
#: Ids come round soon, and there is room for the smallest Maglev tables.
ROUND = msgspec.structs.replace(SMALL, services=8, backends=12, slots=4096)
TABLE = maglev.SIZES[0]


class Bench:
    """Maps in a pin folder of their own, and writers on them."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.capacity, self.maglev_size = SMALL, TABLE
        self.maps: MapSet | None = None
        self.grace = Grace()
        self.reopen()

    def reopen(self) -> Writer:
        """As a new agent would: by adopting what is there."""
        self.close_maps()
        self.maps = maps_module.open_or_create(self.pins, self.capacity)
        self.writer = Writer(self.maps, self.grace.wait, maglev_size=self.maglev_size)
        return self.writer

    def close_maps(self) -> None:
        if self.maps is not None:
            for each in self.maps.maps.values():
                each.close()
            self.maps = None

    def empty(self, capacity: Capacity = SMALL, maglev_size: int = TABLE) -> Writer:
        self.close_maps()
        self.capacity, self.maglev_size = capacity, maglev_size
        shutil.rmtree(self.pins, ignore_errors=True)
        return self.reopen()

    @property
    def rows(self) -> list[FrontendRow]:
        assert self.maps is not None
        return Dump(self.maps).frontends()

    def writes(self) -> dict[str, int]:
        assert self.maps is not None
        return {name: each.writes for name, each in self.maps.maps.items()}

    # -- what programs see, read without the writer

    @property
    def service_ids(self) -> dict[ServicePortKey, int]:
        assert self.maps is not None
        return {name: number for number, name in Dump(self.maps).names.items()}

    def slots(self, service_id: int, policy: Policy) -> list[tuple[int, int]]:
        """Backend id and weight of each slot."""
        assert self.maps is not None
        word = self.maps.shared("selections").words()[service_id * layout.POLICIES + policy]
        base, count = layout.selection_range(word)
        words = self.maps.shared("slots").words()[base : base + count]
        return [(layout.slot_backend(each), layout.slot_weight(each)) for each in words]

    @property
    def records(self) -> dict[int, tuple[Backend, BackendState]]:
        """Every backend's place that is not free, by id."""
        assert self.maps is not None
        shared = self.maps.shared("backends")
        size = layout.BACKEND_SIZE
        packed = (bytes(shared.bytes[n * size : (n + 1) * size]) for n in range(self.capacity.backends))
        found = {n: layout.unpack_backend(each) for n, each in enumerate(packed)}
        return {n: each for n, each in found.items() if each is not None}

    @property
    def members(self) -> set[tuple[int, int]]:
        """Selection and backend id."""
        assert self.maps is not None
        return {layout.unpack_member(key) for key, _ in self.maps["members"].items()}

    def count_open(self, number: int, step: int, *, flow: bool) -> None:
        """As programs do when something to a backend begins (1) or ends (-1)."""
        assert self.maps is not None
        words = self.maps.shared("loads").bytes.cast("I")
        at = number * layout.LOAD_WORDS
        if not flow:
            words[at] = words[at] + step & 0xFFFFFFFF
        else:
            words[at + (layout.LOAD_BEGUN if step > 0 else layout.LOAD_ENDED)] += 1


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    ensure_bpffs(BPFFS)
    pins = BPFFS / "ebpfproxy-test-writer"
    made = Bench(pins)
    yield made
    made.close_maps()
    made.grace.close()
    shutil.rmtree(pins)


def backend(n: int) -> Backend:
    return Backend(bytes([10, 0, 0, n]), 80, Protocol.TCP)


def port(
    name: str,
    cluster: list[int],
    local: list[int] | None = None,
    *,
    external: Policy = Policy.CLUSTER,
    number: int = 80,
    leaving: tuple[int, ...] = (),
    idle: Collection[int] = (),
    drained: Collection[int] = (),
    algorithm: Algorithm = Algorithm.RANDOM,
    weights: Mapping[int, int] | None = None,
    affinity: int = 0,
    address: int | None = None,
) -> ServicePort:
    """A service port with a ClusterIP and a NodePort.

    As the tracker gives them: nobody is in two of the sets of those that are not used, or in one of them
    and used, and weights are those of used backends, where they are not 1.
    """
    ip = bytes([10, 96, 0, address if address is not None else ord(name[0])])
    chosen = {*cluster, *(local or ())}
    still = set(idle) - chosen - set(leaving)
    taken_out = set(drained) - chosen - set(leaving) - still
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
        draining=tuple(backend(n) for n in leaving if n not in chosen),
        terminating=frozenset(backend(n) for n in leaving if n in chosen),
        idle=tuple(map(backend, sorted(still))),
        drained=tuple(map(backend, sorted(taken_out))),
        algorithm=algorithm,
        weights=tuple((backend(n), w) for n, w in sorted((weights or {}).items()) if n in chosen and w != 1),
        affinity_seconds=affinity,
    )


def uses_local(p: ServicePort) -> bool:
    return any(Policy.LOCAL in (f.internal, f.external) for f in p.frontends)


#: What is said of a backend that its users see in different ways: the first of these.
STATES = (BackendState.ACTIVE, BackendState.DRAINED, BackendState.TERMINATING, BackendState.QUARANTINED)


def stands(ports: Iterable[ServicePort]) -> dict[Backend, set[BackendState]]:
    """How the users of each backend have it, those among them that only have old connections to it."""
    found: dict[Backend, set[BackendState]] = {}
    for p in ports:
        chosen = {*p.cluster, *(p.local if uses_local(p) else ())}
        leaving = p.terminating | set(p.draining)
        for state, backends in (
            (BackendState.ACTIVE, chosen - leaving),
            (BackendState.DRAINED, p.drained),
            (BackendState.TERMINATING, leaving),
            (BackendState.QUARANTINED, p.idle),
        ):
            for each in backends:
                found.setdefault(each, set()).add(state)
    return found


def expected_states(ports: Iterable[ServicePort]) -> dict[Backend, BackendState]:
    return {each: next(s for s in STATES if s in found) for each, found in stands(ports).items()}


def expected_rows(
    ports: dict[ServicePortKey, ServicePort],
) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """Frontend and scope to backends with their state, as the wanted state has it."""
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
    """A selection's slots are those of the wanted backends, as often as their weights say."""
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
    assert {weight for _, weight in slots} <= {0}, "a weight is where loads are looked at"


def check(bench: Bench, wanted: Mapping[ServicePortKey, ServicePort], opened: Mapping[int, Backend]) -> None:
    """The maps hold what is wanted, and no more."""
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
            assert len(ids) == len(numbers), "one id a backend"
            check_selection(p, policy, slots, ids)
            for each, number in ids.items():
                selected.setdefault(each, set()).add(number)
                assert records[number][1] == states[each]
            if p.affinity_seconds:
                members |= {(service_ids[key] * layout.POLICIES + policy, number) for number in numbers}
    assert all(len(numbers) == 1 for numbers in selected.values()), "the same id in every selection"
    assert bench.members == members
    for number, each in opened.items():
        assert number in records, "its place is kept while anything is open to it"
        assert records[number][0] == each, "what is counted for an id is of one backend"


sets = st.lists(st.integers(1, 5), max_size=3, unique=True)
ports = st.builds(
    lambda name, cluster, local, external, leaving, idle, drained, algorithm, weights, affinity: port(
        name,
        cluster,
        local,
        external=external,
        leaving=tuple(leaving),
        idle=idle,
        drained=drained,
        algorithm=algorithm,
        weights=weights,
        affinity=affinity,
    ),
    name=st.sampled_from(["a", "b", "c"]),
    cluster=sets,
    local=sets,
    external=st.sampled_from(list(Policy)),
    leaving=sets,
    idle=sets,
    drained=sets,
    algorithm=st.sampled_from(list(Algorithm)),
    weights=st.dictionaries(st.integers(1, 5), st.sampled_from([1, 2, 4, 6, 7]), max_size=3),
    affinity=st.sampled_from([0, 60]),
)
numbers = st.integers(0, 50)


class KilledError(Exception):
    """The agent ends in the middle of a change."""


#: Where: before readers see anything of it, or before frontends do.
KILLED_AT = ("service_names", "services4")
#: ``restart``: after the grace period of what was retired, ``kill``: before its end. Killed in a change: the
#: next agent is told the same, or that it was taken back.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), ports),
        st.tuples(st.just("set"), ports),
        st.tuples(st.just("remove"), ports),
        st.tuples(st.sampled_from(["reclaim", "restart", "kill"]), st.none()),
        st.tuples(
            st.sampled_from(["same", "taken back"]).flatmap(
                lambda end: st.sampled_from([f"{end} {at}" for at in KILLED_AT])
            ),
            ports,
        ),
        st.tuples(st.sampled_from(["open a flow", "open a socket", "close"]), numbers),
    ),
    max_size=25,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_the_maps_hold_what_was_asked_for_after_every_change(
    bench: Bench, steps: list[tuple[str, ServicePort | int | None]]
) -> None:
    writer = bench.empty(ROUND)
    wanted: dict[ServicePortKey, ServicePort] = {}
    opened: dict[int, Backend] = {}
    flows: set[int] = set()
    for step, each in steps:
        if isinstance(each, ServicePort):
            if step == "set":
                wanted[each.key] = each
                assert writer.apply([each]) == []
            elif step == "remove":
                wanted.pop(each.key, None)
                writer.apply((), [each.key])
            else:
                end, at = step.rsplit(" ", 1)
                assert bench.maps is not None
                with (
                    patch.object(bench.maps[at], "update_many", side_effect=KilledError),
                    pytest.raises(KilledError),
                ):
                    writer.apply([each])
                if end == "same":
                    wanted[each.key] = each
                writer = bench.reopen()
                assert writer.apply(wanted.values(), complete=True) == []
        elif step == "reclaim":
            writer.reclaim(writer.take_retired())
        elif isinstance(each, int):
            if step == "close" and opened:
                number = sorted(opened)[each % len(opened)]
                bench.count_open(number, -1, flow=number in flows)
                flows.discard(number)
                del opened[number]
            # As programs find them: by a slot. Few, so that ids do not run out.
            ids = {n for s in bench.service_ids.values() for p in Policy for n, _ in bench.slots(s, p)}
            unused = sorted(ids - opened.keys())
            if step != "close" and unused and len(opened) < 4:
                number = unused[each % len(unused)]
                opened[number] = bench.records[number][0]
                if step == "open a flow":
                    flows.add(number)
                bench.count_open(number, 1, flow=number in flows)
        else:
            if step == "restart":
                writer.reclaim(writer.take_retired())
            writer = bench.reopen()
            before, departures = bench.writes(), writer.departures.keys()
            assert writer.apply(wanted.values(), complete=True) == []
            leftovers = writer.take_retired()
            after = bench.writes()
            # One is forgotten where nothing is open to its backend, which is then not adopted.
            assert writer.departures.keys() <= departures
            before.pop("departures"), after.pop("departures")
            assert after == before, "nothing changed, nothing is written"
            assert not leftovers.ranges
            writer.reclaim(leftovers)
        check(bench, wanted, opened)
    writer.apply((), list(wanted))
    writer.reclaim(writer.take_retired())
    writer.forget_departures(writer.departures)
    assert bench.rows == []
    assert (writer.service_ports, writer.frontends, writer.backends) == (0, 0, 0)
    assert writer.free_slots == ROUND.slots, "every range came back"
    gone = {(each, BackendState.GONE) for each in opened.values()}
    assert set(bench.records.values()) == gone, "only those to whom something is open"
    for number in opened:
        bench.count_open(number, -1, flow=number in flows)
    writer.forget_departures(writer.departures)
    assert bench.records == {}, "and then nobody"


def test_after_a_restart_states_do_not_flicker_where_users_differ(bench: Bench) -> None:
    """A backend that is terminating for one Service and drained for another stays drained all the time."""
    writer = bench.empty()
    wanted = [port("a", [1], leaving=(1,)), port("b", [2], drained=[1])]
    writer.apply(wanted, complete=True)
    assert {str(state) for _, state in bench.records.values()} == {"drained", "active"}
    writer = bench.reopen()
    writer.apply(wanted, complete=True)
    assert bench.writes()["backends"] == 0


def test_a_backend_that_a_killed_agent_was_about_to_let_go_is_active_again(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    assert bench.maps is not None
    with (
        patch.object(bench.maps["service_names"], "update_many", side_effect=KilledError),
        pytest.raises(KilledError),
    ):
        writer.apply([port("a", [])])
    bench.reopen().apply([port("a", [1])], complete=True)
    assert seen_rows(bench.rows) == expected_rows({port("a", [1]).key: port("a", [1])})


@pytest.mark.parametrize("what", ["slots", "ids"])
def test_where_room_runs_out_within_a_change_readers_still_see_the_old_set_or_the_new_one(
    bench: Bench, what: str
) -> None:
    """What one service port has given up is used for the next only when nobody sees it any more."""
    every = dict.fromkeys(range(1, 7), 4)
    if what == "slots":
        # 25 of 64 slots each; then 4 and 25 more.
        first = [port("a", [*every, 7], weights=every), port("b", [*every, 8], weights=every)]
        then = [port("a", [1, 2, 3, 4]), port("c", [*every, 9], weights=every)]
    else:
        first = [port("a", [*range(1, 15)])]
        then = [port("a", [30]), port("c", [*range(40, 52)])]
    writer = bench.empty()
    assert writer.apply(first, complete=True) == []

    def chosen(rows: Mapping[tuple[str, str, str], list[tuple[str, str]]]) -> list[list[str]]:
        return [[address for address, _ in row] for key, row in rows.items() if key[0] == "a"]

    old, new = (chosen(expected_rows({p.key: p for p in each})) for each in (first, then))
    assert bench.maps is not None
    seen: list[list[list[str]]] = []

    def look(entries: dict[bytes, bytes]) -> list[bytes]:
        seen.append(chosen(seen_rows(bench.rows)))
        return real(entries)

    for table in ("service_names", "members", "services4"):
        real = bench.maps[table].update_many
        with patch.object(bench.maps[table], "update_many", side_effect=look):
            assert writer.apply(then) == []
        writer.reclaim(writer.take_retired())
        assert all(each in (old, new) for each in seen)
        for each in ([], first):
            assert writer.apply(each, complete=True) == []
            writer.reclaim(writer.take_retired())
    assert len(seen) > 3, "in between, too"


def test_what_did_not_fit_is_tried_again(bench: Bench) -> None:
    writer = bench.empty()
    every = dict.fromkeys(range(1, 9), 5)
    first = port("a", [*every, 9], weights=every)
    second, third = port("b", [*every, 9], weights=every), port("c", [*every, 10], weights=every)
    assert writer.apply([first], complete=True) == []
    problems = writer.apply([second, third])
    assert [problem.partition(": no room for its slots")[0] for problem in problems] == [
        "shop/b:http (IPv4)",
        "shop/c:http (IPv4)",
    ]
    assert writer.unplaced == problems
    writer.retry()
    assert writer.unplaced == problems, "nothing has been given back"
    writer.apply((), [third.key, first.key])
    assert writer.unplaced == problems[:1], "who is gone does not wait any more"
    writer.reclaim(writer.take_retired())
    writer.retry()
    assert writer.unplaced == []
    check(bench, {second.key: second}, {})


def test_a_maglev_table_is_smaller_where_there_is_no_room_until_there_is(bench: Bench) -> None:
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=800), maglev.SIZES[1])
    first, second = (port(name, [1, 2, 3], algorithm=Algorithm.MAGLEV) for name in "ab")
    assert writer.apply([first], complete=True) == []
    (problem,) = writer.apply([second])
    assert problem == (
        "shop/b:http (IPv4): its Maglev table has only 251 places, unlike on other nodes: no room for more"
    )
    assert len(bench.slots(bench.service_ids[second.key], Policy.CLUSTER)) == 251
    assert writer.unplaced == [problem]
    writer.apply((), [first.key])
    writer.reclaim(writer.take_retired())
    writer.retry()
    assert writer.unplaced == []
    assert len(bench.slots(bench.service_ids[second.key], Policy.CLUSTER)) == 509


def test_a_maglev_table_that_has_grown_with_its_backends_gets_what_was_given_back(bench: Bench) -> None:
    """Three changes of a table of 509 places in a range of 1,100."""
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=1100, backends=300))
    for missing in (1, 2, 3):
        chosen = [n for n in range(254) if n != missing]
        assert writer.apply([port("a", chosen, algorithm=Algorithm.MAGLEV)]) == []


def test_what_never_fitted_and_is_gone_is_not_tried_again(bench: Bench) -> None:
    writer = bench.empty()
    assert len(writer.apply([port("a", list(range(1, 20)))])) == 1
    writer.apply([port("b", [1])], complete=True)
    assert writer.unplaced == []


def test_a_change_of_weights_or_of_the_algorithm_is_one_of_slots(bench: Bench) -> None:
    """And the same again is none."""
    writer = bench.empty(ROUND)
    writer.apply([port("a", [1, 2])], complete=True)
    for p, slots in (
        (port("a", [1, 2], weights={1: 3}), 4),
        (port("a", [1, 2], weights={1: 3}, algorithm=Algorithm.ROUND_ROBIN), 0),
        (port("a", [1, 2], weights={1: 6, 2: 2}, algorithm=Algorithm.ROUND_ROBIN), 0),
        (port("a", [1, 2], weights={1: 3}, algorithm=Algorithm.LEAST_CONNECTIONS), 2),
        (port("a", [1, 2], algorithm=Algorithm.LEAST_CONNECTIONS), 2),
        (port("a", [1, 2], algorithm=Algorithm.MAGLEV), TABLE),
        (port("a", [1], algorithm=Algorithm.MAGLEV), 1),
    ):
        for expected in (slots, 0):
            before = bench.writes()["slots"]
            assert writer.apply([p]) == []
            assert bench.writes()["slots"] - before == expected
        check(bench, {p.key: p}, {})


def test_the_id_of_a_backend_that_is_gone_rests_while_something_is_open_to_it(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    number = next(n for n, (each, _) in bench.records.items() if each == backend(1))
    bench.count_open(number, 1, flow=True)
    writer.apply([port("a", [2])])
    for _ in range(2):
        writer.reclaim(writer.take_retired())
        assert bench.records[number] == (backend(1), BackendState.GONE)
        assert writer.apply([port("a", [2, *range(20, 33)])]) == [], "all others"
        problems = writer.apply([port("a", [2, *range(20, 35)])])
        assert len(problems) == 1
        assert "no room for its backends" in problems[0]
        writer = bench.reopen()
        writer.apply([port("a", [2])], complete=True)
    bench.count_open(number, -1, flow=True)
    writer.forget_departures(writer.departures)
    writer.reclaim(writer.take_retired())
    assert number not in bench.records
    assert writer.apply([port("a", [2, *range(20, 35)])]) == []


def test_a_backend_that_comes_back_while_something_is_open_has_another_id(bench: Bench) -> None:
    """What is open was open to the one that went: it is not counted for its successor."""
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    bench.count_open(0, 1, flow=False)
    for p in (port("a", []), port("a", [1])):
        writer.apply([p])
        writer.reclaim(writer.take_retired())
    assert bench.records == {
        0: (backend(1), BackendState.GONE),
        1: (backend(1), BackendState.ACTIVE),
    }
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]


def test_of_two_records_of_one_backend_a_restart_finds_the_one_that_is_used(bench: Bench) -> None:
    """It has left and come back, under a lower id, and the agent was killed before it was taken out."""
    writer = bench.empty()
    writer.apply([port("a", list(range(1, 17)))], complete=True)
    last = next(each for n, (each, _) in bench.records.items() if n == 15).address[3]
    writer.apply([port("a", [last])])
    writer.reclaim(writer.take_retired())
    writer.apply([port("a", [])])
    writer.apply([port("a", [last])])
    assert bench.slots(0, Policy.CLUSTER) == [(0, 0)]
    writer = bench.reopen()
    before = bench.writes()
    writer.apply([port("a", [last])], complete=True)
    after = bench.writes()
    assert {name: n - before[name] for name, n in after.items() if n != before[name]}.keys() <= {"departures"}
    writer.reclaim(writer.take_retired())
    assert bench.slots(0, Policy.CLUSTER) == [(0, 0)]
    assert bench.records == {0: (backend(last), BackendState.ACTIVE)}
    writer.apply([], complete=True)
    writer.reclaim(writer.take_retired())
    assert bench.records == {}


@pytest.mark.parametrize("other", [0, 5])
def test_a_second_record_that_nobody_marked_is_not_taken_for_the_one_that_is_used(
    bench: Bench, other: int
) -> None:
    """As an agent leaves it that is killed between the one and the other."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    writer.apply([port("a", [2])])
    writer.reclaim(writer.take_retired())
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]
    assert bench.maps is not None
    shared = bench.maps.shared("backends")
    packed = layout.pack_backend(backend(2), BackendState.ACTIVE)
    shared.bytes[other * shared.stride : other * shared.stride + len(packed)] = packed
    writer = bench.reopen()
    writer.apply([port("a", [2])], complete=True)
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]
    writer.reclaim(writer.take_retired())
    assert bench.records == {1: (backend(2), BackendState.ACTIVE)}


def test_what_was_counted_for_an_id_is_nothing_to_the_next_that_has_it(bench: Bench) -> None:
    """Words that have wrapped, and ends of what began before they were counted."""
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    bench.count_open(0, -1, flow=False)
    for step in (1, -1, -1):
        bench.count_open(0, step, flow=True)
    writer.apply([port("a", [])])
    writer.reclaim(writer.take_retired())
    assert bench.records == {}
    assert bench.maps is not None
    assert not any(bench.maps.shared("loads").bytes)


def test_members_without_a_service_port_go_with_the_first_complete_state(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2], affinity=60)], complete=True)
    assert bench.maps is not None
    bench.maps["members"].update(layout.pack_member(9, 3), layout.U32.pack(1))
    writer = bench.reopen()
    assert bench.members == {(0, 0), (0, 1), (9, 3)}
    writer.apply([port("a", [1, 2], affinity=60)], complete=True)
    assert bench.members == {(0, 0), (0, 1)}
    writer.apply([port("a", [1, 2], affinity=0)])
    assert bench.members == set()


def test_a_change_writes_its_slots_and_one_word_only(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2]), port("b", [1, 2, 3])], complete=True)
    assert bench.maps is not None
    before = {name: each.writes for name, each in bench.maps.maps.items()}
    writer.apply([port("a", [1, 3])])
    after = {name: each.writes - before[name] for name, each in bench.maps.maps.items()}
    # And that backend 2 has left, for the flows that have it.
    assert {name: n for name, n in after.items() if n} == {"slots": 2, "selections": 1, "departures": 1}


def test_ids_stay_across_restarts_and_are_reused_last(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2]), port("b", [3])], complete=True)
    assert bench.maps is not None
    ids = {row.address: row.id for row in Dump(bench.maps).backends()}
    writer = bench.reopen()
    writer.apply([port("a", [2]), port("b", [3, 4])], complete=True)
    writer.reclaim(writer.take_retired())
    after = {row.address: row.id for row in Dump(bench.maps).backends()}
    assert after["10.0.0.2:80"] == ids["10.0.0.2:80"]
    assert after["10.0.0.3:80"] == ids["10.0.0.3:80"]
    assert after["10.0.0.4:80"] not in ids.values(), "a fresh id while there are any"


def test_a_frontend_that_moves_to_another_service_is_never_missing(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1], address=7)], complete=True)
    taken = port("b", [2], address=7)
    given_up = port("a", [1], address=8)
    writer.apply([given_up, taken])
    rows = seen_rows(bench.rows)
    assert rows["b", "10.96.0.7:80", "internal"] == [("10.0.0.2:80", "active")]
    assert ("a", "10.96.0.7:80", "internal") not in rows


def test_what_does_not_fit_is_said_and_the_old_state_stays(bench: Bench) -> None:
    writer = bench.empty()
    assert writer.apply([port("a", [1, 2])], complete=True) == []
    before = seen_rows(bench.rows)
    problems = writer.apply([port("a", list(range(1, 20)))])
    assert len(problems) == 1
    assert "shop/a:http" in problems[0]
    assert "no room for its backends" in problems[0]
    assert seen_rows(bench.rows) == before
    assert writer.apply([port("a", list(range(1, 17)))]) == [], "what fits is programmed"


def test_ids_that_are_only_resting_are_used_when_nothing_else_is_left(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", list(range(1, 17)))], complete=True)
    assert writer.apply([port("a", [1])]) == []
    assert writer.apply([port("a", list(range(20, 35)))]) == [], (
        "a grace period frees those that were retired"
    )


def test_leftovers_of_a_killed_agent_go_with_the_first_complete_state(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1]), port("b", [2])], complete=True)
    writer = bench.reopen()
    assert len(bench.rows) == 8, "nothing goes before everything is known"
    writer.apply([port("b", [2])], complete=True)
    assert {row.name for row in bench.rows} == {"b"}


def test_node_addresses_follow_the_node(bench: Bench) -> None:
    writer = bench.empty()
    one, two = bytes([172, 18, 0, 1]), bytes(15) + b"\x09"
    for addresses in ({one, two}, {two}, {one}):
        writer.set_node_addresses(frozenset(addresses))
        assert bench.maps is not None
        assert bench.maps["node_addresses"].count() == len(addresses)
    bench.reopen().set_node_addresses(frozenset({one}))
    assert bench.writes()["node_addresses"] == 0
