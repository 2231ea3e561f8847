"""While flows of other maps are copied to these, a segment of a connection that may come is dropped, not rejected."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, with_device_flags
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import segment
from tests.packets.wire import DROP, PASS, Wire, ip_of

pytestmark = pytest.mark.root

_NODE = U32.pack(0)
_, NODE_PORT, TARGET = PORTS["TCP"]
#: The first can stand for a client, the second is one of the host's own.
MASQUERADE_PORT, OTHER_PORT = 1500, 64999


@pytest.fixture
def flows_migrate(tables: MapSet) -> Iterator[None]:
    node = tables["devices"].lookup(_NODE)
    assert node is not None
    tables["devices"].update(_NODE, with_device_flags(node, DeviceFlags.MIGRATING_FLOWS))
    yield
    tables["devices"].update(_NODE, node)


def _to_frontends(wire: Wire, family: FamilyAddresses, port: int, flags: str) -> list[int]:
    ends = ((family.node, NODE_PORT), (family.web_balancer, 80), (family.web, 80))
    return [
        wire.ingress(family.ip(family.client, address) / TCP(sport=port, dport=dport, flags=flags)).verdict
        for address, dport in ends
    ]


def _to_the_node(wire: Wire, family: FamilyAddresses, source: str, port: int, protocol: str = "TCP") -> int:
    target = PORTS[protocol][2]
    return wire.ingress(family.ip(source, family.node) / segment(protocol, target, port, "A")).verdict


@pytest.mark.parametrize("flags", ["A", "PA", "FA", "R", "SA"])
def test_segments_of_unknown_connections_wait_for_their_flow(
    wire: Wire, family: FamilyAddresses, port: int, flows_migrate: None, flags: str
) -> None:
    """The client's are not rejected, and the host does not reset the backend's; both are sent again."""
    assert _to_frontends(wire, family, port, flags) == [DROP] * 3
    assert _to_the_node(wire, family, family.remote_pod, MASQUERADE_PORT) == DROP


def test_else_they_are_rejected_or_the_hosts(wire: Wire, family: FamilyAddresses, port: int) -> None:
    to_the_node, *to_others = _to_frontends(wire, family, port, "A")
    assert to_the_node == PASS
    assert DROP not in to_others
    assert _to_the_node(wire, family, family.remote_pod, MASQUERADE_PORT) == PASS


def test_connections_begin_meanwhile(
    wire: Wire, family: FamilyAddresses, port: int, flows_migrate: None
) -> None:
    opening = family.ip(family.client, family.node) / TCP(sport=port, dport=NODE_PORT, flags="S")
    result = wire.ingress(opening)
    assert (result.verdict, ip_of(result.packet).dst) == (PASS, family.remote_pod)
    opening[TCP].flags = "A"
    assert wire.ingress(opening).verdict == PASS


def test_what_no_masqueraded_client_can_have_passes(
    wire: Wire, family: FamilyAddresses, flows_migrate: None
) -> None:
    """The host's own connections, others' segments, and datagrams, which nobody sends again."""
    assert _to_the_node(wire, family, family.remote_pod, OTHER_PORT) == PASS
    assert _to_the_node(wire, family, family.client, MASQUERADE_PORT) == PASS
    assert _to_the_node(wire, family, family.remote_pod, MASQUERADE_PORT, "UDP") == PASS
