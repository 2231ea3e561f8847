"""The reasons for each endpoint: they say what the rules decided, for every case and for random clusters."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfproxy.kube.manifests import parse
from ebpfproxy.kube.objects import RECORD_TYPES, ObjectKey, Resource
from ebpfproxy.services.model import Backend, Policy, ServicePort, format_address, format_endpoint
from ebpfproxy.services.reasons import EndpointReason, Reason, ServiceReasons
from tests.examples import examples
from tests.recordings import RecordTracker, changed
from tests.services.test_cases import CASES, NODE, replaced
from tests.services.test_rules import objects, requests


def names(backends: tuple[Backend, ...] | frozenset[Backend]) -> set[str]:
    return {format_endpoint(each.address, each.port) for each in backends}


def explains(found: ServiceReasons, port: ServicePort) -> None:
    """Asserts that the reasons for a port's endpoints are the result that the datapath gets."""
    key = port.key
    (reasons,) = (
        each
        for each in found.ports
        if (each.port_name, each.protocol, each.family)
        == (key.port_name, key.protocol.name, key.family.value)
    )
    by_policy = {
        policy: {
            reason: {each.address for each in reasons.endpoints if each.under(policy) is reason}
            for reason in Reason
        }
        for policy in Policy
    }
    assert by_policy[Policy.CLUSTER][Reason.USED] == names(port.cluster)
    assert by_policy[Policy.LOCAL][Reason.USED] == names(port.local)
    for found_by in by_policy.values():
        assert found_by[Reason.NOT_READY] == names(port.idle)
        assert found_by[Reason.DRAINED] | found_by[Reason.WEIGHT_ZERO] == names(port.drained)
        assert found_by[Reason.TERMINATING] <= names(port.draining) | names(port.terminating)
    weights = {each.address: each.weight for each in reasons.endpoints if each.weight != 1}
    assert {format_endpoint(b.address, b.port): weight for b, weight in port.weights} == {
        address: weight
        for address, weight in weights.items()
        if address in names((*port.cluster, *port.local))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_reasons_of_a_case_are_its_result(case: Path) -> None:
    tracker = RecordTracker(NODE)
    for event in replaced(list(parse(case.read_text()))):
        tracker.apply(event)
    tracker.drain()
    for port in tracker.service_ports():
        reasons = tracker.reasons(ObjectKey(port.key.namespace, port.key.name))
        assert reasons is not None
        explains(reasons, port)


@settings(max_examples=examples(300))
@given(st.lists(objects, max_size=12), requests)
def test_reasons_of_a_random_cluster_are_its_result(
    found: list[tuple[Resource, Any]], drained: frozenset[tuple[str, int]]
) -> None:
    tracker = RecordTracker(NODE)
    for resource, each in found:
        tracker.apply(changed(resource, msgspec.convert(each, RECORD_TYPES[resource])))
    tracker.set_drained(frozenset((ip_address(address).packed, number) for address, number in drained))
    tracker.drain()
    for port in tracker.service_ports():
        reasons = tracker.reasons(ObjectKey(port.key.namespace, port.key.name))
        assert reasons is not None
        explains(reasons, port)


def reasons_of_case(name: str) -> dict[str, tuple[str, Reason, Reason]]:
    """State and reasons by address, of the Service shop/web in a case."""
    (case,) = (path for path in CASES if path.stem == name)
    tracker = RecordTracker(NODE)
    for event in replaced(list(parse(case.read_text()))):
        tracker.apply(event)
    found = tracker.reasons(ObjectKey("shop", "web"))
    assert found is not None
    return {each.address: (each.state, each.cluster, each.local) for p in found.ports for each in p.endpoints}


def test_endpoints_are_left_out_by_the_rule_that_did_it() -> None:
    used, elsewhere = Reason.USED, Reason.OTHER_NODE
    assert reasons_of_case("zone-hints") == {
        "10.244.1.2:8080": ("ready", used, used),
        "10.244.2.2:8080": ("ready", Reason.ZONE_HINTS, elsewhere),
    }
    assert Reason.NODE_HINTS in {cluster for _, cluster, _ in reasons_of_case("node-hints").values()}
    assert Reason.WEIGHT_ZERO in {cluster for _, cluster, _ in reasons_of_case("weight-zero").values()}
    assert {state for state, *_ in reasons_of_case("not-ready").values()} == {"ready", "not ready"}
    assert Reason.TERMINATING in {cluster for _, cluster, _ in reasons_of_case("terminating-drains").values()}


def test_a_service_without_frontends_says_why() -> None:
    said = {}
    for name in ("headless", "external-name", "other-proxy", "no-cluster-ip-yet"):
        (case,) = (path for path in CASES if path.stem == name)
        tracker = RecordTracker(NODE)
        for event in replaced(list(parse(case.read_text()))):
            tracker.apply(event)
        found = tracker.reasons(ObjectKey("shop", "web"))
        assert found is not None and found.ports == ()
        said[name] = found.unserved
    assert said["headless"] == "headless: clusterIP None"
    assert said["external-name"] == "type ExternalName"
    assert "another proxy" in said["other-proxy"]
    assert said["no-cluster-ip-yet"] == "no cluster IP yet"


def of_one_endpoint(endpoint: dict[str, object]) -> EndpointReason:
    """An endpoint of a slice that lacks the Service's port."""
    service = {
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIPs": ["10.96.0.1"], "ports": [{"name": "http", "port": 80}]},
    }
    piece = {
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "web", "port": 8080}],
        "endpoints": [{"addresses": ["10.244.0.1"], **endpoint}],
    }
    tracker = RecordTracker(NODE)
    for resource, each in ((Resource.SERVICES, service), (Resource.ENDPOINTSLICES, piece)):
        tracker.apply(changed(resource, msgspec.convert(each, RECORD_TYPES[resource])))
    found = tracker.reasons(ObjectKey("shop", "web"))
    assert found is not None
    (reason,) = found.ports[0].endpoints
    return reason


def test_an_endpoint_whose_slice_lacks_the_port_is_named_without_one() -> None:
    endpoint = of_one_endpoint({"targetRef": {"kind": "Pod", "name": "web-7f"}})
    assert (endpoint.address, endpoint.cluster) == (format_address(bytes([10, 244, 0, 1])), Reason.NO_PORT)
    assert endpoint.pod == "shop/web-7f"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "a\x9bb", "\n"])
def test_a_name_that_no_pod_can_have_is_none(name: str) -> None:
    """The API server takes any name there, and agents of all nodes get it."""
    assert of_one_endpoint({"targetRef": {"kind": "Pod", "name": name}}).pod == ""
