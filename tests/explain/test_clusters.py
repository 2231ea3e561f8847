"""Explanations against the maps: every case, and a thousand random clusters.

``tests.services.naive`` reads the rules a second time, and says what each kind of client has to get.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.hooks import SOCKET_HOOKS
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, pack_device
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.probe import Features
from ebpfproxy.datapath.lookup import Lookup
from ebpfproxy.datapath.programs.loader import Options
from ebpfproxy.explain.answer import Explanation, Known, explain
from ebpfproxy.explain.path import Client, Hook, Outcome, Place, Programs, Target
from ebpfproxy.kube.manifests import parse
from ebpfproxy.kube.objects import (
    RECORD_TYPES,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Resource,
    Service,
    key_of,
)
from ebpfproxy.services.model import FrontendKind, Protocol, ServicePortKey, format_address
from ebpfproxy.services.reasons import ServiceReasons
from tests.datapath.conftest import pins as pins  # noqa: PLC0414 - a fixture
from tests.datapath.writing import Bench
from tests.examples import examples
from tests.recordings import RecordTracker, changed
from tests.services import naive
from tests.services.test_cases import CASES, NODE, replaced
from tests.services.test_rules import objects, requests

pytestmark = pytest.mark.root

#: Weights of the random clusters need many slots.
ROOM = Capacity(
    services=64,
    backends=64,
    connected=16,
    unconnected=16,
    slots=1 << 20,
    conntrack=1024,
    affinity=64,
    source_ranges=64,
)
NODE_ADDRESSES = {4: ip_address("172.18.0.1").packed, 6: ip_address("fd00:172:18::1").packed}
UPLINK, POD_DEVICE = 70, 80
#: What is used of a Service is the same in all families: a client has addresses of both.
ADDRESSES = tuple(ip_address(text).packed for text in ("198.51.100.7", "2001:db8:51::7"))
OUTSIDE = Client(Place.OUTSIDE, "outside", ADDRESSES, ifindex=UPLINK)
POD = Client(Place.POD, "pod", ADDRESSES, 4711, POD_DEVICE)
WORKS_AS = {Outcome.REFUSED: "rejected", Outcome.DROPPED: "dropped"}


@pytest.fixture
def bench(pins: Path) -> Iterator[Bench]:
    made = Bench(pins)
    made.empty(ROOM)
    yield made
    made.close()


def programs(*, pod_sockets: bool) -> Programs:
    options = Options(features=Features(set_retval=True), host_netns_cookie=1, pod_sockets=pod_sockets)
    hooks = frozenset(hook.name for hook in SOCKET_HOOKS)
    return Programs(
        options, hooks, frozenset((UPLINK, POD_DEVICE)), frozenset(), lambda _: b"", lambda _: UPLINK
    )


def write(bench: Bench, tracker: RecordTracker) -> None:
    """Brings the maps to what the tracker knows, as the reconciler does."""
    assert bench.maps is not None
    tracker.drain()
    assert bench.writer.apply(tracker.service_ports(), complete=True) == []
    bench.writer.reclaim(bench.writer.take_retired())
    bench.writer.set_node_addresses(frozenset(NODE_ADDRESSES.values()))
    for ifindex, flags in ((UPLINK, DeviceFlags(0)), (POD_DEVICE, DeviceFlags.PODS | DeviceFlags.LOCAL)):
        bench.maps["devices"].update(U32.pack(ifindex), pack_device(b"", b"", flags, 1500))


def agrees(
    bench: Bench,
    tracker: RecordTracker,
    found: list[Object],
    drained: frozenset[naive.DrainRequest] = frozenset(),
) -> None:
    """Explains every frontend to three clients, and asserts that the maps and the naive rules say the same."""
    assert bench.maps is not None
    dump, tables = Dump(bench.maps), Lookup(bench.maps)

    def plain(kind: type[Object]) -> list[dict[str, Any]]:
        return [msgspec.to_builtins(each) for each in found if isinstance(each, kind)]

    def reasons(port: ServicePortKey) -> ServiceReasons | None:
        return tracker.reasons(ObjectKey(port.namespace, port.name))

    expected = naive.table(plain(Service), plain(EndpointSlice), plain(Node), NODE, drained)
    in_maps = {
        (row.frontend, row.scope): frozenset(each.address for each in row.backends)
        for row in dump.frontends()
    }
    by_socket, by_packet = (
        Known(programs(pod_sockets=sockets), tables, dump.names, reasons, time.monotonic_ns())
        for sockets in (True, False)
    )
    for (service, port, kind, scope, frontend), wanted in expected.rows.items():
        address, number, protocol = _frontend(frontend)
        target = Target(
            NODE_ADDRESSES[address.version] if kind == "NodePort" else address.packed, number, protocol
        )
        sources = tracker.service_ports()
        has_ranges = kind == str(FrontendKind.LOAD_BALANCER) and any(
            p.source_ranges is not None for p in sources if f"{p.key.namespace}/{p.key.name}" == service
        )
        asked = (
            [(OUTSIDE, by_packet, Hook.INGRESS)]
            if scope == "external"
            else [(POD, by_packet, Hook.INGRESS), (POD, by_socket, Hook.SOCKET)]
        )
        for client, known, hook in asked:
            answer = explain(client, target, known)
            if has_ranges and answer.outcome is Outcome.DROPPED and "loadBalancerSourceRanges" in answer.why:
                continue
            where = (service, port, kind, scope, frontend, str(hook))
            assert answer.service.startswith(f"{service}:"), where
            if not has_ranges and protocol is not Protocol.SCTP:
                assert answer.hook is hook, where
            used = frozenset(each.address for each in answer.endpoints if each.used)
            assert used == in_maps[frontend, scope], where
            assert (used or WORKS_AS.get(answer.outcome)) == wanted, where
            assert answer.works is bool(used), where
            says_the_same(answer)


def says_the_same(answer: Explanation) -> None:
    """The rules, which give the reasons, and the maps, which decide, do not differ."""
    assert not [note for note in answer.notes if "the maps" in note]
    assert all((each.reason == "used") is each.used for each in answer.endpoints)
    assert all(each.why for each in answer.endpoints)
    shares = sum(each.share for each in answer.endpoints)
    assert not answer.works or abs(shares - 1) < 0.01


def _frontend(text: str) -> tuple[Any, int, Protocol]:
    endpoint, _, protocol = text.rpartition("/")
    host, _, port = endpoint.rpartition(":")
    return ip_address(host.strip("[]")), int(port), Protocol[protocol]


def test_every_case_is_explained_as_the_maps_have_it(bench: Bench) -> None:
    for case in CASES:
        found = list(parse(case.read_text()))
        tracker = RecordTracker(NODE)
        for event in replaced(found):
            tracker.apply(event)
        write(bench, tracker)
        try:
            agrees(bench, tracker, found)
        except AssertionError as error:
            error.add_note(case.stem)
            raise


@settings(
    max_examples=examples(400),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(objects, min_size=1, max_size=14), requests)
def test_random_clusters_are_explained_as_the_maps_have_them(
    bench: Bench, made: list[tuple[Resource, Any]], drained: frozenset[tuple[str, int]]
) -> None:
    tracker = RecordTracker(NODE)
    cluster: dict[tuple[Resource, ObjectKey], Object] = {}
    for resource, each in made:
        record = msgspec.convert(each, RECORD_TYPES[resource])
        cluster[resource, key_of(record)] = record
        tracker.apply(changed(resource, record))
    tracker.set_drained(frozenset((ip_address(a).packed, number) for a, number in drained))
    write(bench, tracker)
    agrees(bench, tracker, list(cluster.values()), drained)


def test_a_change_of_the_maps_by_others_is_told(bench: Bench) -> None:
    """What the maps have decides; that the rules say otherwise is a note."""
    assert bench.maps is not None
    (case,) = (path for path in CASES if path.stem == "named-ports")
    tracker = RecordTracker(NODE)
    for event in replaced(list(parse(case.read_text()))):
        tracker.apply(event)
    write(bench, tracker)
    dump, tables = Dump(bench.maps), Lookup(bench.maps)
    key, entry = next(each for each in dump.entries() if each[1].kind is FrontendKind.CLUSTER_IP)
    assert key.protocol is not None
    target = Target(key.address, key.port, key.protocol)
    known = Known(
        programs(pod_sockets=True),
        tables,
        dump.names,
        lambda port: tracker.reasons(ObjectKey(port.namespace, port.name)),
        time.monotonic_ns(),
    )
    before = explain(POD, target, known)
    assert before.works and before.notes == ()
    bench.maps.selections().set_range(entry.id, 0, (0, 0))
    after = explain(POD, target, known)
    assert (after.works, after.error) == (False, "ECONNREFUSED")
    assert [
        f"the rules select {each.address}, but the maps do not have it" for each in before.endpoints
    ] == list(after.notes)
    assert format_address(key.address) in after.target
