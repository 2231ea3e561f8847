"""The writer on real maps: any sequence of changes leaves in the maps what was asked for, and no more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpfproxy.datapath import maps as maps_module
from ebpfproxy.datapath.dump import Dump, FrontendRow
from ebpfproxy.datapath.grace import Grace
from ebpfproxy.datapath.layout import Capacity
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.datapath.roots import BPFFS, ensure_bpffs
from ebpfproxy.datapath.writer import Writer
from ebpfproxy.services.model import (
    Backend,
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

SMALL = Capacity(services=16, backends=16, connected=16, revnat=16, slots=64)


class Bench:
    """Maps in a pin folder of their own, and writers on them."""

    def __init__(self, pins: Path) -> None:
        self.pins = pins
        self.maps: MapSet | None = None
        self.grace = Grace()
        self.reopen()

    def reopen(self) -> Writer:
        """As a new agent would: by adopting what is there."""
        self.close_maps()
        self.maps = maps_module.open_or_create(self.pins, SMALL)
        self.writer = Writer(self.maps, self.grace.wait)
        return self.writer

    def close_maps(self) -> None:
        if self.maps is not None:
            for each in self.maps.maps.values():
                each.close()
            self.maps = None

    def empty(self) -> Writer:
        self.close_maps()
        shutil.rmtree(self.pins, ignore_errors=True)
        return self.reopen()

    @property
    def rows(self) -> list[FrontendRow]:
        assert self.maps is not None
        return Dump(self.maps).frontends()

    def writes(self) -> dict[str, int]:
        assert self.maps is not None
        return {name: each.writes for name, each in self.maps.maps.items()}


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
    address: int | None = None,
) -> ServicePort:
    """A service port with a ClusterIP and a NodePort."""
    ip = bytes([10, 96, 0, address if address is not None else ord(name[0])])
    chosen = {*cluster, *(local or ())}
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
    )


def expected_rows(
    ports: dict[ServicePortKey, ServicePort],
) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """Frontend and scope to backends with their state, as the wanted state has it."""
    holders: dict[Backend, list[bool]] = {}
    for p in ports.values():
        uses_local = any(f.external is Policy.LOCAL for f in p.frontends)
        for b in {*p.cluster, *(p.local if uses_local else ()), *p.draining, *p.terminating}:
            holders.setdefault(b, []).append(b in p.terminating or b in p.draining)
    found = {}
    for p in ports.values():
        for f in p.frontends:
            for scope, policy in (("internal", f.internal), ("external", f.external)):
                chosen = p.cluster if policy is Policy.CLUSTER else p.local
                found[p.key.name, format_endpoint(f.address, f.port), scope] = sorted(
                    (format_endpoint(b.address, b.port), "terminating" if all(holders[b]) else "active")
                    for b in chosen
                )
    return found


def seen_rows(rows: list[FrontendRow]) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    return {
        (r.name, r.frontend.removesuffix("/TCP"), r.scope): [(b.address, b.state) for b in r.backends]
        for r in rows
    }


sets = st.lists(st.integers(1, 5), max_size=3, unique=True)
ports = st.builds(
    lambda name, cluster, local, external, leaving: port(
        name, cluster, local, external=external, leaving=tuple(leaving)
    ),
    st.sampled_from(["a", "b", "c"]),
    sets,
    sets,
    st.sampled_from(list(Policy)),
    sets,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), ports),
        st.tuples(st.just("remove"), ports),
        st.tuples(st.just("reclaim"), ports),
        st.tuples(st.just("restart"), ports),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_the_maps_hold_what_was_asked_for_after_every_change(
    bench: Bench, steps: list[tuple[str, ServicePort]]
) -> None:
    writer = bench.empty()
    wanted: dict[ServicePortKey, ServicePort] = {}
    for step, each in steps:
        if step == "set":
            wanted[each.key] = each
            assert writer.apply([each]) == []
        elif step == "remove":
            wanted.pop(each.key, None)
            writer.apply((), [each.key])
        elif step == "reclaim":
            writer.reclaim(writer.take_retired())
        else:
            writer = bench.reopen()
            before = bench.writes()
            assert writer.apply(wanted.values(), complete=True) == []
            leftovers = writer.take_retired().backends
            assert bench.writes() == before, "nothing changed, nothing is written"
            writer.reclaim(type(writer.take_retired())([], leftovers, []))
        assert seen_rows(bench.rows) == expected_rows(wanted)
    writer.apply((), list(wanted))
    writer.reclaim(writer.take_retired())
    assert bench.rows == []
    assert (writer.service_ports, writer.frontends, writer.backends) == (0, 0, 0)
    assert writer.free_slots == SMALL.slots, "every range came back"


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
