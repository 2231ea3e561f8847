"""Reports of packet programs: the reason where a packet gets no backend, and one decision for each new flow."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet

from ebpfproxy.datapath.abi.decision_layout import Client, Decision, DecisionKind, Place, Sender, Wanted
from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.decisions import DecisionReader, Tracing, lease
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab import Lab
from tests.packets.packet_cluster import V4, FamilyAddresses, PacketCluster
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import Wire

pytestmark = pytest.mark.root

ALL = Wanted(frozenset(DecisionKind))


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    """An agent that reports decisions, bypasses netfilter and has two ports for masquerading."""
    with Lab() as lab:
        made = PacketCluster(
            lab,
            *("--trace-decisions", "--bypass-netfilter", "--masquerade-ports", "61000-61001"),
            *("--service-cidr", "10.96.0.0/16,fd00:10:96::/112"),
        )
        yield made
        made.wire.close()


@pytest.fixture
def tracing(tables: MapSet) -> Iterator[Tracing]:
    with lease(tables) as held:
        held.want(ALL)
        yield held


@pytest.fixture
def read(tables: MapSet, tracing: Tracing) -> Iterator[Callable[[], list[Decision]]]:
    """Returns the decisions since the last call, and renews the lease."""
    reader = DecisionReader(tables)
    reader.read()

    def found() -> list[Decision]:
        tracing.renew()
        return reader.read()

    yield found
    reader.close()


REFUSED, DROPPED = DecisionKind.REFUSED, DecisionKind.DROPPED


@pytest.mark.parametrize(
    ("destination", "dport", "source", "flags", "kind", "reason"),
    [
        ("empty", 80, "client", "S", REFUSED, PacketEvent.NO_ENDPOINT),
        ("web", 81, "client", "S", REFUSED, PacketEvent.NO_SUCH_PORT),
        ("web", 80, "client", "A", REFUSED, PacketEvent.NO_FLOW),
        ("elsewhere_balancer", 80, "client", "S", DROPPED, PacketEvent.NO_LOCAL_ENDPOINT),
        ("ranged_balancer", 80, "other_client", "S", DROPPED, PacketEvent.SOURCE_RANGE),
    ],
)
def test_packet_without_a_backend_is_reported_with_the_reason(
    wire: Wire,
    family: FamilyAddresses,
    port: int,
    read: Callable[[], list[Decision]],
    destination: str,
    dport: int,
    source: str,
    flags: str,
    kind: DecisionKind,
    reason: PacketEvent,
) -> None:
    client, frontend = getattr(family, source), getattr(family, destination)
    wire.ingress(family.ip(client, frontend) / segment("TCP", port, dport, flags))
    (found,) = read()
    assert (found.kind, found.reason, found.place, found.protocol) == (kind, reason, Place.INGRESS, 6)
    assert (found.frontend, found.frontend_port) == (socket.inet_pton(family.number, frontend), dport)
    assert isinstance(found.client, Sender)
    assert found.client[:2] == (socket.inet_pton(family.number, client), port)
    assert found.client.ifindex == wire.devices["eth0"][0]
    assert found.backend_id is None
    assert (found.service_id is None) == (reason is PacketEvent.NO_SUCH_PORT)


def test_packet_to_an_unallocated_address_is_reported_as_dropped(
    wire: Wire, family: FamilyAddresses, port: int, read: Callable[[], list[Decision]]
) -> None:
    unknown = "10.96.200.200" if family.version == 4 else "fd00:10:96::c8c8"
    wire.egress(family.ip(family.client, unknown) / segment("TCP", port, 80), iif="eth0")
    (found,) = read()
    assert (found.kind, found.reason, found.place) == (DROPPED, PacketEvent.NO_SUCH_SERVICE, Place.EGRESS)


def test_packet_that_is_not_rejected_because_of_the_limit_is_reported_with_its_service(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet, read: Callable[[], list[Decision]]
) -> None:
    packet = family.ip(family.client, family.empty) / segment("UDP", port, 53)
    wire.ingress(packet)
    tables["icmp_bucket"].update(U32.pack(0), U64.pack(time.monotonic_ns() + 3600 * 10**9))
    try:
        wire.ingress(packet)
    finally:
        tables["icmp_bucket"].update(U32.pack(0), U64.pack(0))
    refused, limited = read()
    assert (refused.kind, refused.reason) == (REFUSED, PacketEvent.NO_ENDPOINT)
    assert (limited.kind, limited.reason) == (DROPPED, PacketEvent.ICMP_RATE_LIMIT)
    assert limited[3:] == refused[3:]
    assert limited.service_id is not None


def test_later_fragment_without_its_first_is_reported_as_dropped(
    wire: Wire, port: int, read: Callable[[], list[Decision]]
) -> None:
    datagram = IP(src=V4.client, dst=V4.web, id=0x77) / UDP(sport=port, dport=53) / (b"x" * 1000)
    wire.ingress(fragment(datagram, 400)[1])
    (found,) = read()
    assert (found.kind, found.reason) == (DROPPED, PacketEvent.FRAGMENT)


def test_report_of_a_packet_without_ports_has_no_ports(
    wire: Wire, family: FamilyAddresses, port: int, read: Callable[[], list[Decision]]
) -> None:
    """It does not have the ports of the packet before."""
    echo = ICMP() if family.version == 4 else ICMPv6EchoRequest()
    if family.version == 4:
        later = IP(src=family.client, dst=family.web, id=0x78, frag=50, proto=17) / (b"x" * 400)
    else:
        later = (
            IPv6(src=family.client, dst=family.web)
            / IPv6ExtHdrFragment(offset=50, id=0x78, nh=17)
            / (b"x" * 400)
        )
    for packet, reason, protocol in (
        (
            family.ip(family.client, family.web) / echo,
            PacketEvent.NO_SUCH_PORT,
            1 if family.version == 4 else 58,
        ),
        (later, PacketEvent.FRAGMENT, 17),
    ):
        wire.ingress(family.ip(family.client, family.empty) / segment("TCP", port, 80))
        wire.ingress(packet)
        _, found = read()
        assert isinstance(found.client, Sender)
        assert (found.reason, found.protocol) == (reason, protocol)
        assert (found.client.port, found.frontend_port) == (0, 0)


def test_new_flow_is_one_decision_and_a_dropped_packet_another(
    wire: Wire, family: FamilyAddresses, port: int, read: Callable[[], list[Decision]]
) -> None:
    def packet(**fields: int) -> Packet:
        return family.ip(family.client, family.node, **fields) / segment("UDP", port, 30053)

    for _ in range(5):
        wire.ingress(packet())
    (found,) = read()
    assert (found.kind, found.place, found.candidates) == (DecisionKind.CHOSEN, Place.INGRESS, 1)
    assert None not in (found.service_id, found.backend_id)
    wire.ingress(packet(**{"ttl" if family.version == 4 else "hlim": 1}))
    (dropped,) = read()
    assert (dropped.kind, dropped.reason) == (DROPPED, PacketEvent.HOPS)
    assert dropped.service_id == found.service_id


def test_packet_to_a_backend_without_a_route_is_reported_as_dropped(
    cluster: PacketCluster, wire: Wire, family: FamilyAddresses, port: int, read: Callable[[], list[Decision]]
) -> None:
    packet = family.ip(family.client, family.node) / segment("UDP", port, 30053)
    wire.ingress(packet)
    (chosen,) = read()
    route = [f"-{family.version}", "route"]
    cluster.node.run(["ip", *route, "add", "unreachable", family.remote_pod])
    try:
        wire.ingress(packet)
    finally:
        cluster.node.run(["ip", *route, "delete", "unreachable", family.remote_pod])
    (dropped,) = read()
    assert (dropped.kind, dropped.reason) == (DROPPED, PacketEvent.UNROUTABLE)
    assert dropped.service_id == chosen.service_id


def test_masquerading_without_a_free_port_is_reported(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int], read: Callable[[], list[Decision]]
) -> None:
    """The agent has two ports for masquerading. Established connections keep theirs."""
    for number in range(3):
        port, to_node = new_port(), family.ip(family.client, family.node)
        seen = wire.ingress(to_node / segment("TCP", port, 30080)).packet
        if number < 2:
            answer = segment("TCP", 8080, ends_of(seen)[1], "SA")
            wire.ingress(family.ip(family.remote_pod, family.node) / answer)
            wire.ingress(to_node / segment("TCP", port, 30080, "A"))
    kinds = [each.kind for each in read()]
    assert kinds == [DecisionKind.CHOSEN] * 2 + [DecisionKind.MASQUERADE_FAILED]


def test_only_packets_of_the_requested_client_are_reported(
    wire: Wire, family: FamilyAddresses, port: int, tracing: Tracing, read: Callable[[], list[Decision]]
) -> None:
    tracing.want(ALL._replace(client=Client((socket.inet_pton(family.number, family.other_client),), 0)))
    for source in (family.client, family.other_client):
        wire.ingress(family.ip(source, family.empty) / segment("TCP", port, 80))
    (found,) = read()
    assert isinstance(found.client, Sender)
    assert found.client.address == socket.inet_pton(family.number, family.other_client)


def test_nothing_is_reported_without_a_lease(
    wire: Wire, family: FamilyAddresses, port: int, tracing: Tracing, read: Callable[[], list[Decision]]
) -> None:
    """The agent has ``--trace-decisions``, so that its programs stay those that report."""
    tracing.end()
    wire.ingress(family.ip(family.client, family.empty) / segment("TCP", port, 80))
    assert read() == []
    wire.ingress(family.ip(family.client, family.empty) / segment("TCP", port, 80))
    assert len(read()) == 1
