"""The tracker: any interleaving of events ends where a fresh start with the same objects would."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.objects import (
    Deleted,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Resource,
    Service,
    key_of,
)
from ebpfproxy.services.model import ServicePort, ServicePortKey
from tests.recordings import RecordTracker, changed, replaced

NODE = "node-a"


def service(name: str, **spec: object) -> Service:
    body = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}], **spec}
    meta = {"name": name, "namespace": "shop", "creationTimestamp": f"2026-11-20T10:00:0{len(name)}Z"}
    return msgspec.convert({"metadata": meta, "spec": body}, Service)


def piece(
    name: str, of: str, *addresses: str, trigger: str | None = None, **endpoint: object
) -> EndpointSlice:
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": trigger} if trigger else {}
    return msgspec.convert(
        {
            "metadata": {
                "name": name,
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": of},
                "annotations": annotations,
            },
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [a], **endpoint} for a in addresses],
        },
        EndpointSlice,
    )


def node(zone: str) -> Node:
    labels = {"topology.kubernetes.io/zone": zone}
    return msgspec.convert({"metadata": {"name": NODE, "labels": labels}}, Node)


def synced(*objects: Object) -> RecordTracker:
    tracker = RecordTracker(NODE)
    for resource, kind in (
        (Resource.SERVICES, Service),
        (Resource.ENDPOINTSLICES, EndpointSlice),
        (Resource.NODES, Node),
    ):
        tracker.apply(replaced(resource, [o for o in objects if isinstance(o, kind)]))
    tracker.drain()
    return tracker


def resource_of(each: Object) -> Resource:
    if isinstance(each, Service):
        return Resource.SERVICES
    return Resource.NODES if isinstance(each, Node) else Resource.ENDPOINTSLICES


addresses = st.lists(st.integers(1, 6).map(lambda n: f"10.244.0.{n}"), max_size=4)
objects = st.one_of(
    st.builds(
        service,
        st.sampled_from(["a", "bb", "ccc"]),
        clusterIP=st.sampled_from(["10.96.0.1", "10.96.0.2", "None", "broken"]),
        internalTrafficPolicy=st.sampled_from(["Cluster", "Local"]),
        externalIPs=st.lists(st.sampled_from(["192.0.2.1", "192.0.2.2"]), max_size=2),
    ),
    st.builds(
        lambda name, of, found, ready, zones, on: piece(
            name,
            of,
            *found,
            nodeName=on,
            conditions={"ready": ready, "serving": True, "terminating": not ready},
            hints={"forZones": [{"name": zone} for zone in zones]},
        ),
        st.sampled_from(["s1", "s2", "s3"]),
        st.sampled_from(["a", "bb", "ccc"]),
        addresses,
        st.booleans(),
        st.lists(st.sampled_from(["z1", "z2"]), max_size=2),
        st.sampled_from([NODE, "node-b"]),
    ),
    st.builds(node, st.sampled_from(["z1", "z2"])),
)
steps = st.lists(st.tuples(st.sampled_from(["set", "set", "set", "delete", "drain"]), objects), max_size=30)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_incremental_equals_from_scratch(steps: list[tuple[str, Object]]) -> None:
    tracker = synced()
    world: dict[tuple[Resource, ObjectKey], Object] = {}
    mirror: dict[ServicePortKey, ServicePort] = {}
    for step, each in [*steps, ("drain", node("z1"))]:
        key = resource_of(each), key_of(each)
        if step == "set":
            world[key] = each
            tracker.apply(changed(key[0], each))
        elif step == "delete":
            world.pop(key, None)
            tracker.apply(Deleted(*key))
        else:
            update = tracker.drain()
            mirror.update({port.key: port for port in update.changed})
            for gone in update.removed:
                del mirror[gone]
    fresh = synced(*world.values())
    assert tracker.service_ports() == fresh.service_ports()
    assert sorted(mirror.values(), key=lambda p: p.key) == fresh.service_ports()


def test_many_events_for_one_service_are_one_change() -> None:
    tracker = synced(service("a"))
    for n in range(1, 50):
        tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", f"10.244.0.{n}")))
    update = tracker.drain()
    assert [port.cluster[0].address[3] for port in update.changed] == [49]
    assert update.endpoint_changes == 49


def test_an_endpoint_change_touches_its_service_only() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "bb", "10.244.0.1")))
    assert [port.key.name for port in tracker.drain().changed] == ["bb"]


def test_an_event_that_changes_nothing_is_no_change() -> None:
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1"))
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.1")))
    assert not tracker.pending


def test_warnings_are_given_once_while_they_last() -> None:
    tracker = synced(service("a"))
    bad = changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.300", "10.244.0.1"))
    tracker.apply(bad)
    first = tracker.drain().warnings
    assert [w.field for w in first] == ["endpoints[0].addresses[0]"]
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.300", "10.244.0.2")))
    assert tracker.drain().warnings == ()
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.2")))
    tracker.apply(bad)
    assert tracker.drain().warnings == first, "it was gone and came back"


def test_when_the_owner_of_an_address_goes_the_next_one_gets_it() -> None:
    tracker = synced(service("a"), service("bb"))
    assert [p.key.name for p in tracker.service_ports()] == ["a"]
    tracker.apply(Deleted(Resource.SERVICES, ObjectKey("shop", "a")))
    update = tracker.drain()
    assert [p.key.name for p in update.changed] == ["bb"]
    assert [key.name for key in update.removed] == ["a"]


def test_objects_of_a_list_that_cannot_be_read_keep_their_last_state() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    unreadable = frozenset({ObjectKey("shop", "a")})
    tracker.apply(replaced(Resource.SERVICES, [service("bb", clusterIP="10.96.0.2")], unreadable))
    assert not tracker.pending


def test_another_zone_computes_every_service_again() -> None:
    one, other = ({"forZones": [{"name": zone}]} for zone in ("z1", "z2"))
    slices = piece("s1", "a", "10.244.0.1", hints=one), piece("s2", "a", "10.244.0.2", hints=other)
    tracker = synced(service("a"), *slices, node("z1"))
    assert [b.address[3] for b in tracker.service_ports()[0].cluster] == [1]
    tracker.apply(changed(Resource.NODES, node("z2")))
    assert [b.address[3] for b in tracker.drain().changed[0].cluster] == [2]


def test_trigger_times_and_receipt_of_changes_come_with_the_update() -> None:
    tracker = synced(service("a"))
    triggered = piece("s1", "a", "10.244.0.1", trigger="2026-11-20T10:00:00.5Z")
    tracker.apply(changed(Resource.ENDPOINTSLICES, triggered, received=7.0))
    update = tracker.drain()
    assert update.triggers == (1795168800.5,)
    assert update.received == (7.0,)


def test_slices_that_change_nothing_leave_no_trace() -> None:
    """Neither another trigger for the same endpoints, nor slices of no Service, nor the end of an unknown one."""
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1"))
    same = piece("s1", "a", "10.244.0.1", trigger="2026-11-20T10:00:00Z")
    meta = msgspec.structs.replace(same.metadata, name="s2", labels=None)
    tracker.apply(changed(Resource.ENDPOINTSLICES, same, received=7.0))
    tracker.apply(
        changed(Resource.ENDPOINTSLICES, msgspec.structs.replace(same, metadata=meta), received=7.0)
    )
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s3"), received=7.0))
    assert not tracker.pending
    assert tracker.pending_changes == (0, 0)
    update = tracker.drain()
    assert (update.received, update.triggers) == ((), ())


def test_a_deleted_slice_takes_the_trigger_times_of_its_service_along() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    for name, of, second in (("s1", "a", 1), ("s2", "bb", 2)):
        triggered = piece(name, of, "10.244.0.1", trigger=f"2026-11-20T10:00:0{second}Z")
        tracker.apply(changed(Resource.ENDPOINTSLICES, triggered))
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s1"), received=5.0))
    update = tracker.drain()
    assert update.triggers == (1795168802.0,)
    assert update.received == (0.0, 0.0, 5.0)


def test_three_slices_with_one_address_count_alike_in_any_order() -> None:
    slices = [
        piece(
            "s1",
            "a",
            "10.244.0.1",
            nodeName=NODE,
            conditions={"ready": False, "serving": True, "terminating": True},
        ),
        piece("s2", "a", "10.244.0.1", nodeName="node-b"),
        piece("s3", "a", "10.244.0.1", nodeName="node-b", hints={"forZones": [{"name": "z2"}]}),
        piece("s4", "a", "10.244.0.2", nodeName="node-b", hints={"forZones": [{"name": "z1"}]}),
    ]
    found = {
        tuple(synced(service("a"), node("z1"), *order).service_ports())
        for order in itertools.permutations(slices)
    }
    assert len(found) == 1


def test_five_thousand_endpoints_in_fifty_slices() -> None:
    slices = [
        piece(f"s{i}", "a", *(f"10.{i}.{n // 250}.{n % 250 + 1}" for n in range(100))) for i in range(50)
    ]
    tracker = synced(service("a"), *slices)
    assert len(tracker.service_ports()[0].cluster) == 5000
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s7")))
    assert len(tracker.drain().changed[0].cluster) == 4900


def test_events_that_change_nothing_leave_no_trace() -> None:
    """A Node's heartbeats go on for ever: they are neither pending nor measured."""
    tracker = synced(service("a"), node("z1"))
    for _ in range(3):
        tracker.apply(changed(Resource.NODES, node("z1"), received=7.0))
    assert not tracker.pending
    tracker.apply(changed(Resource.SERVICES, service("a", clusterIP="10.96.0.7"), received=8.0))
    assert tracker.drain().received == (8.0,)
