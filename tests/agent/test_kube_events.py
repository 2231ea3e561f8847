"""The texts of Kubernetes events, and the objects that they regard."""

from __future__ import annotations

from ebpfproxy.agent import kube_events
from ebpfproxy.datapath.services.capacity import CapacityError
from ebpfproxy.kube.events.event import Level, Reference
from ebpfproxy.kube.objects import ObjectKey, Resource
from ebpfproxy.services.model import Family, Protocol, ServicePortKey
from ebpfproxy.services.values import Warning


def _port(name: str, port: str, family: Family) -> ServicePortKey:
    return ServicePortKey("shop", name, port, Protocol.TCP, family)


def test_service_with_several_ports_over_capacity_gets_one_event() -> None:
    found = kube_events.no_room(
        "n1",
        [
            CapacityError(_port("web", "http", Family.IPV4), "no room for its slots: 7"),
            CapacityError(_port("web", "dns", Family.IPV6), "no room in services6"),
            CapacityError(_port("api", "", Family.IPV4), "no room in members"),
        ],
    )
    assert [(each.regarding.name, each.note) for each in found] == [
        ("api", "node n1: shop/api (IPv4): no room in members"),
        ("web", "node n1: shop/web:dns (IPv6): no room in services6; and 1 more of its ports"),
    ]
    assert {each.reason for each in found} == {"NoRoomForServicePort"}


def test_note_about_an_invalid_value_does_not_name_the_node() -> None:
    found = kube_events.value_not_used(
        Warning(
            Resource.ENDPOINTSLICES, ObjectKey("shop", "web-x"), "ports[0].port", "0 is not in 1 to 65535"
        )
    )
    assert found.regarding == Reference("EndpointSlice", "shop", "web-x")
    assert found.note == "EndpointSlice web-x: ports[0].port: 0 is not in 1 to 65535"
    assert not found.of_node


def test_address_conflict_has_its_own_reason() -> None:
    for field, reason in (("ClusterIP", "AddressConflict"), ("spec.clusterIPs[0]", "ValueNotUsed")):
        warning = Warning(Resource.SERVICES, ObjectKey("shop", "web"), field, "x")
        assert kube_events.value_not_used(warning).reason == reason


def test_events_of_the_node() -> None:
    for each, reason in (
        (kube_events.device_not_attached("n1", "eth0: no"), "DeviceNotAttached"),
        (kube_events.server_not_started("n1", "metrics", "x"), "FailedToStartMetricServer"),
        (kube_events.server_not_started("n1", "healthz", "x"), "FailedToStartProxierHealthcheck"),
    ):
        assert (each.regarding, each.reason) == (Reference("Node", "", "n1"), reason)
        assert (each.level, each.of_node) == (Level.WARNING, True)
