"""The tracker: any interleaving of events gives the result of a fresh start with the same objects."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from ipaddress import ip_address

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.kube.objects import (
    Deleted,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Replaced,
    Resource,
    Service,
    ServiceCidr,
    ServiceCidrMeta,
    ServiceCidrSpec,
    ServiceLabels,
    ServiceMeta,
    ServiceSpec,
    key_of,
)
from ebpfproxy.services.model import Backend, Prefix, ServicePort, ServicePortKey
from tests.examples import examples
from tests.recordings import RecordTracker, changed, replaced

NODE = "node-a"


def service(name: str, *, weights: str | None = None, **spec: object) -> Service:
    body = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}], **spec}
    meta = {
        "name": name,
        "namespace": "shop",
        "creationTimestamp": f"2026-11-20T10:00:0{len(name)}Z",
        "annotations": {"ebpfproxy.io/weights": weights} if weights is not None else {},
    }
    return msgspec.convert({"metadata": meta, "spec": body}, Service)


def piece(
    name: str,
    of: str,
    *addresses: str,
    trigger: str | None = None,
    ports: tuple[int, ...] = (8080,),
    family: str = "IPv4",
    **endpoint: object,
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
            "addressType": family,
            "ports": [{"name": "http", "port": port, "protocol": "TCP"} for port in ports],
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


def drain_by_hand(tracker: RecordTracker, *requests: tuple[str, int]) -> None:
    """Sets all drain requests; port 0 stands for all ports."""
    tracker.set_drained(frozenset((ip_address(address).packed, port) for address, port in requests))


def ends(backends: Iterable[Backend]) -> list[tuple[int, int]]:
    """Returns the last byte of the address, and the port."""
    return [(each.address[-1], each.port) for each in backends]


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
        weights=st.sampled_from([None, None, "10.244.0.1=0", f"node/{NODE}=0 *=2"]),
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
requests = st.frozensets(
    st.tuples(st.integers(1, 6).map(lambda n: bytes((10, 244, 0, n))), st.sampled_from([0, 8080, 8081])),
    max_size=2,
)
steps = st.lists(
    st.tuples(st.sampled_from(["set", "set", "set", "delete", "request", "drain"]), objects, requests),
    max_size=30,
)


@settings(max_examples=examples(200))
@given(steps)
def test_incremental_equals_from_scratch(
    steps: list[tuple[str, Object, frozenset[tuple[bytes, int]]]],
) -> None:
    tracker = synced()
    stored: dict[tuple[Resource, ObjectKey], Object] = {}
    mirror: dict[ServicePortKey, ServicePort] = {}
    drained = frozenset[tuple[bytes, int]]()
    for step, each, requests in [*steps, ("drain", node("z1"), drained)]:
        key = resource_of(each), key_of(each)
        if step == "set":
            stored[key] = each
            tracker.apply(changed(key[0], each))
        elif step == "delete":
            stored.pop(key, None)
            tracker.apply(Deleted(*key))
        elif step == "request":
            drained = requests
            tracker.set_drained(drained)
        else:
            update = tracker.drain()
            mirror.update({port.key: port for port in update.changed})
            for gone in update.removed:
                del mirror[gone]
    fresh = synced()
    fresh.set_drained(drained)
    for each in stored.values():
        fresh.apply(changed(resource_of(each), each))
    fresh.drain()
    assert tracker.service_ports() == fresh.service_ports()
    assert sorted(mirror.values(), key=lambda p: p.key) == fresh.service_ports()


def test_many_events_for_one_service_are_one_change() -> None:
    tracker = synced(service("a"))
    for n in range(1, 50):
        tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", f"10.244.0.{n}")))
    update = tracker.drain()
    assert [port.cluster[0].address[3] for port in update.changed] == [49]
    assert update.endpoint_changes == 49


def test_endpoint_change_affects_its_service_only() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "bb", "10.244.0.1")))
    assert [port.key.name for port in tracker.drain().changed] == ["bb"]


def test_event_without_effect_is_no_change() -> None:
    tracker = synced(service("a"), piece("s1", "a", "10.244.0.1"))
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.1")))
    assert not tracker.pending


def test_warning_is_reported_once_while_its_cause_persists() -> None:
    tracker = synced(service("a"))
    bad = changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.300", "10.244.0.1"))
    tracker.apply(bad)
    first = tracker.drain().warnings
    assert [w.field for w in first] == ["endpoints[0].addresses[0]"]
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.300", "10.244.0.2")))
    assert tracker.drain().warnings == ()
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s1", "a", "10.244.0.2")))
    tracker.apply(bad)
    assert tracker.drain().warnings == first, "the cause was gone and returned"


def test_address_of_a_deleted_service_goes_to_the_next_claimant() -> None:
    tracker = synced(service("a"), service("bb"))
    assert [p.key.name for p in tracker.service_ports()] == ["a"]
    tracker.apply(Deleted(Resource.SERVICES, ObjectKey("shop", "a")))
    update = tracker.drain()
    assert [p.key.name for p in update.changed] == ["bb"]
    assert [key.name for key in update.removed] == ["a"]


def test_undecodable_objects_of_a_list_keep_their_last_state() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    unreadable = frozenset({ObjectKey("shop", "a")})
    tracker.apply(replaced(Resource.SERVICES, [service("bb", clusterIP="10.96.0.2")], unreadable))
    assert not tracker.pending


def test_changed_zone_of_the_node_recomputes_every_service() -> None:
    one, other = ({"forZones": [{"name": zone}]} for zone in ("z1", "z2"))
    slices = piece("s1", "a", "10.244.0.1", hints=one), piece("s2", "a", "10.244.0.2", hints=other)
    tracker = synced(service("a"), *slices, node("z1"))
    assert [b.address[3] for b in tracker.service_ports()[0].cluster] == [1]
    tracker.apply(changed(Resource.NODES, node("z2")))
    assert [b.address[3] for b in tracker.drain().changed[0].cluster] == [2]


def test_update_has_trigger_times_and_time_of_receipt() -> None:
    tracker = synced(service("a"))
    triggered = piece("s1", "a", "10.244.0.1", trigger="2026-11-20T10:00:00.5Z")
    tracker.apply(changed(Resource.ENDPOINTSLICES, triggered, received=7.0))
    update = tracker.drain()
    assert update.triggers == (1795168800.5,)
    assert update.received == (7.0,)


def test_slices_without_effect_are_not_pending() -> None:
    """They are a new trigger for the same endpoints, a slice without a Service, and deletion of an unknown one."""
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


def test_deleted_slice_removes_the_trigger_times_of_its_service() -> None:
    tracker = synced(service("a"), service("bb", clusterIP="10.96.0.2"))
    for name, of, second in (("s1", "a", 1), ("s2", "bb", 2)):
        triggered = piece(name, of, "10.244.0.1", trigger=f"2026-11-20T10:00:0{second}Z")
        tracker.apply(changed(Resource.ENDPOINTSLICES, triggered))
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s1"), received=5.0))
    update = tracker.drain()
    assert update.triggers == (1795168802.0,)
    assert update.received == (0.0, 0.0, 5.0)


def test_three_slices_with_one_address_give_the_same_result_in_any_order() -> None:
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


def test_events_without_effect_are_not_pending() -> None:
    """Heartbeats of a Node are neither pending nor measured."""
    tracker = synced(service("a"), node("z1"))
    for _ in range(3):
        tracker.apply(changed(Resource.NODES, node("z1"), received=7.0))
    assert not tracker.pending
    tracker.apply(changed(Resource.SERVICES, service("a", clusterIP="10.96.0.7"), received=8.0))
    assert tracker.drain().received == (8.0,)


def test_endpoint_exists_until_it_is_removed_from_its_slice() -> None:
    """It exists ready or not, drained or not, in any Service: a drain request holds until it is gone."""
    idle = {"ready": False, "serving": False, "terminating": False}
    tracker = synced(
        service("a"),
        piece("s1", "a", "10.244.0.1", ports=(8080, 8081)),
        piece("s2", "a", "10.244.0.2", conditions=idle),
        piece("s3", "unknown", "10.244.0.3"),
        piece("s4", "a", "fd00:244::1", family="IPv6"),
    )

    def there(address: str, port: int) -> bool:
        return tracker.has_endpoint(ip_address(address).packed, port)

    drain_by_hand(tracker, ("10.244.0.1", 0))
    for address in ("10.244.0.1", "10.244.0.2", "10.244.0.3", "fd00:244::1"):
        assert there(address, 0)
        assert there(address, 8080)
        assert there(address, 8081) == (address == "10.244.0.1")
        assert not there(address, 9)
    assert not there("10.244.0.4", 0)
    assert not there("fd00:244::2", 8080)
    tracker.apply(Deleted(Resource.ENDPOINTSLICES, ObjectKey("shop", "s1")))
    assert not there("10.244.0.1", 0)
    tracker.apply(changed(Resource.ENDPOINTSLICES, piece("s2", "a", "10.244.0.1", ports=(8081,))))
    assert there("10.244.0.1", 8081)
    assert not there("10.244.0.1", 8080)


def test_service_cidrs_and_addresses_of_other_proxies_are_known_after_their_lists() -> None:
    """The start does not wait for them; an invalid range is reported and the others are used."""
    tracker = RecordTracker(NODE)
    for resource in (Resource.SERVICES, Resource.ENDPOINTSLICES, Resource.NODES):
        tracker.apply(Replaced(resource, {}))
    assert tracker.synced
    assert tracker.service_cidrs is None
    cidr = ServiceCidr(
        metadata=ServiceCidrMeta(name="kubernetes"),
        spec=ServiceCidrSpec(cidrs=("10.96.0.0/012", "fd00::/108", "ten")),
    )
    tracker.apply(replaced(Resource.SERVICECIDRS, [cidr]))
    assert tracker.service_cidrs == (
        Prefix(bytes([10, 96, 0, 0]), 12),
        Prefix(bytes.fromhex("fd00") + bytes(14), 108),
    )
    assert [str(w) for w in tracker.drain().warnings] == [
        "servicecidrs kubernetes: spec.cidrs[2]: 'ten' is not a CIDR"
    ]
    tracker.apply(Replaced(Resource.SERVICECIDRS, {}))
    assert tracker.service_cidrs == ()
    meta = ServiceMeta(name="mesh", namespace="shop", labels=ServiceLabels(proxy_name="other"))
    spec = ServiceSpec(cluster_ip="10.96.0.7", cluster_ips=("10.96.0.7", "fd00::7"))
    tracker.apply(changed(Resource.SERVICES, Service(metadata=meta, spec=spec)))
    assert tracker.of_other_proxies == {bytes([10, 96, 0, 7]), bytes.fromhex("fd00") + bytes(13) + b"\7"}
    assert tracker.drain().changed == ()
    tracker.apply(Deleted(Resource.SERVICES, ObjectKey("shop", "mesh")))
    assert tracker.of_other_proxies == frozenset()
