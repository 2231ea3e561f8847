"""Endpoints that are drained, by request or by weight, as the tracker follows it."""

from __future__ import annotations

import itertools

from ebpfproxy.kube.objects import (
    Deleted,
    EndpointSlice,
    ObjectKey,
    Resource,
)
from tests.recordings import changed
from tests.services.test_tracker import NODE, drain_by_hand, ends, piece, service, synced


def test_drained_address_changes_its_services_only() -> None:
    tracker = synced(
        service("a"),
        service("bb", clusterIP="10.96.0.2"),
        service("ccc", clusterIP="10.96.0.3"),
        piece("s1", "a", "10.244.0.1", "10.244.0.2"),
        piece("s2", "bb", "10.244.0.2", "10.244.0.3"),
        piece("s3", "ccc", "10.244.0.3"),
    )
    before = tracker.service_ports()
    drain_by_hand(tracker, ("10.244.0.2", 0))
    assert tracker.pending
    update = tracker.drain()
    assert [
        (port.key.name, ends(port.cluster), ends(port.drained))
        for port in sorted(update.changed, key=lambda port: port.key)
    ] == [("a", [(1, 8080)], [(2, 8080)]), ("bb", [(3, 8080)], [(2, 8080)])]
    assert update.removed == ()
    assert (update.service_changes, update.endpoint_changes) == (0, 0), "no API event caused this"
    drain_by_hand(tracker)
    assert [port.key.name for port in tracker.drain().changed] == ["a", "bb"]
    assert tracker.service_ports() == before, "the request was removed"


def test_repeated_drain_requests_and_those_for_unknown_addresses_change_nothing() -> None:
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1", "10.244.0.2"))
    drain_by_hand(tracker, ("10.244.0.9", 0))
    assert not tracker.pending
    drain_by_hand(tracker, ("10.244.0.9", 0), ("10.244.0.1", 0))
    tracker.drain()
    drain_by_hand(tracker, ("10.244.0.1", 0), ("10.244.0.9", 0))
    assert not tracker.pending
    drain_by_hand(tracker, ("10.244.0.1", 0))
    assert not tracker.pending
    drain_by_hand(tracker, ("10.244.0.1", 0), ("10.244.0.1", 8080))
    assert tracker.drain().changed == (), "the address is drained already"


def test_drain_of_one_port_or_all_ports_of_an_address() -> None:
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1", "10.244.0.2", ports=(8080, 8081)))
    every = [(1, 8080), (1, 8081), (2, 8080), (2, 8081)]
    for requests, drained in (
        ([("10.244.0.1", 8080)], [(1, 8080)]),
        ([("10.244.0.1", 8081), ("10.244.0.2", 8080)], [(1, 8081), (2, 8080)]),
        ([("10.244.0.1", 9)], []),
        ([("10.244.0.1", 0)], [(1, 8080), (1, 8081)]),
        ([("10.244.0.1", 0), ("10.244.0.2", 0)], every),
    ):
        drain_by_hand(tracker, *requests)
        tracker.drain()
        (port,) = tracker.service_ports()
        assert ends(port.drained) == drained
        assert ends(port.cluster) == [each for each in every if each not in drained]


def test_drain_request_applies_to_a_later_endpoint() -> None:
    tracker = synced(service("a"))
    drain_by_hand(tracker, ("10.244.0.1", 0))
    assert not tracker.pending
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.1", "10.244.0.2")))
    (port,) = tracker.drain().changed
    assert (ends(port.cluster), ends(port.drained)) == ([(2, 8080)], [(1, 8080)])


def test_ipv6_address_is_drained() -> None:
    tracker = synced(
        service("a", clusterIP="fd00:96::1"),
        piece("s1", "a", "fd00:244::1", "fd00:244::2", family="IPv6"),
    )
    drain_by_hand(tracker, ("fd00:244::1", 8080), ("10.244.0.2", 0))
    (port,) = tracker.drain().changed
    assert (ends(port.cluster), ends(port.drained)) == ([(2, 8080)], [(1, 8080)])


def leaving(name: str, *addresses: str) -> EndpointSlice:
    conditions = {"ready": False, "serving": True, "terminating": True}
    return piece(name, "a", *addresses, conditions=conditions, nodeName=NODE)


def test_drained_endpoint_that_terminates_stays_drained_until_removed() -> None:
    """It is neither draining nor used as a last resort, so that no endpoint is in two sets."""
    ready = piece("s1", "a", "10.244.0.1", nodeName=NODE)
    tracker = synced(service("a"), ready, leaving("s2", "10.244.0.2", "10.244.0.3"))
    assert ends(tracker.service_ports()[0].draining) == [(2, 8080), (3, 8080)]
    drain_by_hand(tracker, ("10.244.0.2", 0))
    (port,) = tracker.drain().changed
    assert (ends(port.draining), ends(port.drained)) == ([(3, 8080)], [(2, 8080)])
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s1")))
    (port,) = tracker.drain().changed
    assert (ends(port.cluster), ends(port.local)) == ([(3, 8080)], [(3, 8080)])
    assert (ends(port.terminating), ends(port.drained)) == ([(3, 8080)], [(2, 8080)])
    drain_by_hand(tracker, ("10.244.0.2", 0), ("10.244.0.3", 0))
    (port,) = tracker.drain().changed
    assert (port.cluster, port.local, port.draining, port.terminating) == ((), (), (), frozenset())
    assert ends(port.drained) == [(2, 8080), (3, 8080)]
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s2")))
    (port,) = tracker.drain().changed
    assert port.drained == ()


def test_drained_endpoint_that_is_not_ready_is_in_no_set() -> None:
    """It cannot serve; once it can, it is drained."""
    idle = {"ready": False, "serving": False, "terminating": False}
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1", conditions=idle))
    drain_by_hand(tracker, ("10.244.0.1", 0))
    assert tracker.drain().changed == ()
    assert ends(tracker.service_ports()[0].idle) == [(1, 8080)]
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.1")))
    (port,) = tracker.drain().changed
    assert (port.cluster, port.idle, ends(port.drained)) == ((), (), [(1, 8080)])


def test_drain_by_request_and_by_weight_are_independent() -> None:
    tracker = synced(service("a", weights="10.244.0.1=0"), piece("s1", "a", "10.244.0.1", "10.244.0.2"))
    for requests in ([("10.244.0.1", 0)], []):
        drain_by_hand(tracker, *requests)
        assert tracker.drain().changed == ()
        assert ends(tracker.service_ports()[0].drained) == [(1, 8080)]
    drain_by_hand(tracker, ("10.244.0.1", 0))
    tracker.apply(changed(Resource.SERVICES, service("a")))
    assert tracker.drain().changed == ()
    drain_by_hand(tracker)
    (port,) = tracker.drain().changed
    assert (ends(port.cluster), port.drained) == ([(1, 8080), (2, 8080)], ())


def test_changed_weights_change_their_service() -> None:
    tracker = synced(service("a", weights="*=2"), piece("s1", "a", "10.244.0.1"))
    (port,) = tracker.service_ports()
    assert [weight for _, weight in port.weights] == [2]
    for weights, expected in (("*=3", [3]), ("*=1", []), ("10.244.0.1=2", [2]), (None, [])):
        tracker.apply(changed(Resource.SERVICES, service("a", weights=weights)))
        (port,) = tracker.drain().changed
        assert [weight for _, weight in port.weights] == expected
    tracker.apply(changed(Resource.SERVICES, service("a", weights="*=1")))
    assert tracker.drain().changed == (), "the same weights, spelled differently"


def test_node_and_zone_of_an_endpoint_affect_its_weight() -> None:
    """A changed slice has the same address on another node or in another zone."""
    tracker = synced(
        service("a", weights="node/node-b=2 zone/z2=3"),
        piece("s1", "a", "10.244.0.1", nodeName=NODE, zone="z1"),
    )
    for on, zone, expected in (("node-b", "z1", [2]), ("node-b", "z2", []), ("node-c", "z2", [3])):
        moved = piece("s1", "a", "10.244.0.1", nodeName=on, zone=zone)
        tracker.apply(changed(Resource.ENDPOINTSLICES, moved))
        found = tracker.drain().changed
        assert [weight for port in found for _, weight in port.weights] == expected


def test_weight_of_an_address_in_several_slices_does_not_depend_on_order() -> None:
    """Its node is one; until all slices agree, the same slice counts on every node."""
    slices = [
        piece("s1", "a", "10.244.0.1", nodeName="node-b", zone="z1"),
        piece("s2", "a", "10.244.0.1", nodeName="node-c", zone="z1"),
        piece("s3", "a", "10.244.0.1", nodeName="node-c", zone="z2"),
        piece("s4", "a", "10.244.0.1"),
    ]
    for weights in ("node/node-b=2 node/node-c=3", "zone/z1=2 zone/z2=3", "node/node-b=0 node/node-c=2"):
        found = {
            tuple(synced(service("a", weights=weights), *order).service_ports())
            for order in itertools.permutations(slices)
        }
        assert len(found) == 1


def test_health_checks_do_not_count_drained_endpoints() -> None:
    """A load balancer must not send to a node that would drop the traffic."""
    balancer = service(
        "a",
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=32000,
        ports=[{"name": "http", "port": 80, "nodePort": 30080}],
    )
    tracker = synced(balancer, piece("s1", "a", "10.244.0.1", "10.244.0.2", nodeName=NODE))
    for requests, count in (
        ([], 2),
        ([("10.244.0.1", 0)], 1),
        ([("10.244.0.1", 0), ("10.244.0.2", 8080)], 0),
        ([], 2),
    ):
        drain_by_hand(tracker, *requests)
        tracker.drain()
        assert [check.local_endpoints for check in tracker.health_checks] == [count]
