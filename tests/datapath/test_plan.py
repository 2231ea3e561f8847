"""Computation of map changes by pure functions, without maps."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from ebpfproxy.datapath.abi.flow_layout import RemovalReason
from ebpfproxy.datapath.abi.layout import Scope, ServiceEntry, ServiceFlags, ServiceKey
from ebpfproxy.datapath.services import plan
from ebpfproxy.datapath.services.absences import Absences
from ebpfproxy.datapath.services.host_sources import HostSources
from ebpfproxy.datapath.services.plan import NO_IDS, BackendSets, Change, InactiveBackends, Member, Published
from ebpfproxy.services.model import Algorithm, Frontend, FrontendKind, Policy, Prefix, Protocol, ServicePort
from tests.datapath.writing import backend, port

NODE, CLIENT = bytes([192, 0, 2, 1]), bytes([198, 51, 100, 7])
BALANCER = bytes([203, 0, 113, 1])


def no_route(address: bytes) -> tuple[bytes, ...]:
    raise AssertionError(f"the routes were asked for {address!r}")


def load_balancer(*ranges: Prefix) -> ServicePort:
    """Returns a service port with a load balancer address and these source ranges."""
    frontend = Frontend(
        FrontendKind.LOAD_BALANCER, BALANCER, 443, Protocol.TCP, Policy.CLUSTER, Policy.CLUSTER
    )
    return msgspec.structs.replace(port("a", [1]), frontends=(frontend,), source_ranges=ranges)


def test_frontend_has_an_entry_for_each_scope_with_another_policy() -> None:
    p = port("a", [1], [1], external=Policy.LOCAL, algorithm=Algorithm.MAGLEV, affinity=60)
    cluster_ip, node_port = p.frontends
    assert plan.entries_of(p, 7, no_route) == {
        ServiceKey(cluster_ip.address, 80, Protocol.TCP, Scope.INTERNAL): ServiceEntry(
            7, ServiceFlags(0), FrontendKind.CLUSTER_IP, Algorithm.MAGLEV, 60
        ),
        ServiceKey(bytes(4), node_port.port, Protocol.TCP, Scope.INTERNAL): ServiceEntry(
            7, ServiceFlags.TWO_SCOPES, FrontendKind.NODE_PORT, Algorithm.MAGLEV, 60
        ),
        ServiceKey(bytes(4), node_port.port, Protocol.TCP, Scope.EXTERNAL): ServiceEntry(
            7, ServiceFlags.TWO_SCOPES | ServiceFlags.LOCAL, FrontendKind.NODE_PORT, Algorithm.MAGLEV, 60
        ),
    }


def test_load_balancer_entry_has_the_flag_for_nodes_in_its_source_ranges() -> None:
    near, far = Prefix(bytes([192, 0, 2, 0]), 24), Prefix(bytes([198, 51, 100, 0]), 24)
    for ranges, sources, flags in (
        ((near,), (NODE,), ServiceFlags.SOURCES | ServiceFlags.HOST),
        ((far, near), (NODE,), ServiceFlags.SOURCES | ServiceFlags.HOST),
        ((far,), (NODE,), ServiceFlags.SOURCES),
        ((near,), (b"",), ServiceFlags.SOURCES),
        ((Prefix(bytes(16), 0),), (NODE,), ServiceFlags.SOURCES),
        ((near,), (), ServiceFlags.SOURCES),
    ):
        (entry,) = plan.entries_of(load_balancer(*ranges), 7, lambda _, found=sources: found).values()  # type: ignore[misc]
        assert entry.flags == flags, (ranges, sources)
    (closed,) = plan.entries_of(load_balancer(), 7, no_route).values()
    assert closed.flags == ServiceFlags.SOURCES, "ranges of the other family only permit no client"


def test_node_with_the_address_of_the_frontend_uses_its_primary_address() -> None:
    asked = []

    def route(address: bytes) -> bytes:
        asked.append(address)
        return address if address == BALANCER else NODE

    sources = HostSources(route, (NODE,))
    assert sources.towards(CLIENT) == (NODE,)
    assert sources.towards(BALANCER) == (NODE,)
    cached = sources.cached()
    assert [cached.towards(BALANCER) for _ in range(3)] == [(NODE,)] * 3
    assert asked == [CLIENT, BALANCER, BALANCER]


def test_entries_are_compared_with_those_of_all_service_ports() -> None:
    p = port("a", [1])
    wanted = plan.entries_of(p, 7, no_route)
    (cluster_ip, node_port) = wanted
    gone = ServiceKey(BALANCER, 443, Protocol.TCP, Scope.INTERNAL)
    anothers = wanted[cluster_ip]._replace(id=6)
    known = Published(7, (gone, node_port))
    change = Change()
    change.set_entries(known, wanted, {node_port: wanted[node_port], cluster_ip: anothers}.get)
    assert change.entries == {cluster_ip: wanted[cluster_ip]}
    assert change.withdrawn == [(7, gone)]
    assert set(known.entries) == {cluster_ip, node_port}


def test_members_and_source_ranges_are_differences() -> None:
    one, two = Prefix(bytes([10, 0, 0, 0]), 8), Prefix(bytes([10, 0, 0, 0]), 9)
    known = Published(7, sources=frozenset({one}), members=(frozenset({1, 2}), frozenset({1})))
    change = Change()
    change.set_members(known, (frozenset({2, 3}), NO_IDS))
    change.set_sources(known, frozenset({two}))
    assert change.members == [Member(7, 0, 3)]
    assert sorted(change.excluded) == [Member(7, 0, 1), Member(7, 1, 1)]
    assert (change.sources, change.closed) == ([(7, two)], [(7, one)])
    again = Change()
    again.set_members(known, (frozenset({2, 3}), NO_IDS))
    again.set_sources(known, frozenset({two}))
    assert again == Change()


def test_removal_of_a_service_port_removes_all_its_entries() -> None:
    key = ServiceKey(BALANCER, 443, Protocol.TCP, Scope.INTERNAL)
    prefix = Prefix(bytes(4), 0)
    known = Published(7, (key,), frozenset({prefix}), members=(frozenset({1}), NO_IDS))
    change = Change()
    change.withdraw(known)
    assert (change.withdrawn, change.closed) == ([(7, key)], [(7, prefix)])
    assert change.excluded == [Member(7, 0, 1)]


def test_slot_ranges_are_replaced_only_if_they_differ() -> None:
    change = Change()
    assert change.select(Published(7), ((0, 2), (8, 1)), [(0, 2), (16, 3)]) == [(8, 1)]
    assert change.selections == {(7, 1): (16, 3)}
    assert Change().select(Published(7), ((0, 0), (0, 0)), [(0, 2), (0, 0)]) == [], (
        "an empty range needs no slots"
    )


def test_removed_backends_are_recorded_for_flows() -> None:
    """1 is unchanged, 2 is removed, 3 becomes idle, 4 is awaited, 5 is ready again, 6 is new."""
    was = InactiveBackends(idle=frozenset({5}))
    now = InactiveBackends(idle=frozenset({3}), absent=frozenset({4}))
    change = Change()
    change.remove(Published(7, inactive=was), {1, 2, 3, 4, 5}, {1, 3, 4, 5, 6}, now, {5}.__contains__)
    (removals,) = change.removals
    assert removals.service_id == 7
    assert removals.removed == {3: RemovalReason.IDLE, 4: RemovalReason.ABSENT, 2: RemovalReason.GONE}
    assert removals.back == {5, 6}


@pytest.mark.parametrize("before", [set(), {1}], ids=["first", "later"])
def test_new_idle_backend_is_removed_only_if_it_was(before: set[int]) -> None:
    """Flows and sockets of one that was gone, or that no agent has held since its start, still have to leave it."""
    change = Change()
    idle = InactiveBackends(idle=frozenset({2}))
    change.remove(Published(7), before, {1, 2}, idle, None)
    assert change.removals == []
    change.remove(Published(7), before, {1, 2}, idle, {3}.__contains__)
    assert [each.removed for each in change.removals] == ([{}] if not before else [])
    change.removals.clear()
    change.remove(Published(7), before, {1, 2}, idle, {2}.__contains__)
    assert change.removals == [plan.Removals(7, {1} - before, {2: RemovalReason.IDLE})]


def test_only_policies_in_use_by_a_frontend_are_selected() -> None:
    p = port("a", [1, 2], [3], terminating=(3,))
    assert plan.selected_sets(p) == (p.cluster, ())
    assert plan.unused(p, plan.selected_sets(p)) == {backend(3)}
    local = port("a", [1, 2], [3], external=Policy.LOCAL, terminating=(3,))
    assert plan.selected_sets(local) == (local.cluster, local.local)
    assert plan.unused(local, plan.selected_sets(local)) == frozenset()


def test_unselected_backends_are_those_with_open_connections() -> None:
    ids = BackendSets(
        (array("Q", [1, 2]), array("Q", [2])), frozenset({3}), frozenset({2}), frozenset({4}), frozenset({5})
    )
    assert ids.unselected == {3, 4, 5}
    assert ids.members == (frozenset({1, 2}), frozenset({2}))
    wanted = map(frozenset, ({2, 3}, {4}, {5}, {6}))
    assert ids.inactive(frozenset({6})) == InactiveBackends(*wanted)


def test_removed_endpoint_is_awaited_once() -> None:
    now = [100.0]
    absences = Absences(5.0, lambda: now[0])
    a, b = port("a", []).key, port("b", []).key
    assert absences.wait_for(a, {1}) == {1}
    now[0] = 102.0
    assert absences.wait_for(a, {1, 2}) == {1, 2}
    assert absences.wait_for(b, {9}) == {9}
    assert absences.next == 105.0
    assert not absences.is_due
    now[0] = 105.0
    assert list(absences.over()) == [(a, {1})], "the wait for 1 has begun before"
    assert absences.wait_for(b, set()) == NO_IDS, "the endpoint exists again"
    now[0] = 107.0
    assert list(absences.over()) == [(a, {2})]
    assert absences.next is None
    absences.wait_for(a, {3})
    assert set(absences.forget(a)) == {3}
    now[0] = 200.0
    assert list(absences.over()) == []


def test_zero_wait_awaits_no_endpoint() -> None:
    absences = Absences(0.0, lambda: 0.0)
    assert absences.wait_for(port("a", []).key, {1}) == NO_IDS
    assert absences.next is None
