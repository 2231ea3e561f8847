"""The tracker against the naive implementation: random histories, every case, and the recordings."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.kube.manifests import parse
from ebpfproxy.kube.objects import (
    RECORD_TYPES,
    Deleted,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Resource,
    Service,
)
from ebpfproxy.services.model import Backend, Policy, format_endpoint
from tests import recordings
from tests.examples import examples
from tests.recordings import RecordTracker, changed
from tests.services import naive
from tests.services.test_cases import CASES, NODE, replaced

Json = dict[str, Any]


def agree(
    tracker: RecordTracker,
    objects: list[Object],
    node_name: str = NODE,
    requests: frozenset[naive.DrainRequest] = frozenset(),
) -> None:
    """Asserts that the tracker, when updated, equals the rules' result for objects and drain requests."""

    def plain(kind: type[Object]) -> list[Json]:
        return [msgspec.to_builtins(each) for each in objects if isinstance(each, kind)]

    def names(backends: tuple[Backend, ...]) -> frozenset[str]:
        return frozenset(format_endpoint(each.address, each.port) for each in backends)

    found = naive.Table({}, {}, {}, {}, {})
    for port in tracker.service_ports():
        key = port.key
        service = f"{key.namespace}/{key.name}"
        row = service, key.port_name, key.protocol.name, key.family.value
        found.draining[row] = names(port.draining)
        found.drained[row] = names(port.drained)
        found.weights[row] = {format_endpoint(b.address, b.port): weight for b, weight in port.weights}
        found.algorithms[row] = str(port.algorithm)
        used_by_any = {*port.cluster, *port.local}
        assert port.terminating <= used_by_any
        assert used_by_any.isdisjoint({*port.draining, *port.idle, *port.drained})
        assert len({*port.draining, *port.idle, *port.drained}) == len(
            (*port.draining, *port.idle, *port.drained)
        )
        assert list(port.drained) == sorted(port.drained)
        assert list(port.weights) == sorted(port.weights)
        assert {each for each, _ in port.weights} <= used_by_any
        for f in port.frontends:
            for scope, policy in (("internal", f.internal), ("external", f.external)):
                used = names(port.local if policy is Policy.LOCAL else port.cluster)
                frontend = f"{format_endpoint(f.address, f.port)}/{f.protocol.name}"
                refused = "dropped" if port.cluster else "rejected"
                found.rows[service, key.port_name, str(f.kind), scope, frontend] = used or refused
    expected = naive.table(plain(Service), plain(EndpointSlice), plain(Node), node_name, requests)
    for what, ours, theirs in zip(naive.Table._fields, found, expected, strict=True):
        assert ours == theirs, what


def some(*values: object) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def subset(*values: object, most: int = 2) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), max_size=most)


SERVICE_NAMES = ("a", "b", "c")
FRONTENDS_4, FRONTENDS_6 = ("10.96.0.1", "10.96.0.2"), ("fd00:96::1", "fd00:96::2")
BAD_ADDRESSES = ("10.96.0.300", "::ffff:10.96.0.1", "127.0.0.1", "fe80::1")

weight_parts = st.one_of(
    st.builds(
        lambda key, weight: f"{key}={weight}",
        some("10.244.0.1", "10.244.0.2", "fd00:244::1", f"node/{NODE}", "node/node-b", "zone/z1", "*"),
        some(0, 0, 1, 2, 65535),
    ),
    some("10.244.0.1=-1", "10.244.0.1=65536", "node/=0", "pod/p=0", "*", "*=0=0", "10.244.0.01=0"),
)
SLICE_LABELS = (
    {"service.kubernetes.io/headless": ""},
    {"service.kubernetes.io/service-proxy-name": "other"},
)
services = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {
                "name": some(*SERVICE_NAMES),
                "namespace": st.just("shop"),
                "creationTimestamp": some("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
                "labels": some(
                    {},
                    {},
                    {"service.kubernetes.io/headless": ""},
                    {"service.kubernetes.io/service-proxy-name": "other"},
                ),
                "annotations": st.fixed_dictionaries(
                    {},
                    optional={
                        "ebpfproxy.io/lb-algorithm": some("rr", "maglev", " WLC ", "lblc", "best", ""),
                        "ebpfproxy.io/weights": st.lists(weight_parts, max_size=4).map(", ".join),
                    },
                ),
            }
        ),
        "spec": st.fixed_dictionaries(
            {
                "type": some("ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName"),
                "clusterIPs": st.one_of(
                    subset(*FRONTENDS_4, *FRONTENDS_6, most=3), some(["None"], ["10.96.0.300"], ["10.96.0.1"])
                ),
                "externalIPs": subset(*FRONTENDS_4, *FRONTENDS_6, *BAD_ADDRESSES, "192.0.2.1"),
                "ports": st.lists(
                    st.fixed_dictionaries(
                        {
                            "name": some("http", "dns"),
                            "port": some(80, 53, 53, 0, 70000),
                            "protocol": some("TCP", "TCP", "UDP", "DCCP"),
                            "nodePort": some(0, 30080, 30081, 70000),
                        }
                    ),
                    max_size=3,
                ),
                "internalTrafficPolicy": some("Cluster", "Local", None),
                "externalTrafficPolicy": some("Cluster", "Local", None),
            }
        ),
        "status": st.fixed_dictionaries(
            {
                "loadBalancer": st.fixed_dictionaries(
                    {
                        "ingress": st.lists(
                            st.fixed_dictionaries(
                                {
                                    "ip": some("203.0.113.1", "fd00:b::1", "bad"),
                                    "ipMode": some(None, "VIP", "Proxy"),
                                }
                            ),
                            max_size=2,
                        )
                    }
                )
            }
        ),
    }
)

hints = st.fixed_dictionaries(
    {
        "forZones": subset("z1", "z2").map(lambda names: [{"name": n} for n in names]),
        "forNodes": subset(NODE, "node-b").map(lambda names: [{"name": n} for n in names]),
    }
)
slices = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {
                "name": some("s1", "s2", "s3", "s4"),
                "namespace": st.just("shop"),
                "labels": st.one_of(
                    some(*SERVICE_NAMES).map(lambda name: {"kubernetes.io/service-name": name}),
                    some({}, *({"kubernetes.io/service-name": "a", **label} for label in SLICE_LABELS)),
                ),
            }
        ),
        "addressType": some("IPv4", "IPv4", "IPv4", "IPv6", "FQDN"),
        "ports": st.lists(
            st.fixed_dictionaries(
                {
                    "name": some("http", "dns"),
                    "port": some(8080, 8080, 8081, None, 0),
                    "protocol": some("TCP", None, "UDP", "DCCP"),
                }
            ),
            max_size=2,
        ),
        "endpoints": st.lists(
            st.fixed_dictionaries(
                {
                    "addresses": st.one_of(
                        some("10.244.0.1", "10.244.0.2", "10.244.0.3", "fd00:244::1").map(lambda a: [a]),
                        some([], ["10.244.0.300"], ["::ffff:10.0.0.1"], ["0.0.0.0"]),
                    ),
                    "conditions": st.fixed_dictionaries(
                        {name: some(None, True, False) for name in ("ready", "serving", "terminating")}
                    ),
                    "nodeName": some(NODE, "node-b", None),
                    "zone": some("z1", "z2", None),
                    "hints": st.one_of(st.none(), hints),
                }
            ),
            max_size=4,
        ),
    }
)
nodes = some("z1", "z2", "").map(
    lambda zone: {"metadata": {"name": NODE, "labels": {"topology.kubernetes.io/zone": zone}}}
)

KINDS = {Resource.SERVICES: services, Resource.ENDPOINTSLICES: slices, Resource.NODES: nodes}
objects = st.one_of(
    *(st.tuples(st.just(resource), strategy) for resource, strategy in KINDS.items()),
    st.tuples(st.just(Resource.ENDPOINTSLICES), slices),
)
requests = st.frozensets(
    st.tuples(some("10.244.0.1", "10.244.0.2", "fd00:244::1", "10.244.0.9"), some(0, 8080, 8081)), max_size=2
)
histories = st.lists(
    st.tuples(some("set", "set", "set", "delete", "drain"), objects, requests, st.booleans()), max_size=14
)


@settings(max_examples=examples(300))
@given(histories)
def test_any_history_ends_with_the_result_of_the_rules(
    history: list[tuple[str, tuple[Resource, Json], frozenset[naive.DrainRequest], bool]],
) -> None:
    tracker = RecordTracker(NODE)
    stored: dict[tuple[Resource, ObjectKey], Object] = {}
    drained = frozenset[naive.DrainRequest]()
    for step, (resource, each), requests, look in history:
        key = ObjectKey(each["metadata"].get("namespace", ""), each["metadata"]["name"])
        if step == "set":
            record = msgspec.convert(each, RECORD_TYPES[resource])
            stored[resource, key] = record
            tracker.apply(changed(resource, record))
        elif step == "delete":
            stored.pop((resource, key), None)
            tracker.apply(Deleted(resource, key))
        else:
            drained = requests
            tracker.set_drained(frozenset((ip_address(a).packed, number) for a, number in drained))
        if look:
            tracker.drain()
            agree(tracker, list(stored.values()), requests=drained)
    tracker.drain()
    agree(tracker, list(stored.values()), requests=drained)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_rules_give_the_expected_result_of_the_case(case: Any) -> None:
    found = list(parse(case.read_text()))
    tracker = RecordTracker(NODE)
    for event in replaced(found):
        tracker.apply(event)
    tracker.drain()
    agree(tracker, found)


@pytest.mark.parametrize("node", ["node-a1", "node-a2", "node-b1", "node-unknown"])
def test_rules_give_the_result_of_the_recordings(node: str) -> None:
    first = recordings.as_events(recordings.lists("initial"))
    stored, tracker = recordings.StoredObjects(first), RecordTracker(node)
    for each in first:
        tracker.apply(each)
    for number, event in enumerate(recordings.watch_events()):
        stored.apply(event)
        tracker.apply(event)
        if number % 10 == 0:
            tracker.drain()
            found = [o for kept in stored.objects.values() for o in kept.values()]
            agree(tracker, [o for o in found if isinstance(o, Object)], node)
