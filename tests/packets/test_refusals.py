"""Packets that are refused, dropped by rule, or answered by the node itself."""

from __future__ import annotations

import pytest
from scapy.all import Ether, raw
from scapy.layers.inet import ICMP, TCP, UDP, IPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, IPerror6
from scapy.layers.sctp import SCTP, SCTPChunkHeartbeatReq

from tests.packets.test_flows import PAYLOAD, ends, segment
from tests.packets.wire import DROP, PASS, REDIRECT, Result, Wire, ip_of, with_right_checksums
from tests.packets.world import PORTS, Side

pytestmark = pytest.mark.root


def answered(
    wire: Wire, result: Result, side: Side, frontend: str, client: str, device: str = "eth0"
) -> Ether:
    """It goes back to the device it came from, to the sender's MAC, with right checksums."""
    assert result.verdict == REDIRECT
    out = result.packet
    assert (out.dst, out.src) == ("02:00:00:00:00:99", wire.mac(device))
    assert (ip_of(out).src, ip_of(out).dst) == (frontend, client)
    assert with_right_checksums(out) == result.bytes
    return out


@pytest.mark.parametrize("where", ["empty", "node"])
def test_no_endpoint_resets_a_syn(wire: Wire, side: Side, port: int, where: str) -> None:
    frontend, dport = getattr(side, where), 80 if where == "empty" else 30500
    result = wire.arrive(side.ip(side.client, frontend) / TCP(sport=port, dport=dport, flags="S", seq=77))
    tcp = answered(wire, result, side, frontend, side.client)[TCP]
    assert (tcp.sport, tcp.dport, str(tcp.flags), tcp.seq, tcp.ack) == (dport, port, "RA", 0, 78)


def test_no_endpoint_resets_a_later_segment_at_its_own_sequence(wire: Wire, side: Side, port: int) -> None:
    packet = side.ip(side.client, side.empty) / TCP(sport=port, dport=80, flags="PA", seq=5, ack=99) / PAYLOAD
    tcp = answered(wire, wire.arrive(packet), side, side.empty, side.client)[TCP]
    assert (str(tcp.flags), tcp.seq, bytes(tcp.payload)) == ("R", 99, b"")


def test_a_syn_with_data_is_acknowledged_whole_by_the_reset(wire: Wire, side: Side, port: int) -> None:
    """TCP Fast Open: the reset covers the data, too (RFC 9293, 3.10.7.1)."""
    packet = side.ip(side.client, side.empty) / TCP(sport=port, dport=80, flags="S", seq=1) / PAYLOAD
    assert answered(wire, wire.arrive(packet), side, side.empty, side.client)[TCP].ack == 2 + len(PAYLOAD)


def test_a_reset_is_not_answered(wire: Wire, side: Side, port: int) -> None:
    assert (
        wire.arrive(side.ip(side.client, side.empty) / TCP(sport=port, dport=80, flags="R")).verdict == DROP
    )


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
@pytest.mark.parametrize("size", [0, 16, 1000])
def test_no_endpoint_makes_a_port_unreachable_with_the_datagram_inside(
    wire: Wire, side: Side, port: int, protocol: str, size: int
) -> None:
    packet = side.ip(side.client, side.empty) / segment(
        protocol, port, PORTS[protocol][0], payload=b"x" * size
    )
    before = raw(packet)
    result = wire.arrive(packet)
    out = answered(wire, result, side, side.empty, side.client)
    if side.version == 4:
        assert (out[ICMP].type, out[ICMP].code) == (3, 3)
        quoted = result.bytes[14 + 20 + 8 :]
        assert out[IPerror].dst == side.empty
    else:
        assert (out[ICMPv6DestUnreach].type, out[ICMPv6DestUnreach].code) == (1, 4)
        quoted = result.bytes[14 + 40 + 8 :]
        assert out[IPerror6].dst == side.empty
    assert before.startswith(quoted)
    assert len(quoted) == min(len(before), 128)


def test_no_endpoint_for_a_pod_is_told_through_its_own_device(wire: Wire, side: Side, port: int) -> None:
    result = wire.arrive(side.ip(side.client_pod, side.empty) / segment("TCP", port, 80), "p2")
    assert str(answered(wire, result, side, side.empty, side.client_pod, "p2")[TCP].flags) == "RA"


def test_no_endpoint_for_the_host_comes_back_as_if_from_the_wire(wire: Wire, side: Side, port: int) -> None:
    frame = Ether(src=wire.mac("eth0"), dst="02:00:00:00:00:99") / side.ip(side.node, side.empty)
    result = wire.send("to_device", "eth0", frame / segment("TCP", port, 80))
    assert result.verdict == REDIRECT
    assert (result.packet.dst, result.packet.src) == (wire.mac("eth0"), "02:00:00:00:00:99")
    assert ends(result.packet) == (side.empty, 80, side.node, port)


@pytest.mark.parametrize("protocol", PORTS)
def test_a_port_that_a_cluster_ip_does_not_have_is_rejected(
    wire: Wire, side: Side, port: int, protocol: str
) -> None:
    result = wire.arrive(side.ip(side.client, side.web) / segment(protocol, port, 9999))
    out = answered(wire, result, side, side.web, side.client)
    assert (TCP in out) == (protocol == "TCP")


def test_a_ping_to_a_cluster_ip_is_rejected(wire: Wire, side: Side) -> None:
    echo = ICMP() if side.version == 4 else ICMPv6EchoRequest()
    result = wire.arrive(side.ip(side.client, side.web) / echo / PAYLOAD)
    assert (ICMPv6DestUnreach if side.version == 6 else IPerror) in answered(
        wire, result, side, side.web, side.client
    )


def test_an_icmp_error_is_never_answered_by_another(wire: Wire, side: Side) -> None:
    inner = side.ip(side.web, side.client) / UDP(sport=1, dport=2) / PAYLOAD
    error = ICMP(type=3, code=3) if side.version == 4 else ICMPv6DestUnreach(code=4)
    packet = side.ip(side.client, side.web) / error / inner
    assert wire.arrive(packet).verdict == PASS


def test_a_ping_to_the_node_itself_is_the_hosts(wire: Wire, side: Side) -> None:
    echo = ICMP() if side.version == 4 else ICMPv6EchoRequest()
    packet = side.ip(side.client, side.node) / echo / PAYLOAD
    before = raw(packet)
    result = wire.arrive(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_an_address_of_the_service_cidr_that_no_service_has_is_dropped_where_it_leaves(
    wire: Wire, side: Side, port: int
) -> None:
    unknown = "10.96.200.200" if side.version == 4 else "fd00:10:96::c8c8"
    echo = (ICMP() if side.version == 4 else ICMPv6EchoRequest()) / PAYLOAD
    for payload in (segment("TCP", port, 80), segment("UDP", port, 53), segment("SCTP", port, 3868), echo):
        coming = side.ip(side.client, unknown) / payload
        assert wire.arrive(coming).verdict == PASS, "another proxy's rules in netfilter see it first"
        assert wire.leave(coming, came_by="eth0").verdict == DROP, "of a client outside"
        assert wire.leave(coming, came_by="p2").verdict == DROP, "of a pod"
        assert wire.leave(side.ip(side.node, unknown) / payload).verdict == DROP, "of this host"
        assert wire.leave(side.ip(side.node, unknown) / payload, "p1").verdict == PASS, "to a pod that has it"


def test_policy_local_without_an_endpoint_here_is_dropped(wire: Wire, side: Side, port: int) -> None:
    for destination, dport in ((side.elsewhere_balancer, 80), (side.node, 30300)):
        result = wire.arrive(side.ip(side.client, destination) / segment("TCP", port, dport))
        assert result.verdict == DROP


def test_source_ranges_let_in_whom_they_name(wire: Wire, side: Side, port: int) -> None:
    packet = side.ip(side.client, side.ranged_balancer) / segment("TCP", port, 80)
    assert ends(wire.arrive(packet).packet)[2:] == (side.remote_pod, 8080)


def test_source_ranges_drop_everybody_else(wire: Wire, side: Side, port: int) -> None:
    assert (
        wire.arrive(side.ip(side.stranger, side.ranged_balancer) / segment("TCP", port, 80)).verdict == DROP
    )
    result = wire.arrive(side.ip(side.client_pod, side.ranged_balancer) / segment("TCP", port, 80), "p2")
    assert result.verdict == DROP, "pods, too"
    host = wire.leave(side.ip(side.node, side.ranged_balancer) / segment("TCP", port, 80))
    assert host.verdict == DROP, "and the node itself"


def test_source_ranges_are_for_load_balancers_addresses_only(wire: Wire, side: Side, port: int) -> None:
    packet = side.ip(side.stranger, side.node) / segment("TCP", port, 30400)
    assert ends(wire.arrive(packet).packet)[2:] == (side.remote_pod, 8080)


@pytest.mark.parametrize(
    ("version", "source"),
    [(4, "127.0.0.1"), (4, "0.1.2.3"), (4, "224.0.0.5"), (4, "255.255.255.255"), (6, "::1"), (6, "ff02::1")],
)
def test_martian_sources_are_not_translated(
    wire: Wire, side: Side, port: int, version: int, source: str
) -> None:
    if side.version != version:
        pytest.skip("the other family")
    packet = side.ip(source, side.web) / segment("TCP", port, 80)
    before = raw(packet)
    result = wire.arrive(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_a_node_port_answers_at_an_address_of_the_node_that_is_not_an_uplinks(
    wire: Wire, side: Side, port: int
) -> None:
    """The mode is unset: as with kube-proxy's iptables mode, every local address has the NodePorts."""
    result = wire.arrive(side.ip(side.client_pod, side.node_on_pods) / segment("TCP", port, 30080), "p2")
    assert result.verdict == PASS
    assert result.packet.payload.dst == side.remote_pod


@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA", "R", "RA", "SR"])
def test_a_segment_that_opens_nothing_is_the_nodes_own_on_its_address(
    wire: Wire, side: Side, port: int, flags: str
) -> None:
    """It may answer a connection of the node itself, from the number that a Service has as NodePort."""
    for packet in (
        side.ip(side.stranger, side.node) / segment("TCP", port, 30080, flags),
        side.ip(side.stranger, side.node) / segment("TCP", port, 30500, flags),
    ):
        before = raw(packet)
        result = wire.arrive(packet)
        assert (result.verdict, result.bytes[14:]) == (PASS, before)


@pytest.mark.parametrize("frontend", ["web", "web_external", "web_balancer"])
def test_a_segment_of_no_connection_to_a_service_is_reset(
    wire: Wire, side: Side, port: int, frontend: str
) -> None:
    """It must not be routed on; the reset is as a backend's would be, and answers no reset."""
    address = getattr(side, frontend)
    for flags in ("A", "SA", "PA", "FA"):
        result = wire.arrive(side.ip(side.client, address) / segment("TCP", port, 80, flags))
        tcp = answered(wire, result, side, address, side.client)[TCP]
        assert (str(tcp.flags), tcp.seq) == ("R", 2000)
    assert wire.arrive(side.ip(side.client, address) / segment("TCP", port, 80, "R")).verdict == DROP


def test_no_association_begins_with_data(wire: Wire, side: Side, port: int) -> None:
    """As in netfilter's conntrack: a chunk of no association opens none."""
    data = segment("SCTP", port, 30868, "A")
    before = raw(side.ip(side.client, side.node) / data)
    result = wire.arrive(side.ip(side.client, side.node) / data)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)
    stray = wire.arrive(side.ip(side.client, side.web) / segment("SCTP", port, 3868, "A"))
    answered(wire, stray, side, side.web, side.client)


def test_a_heartbeat_takes_an_association_up_again(wire: Wire, side: Side, port: int) -> None:
    """As in netfilter's conntrack: an association outlives the loss of its flow, here of one backend."""
    beat = SCTP(sport=port, dport=3868, tag=7) / SCTPChunkHeartbeatReq()
    result = wire.arrive(side.ip(side.client, side.web) / beat)
    assert (result.verdict, ends(result.packet)[3]) == (PASS, PORTS["SCTP"][2])
    again = wire.arrive(side.ip(side.client, side.web) / segment("SCTP", port, 3868, "A"))
    assert (again.verdict, ends(again.packet)) == (PASS, ends(result.packet))


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
def test_answers_to_the_nodes_own_flow_are_not_translated(
    wire: Wire, side: Side, port: int, protocol: str
) -> None:
    """Seen leaving from a frontend's address and port, the flow is the node's; other ends are not."""
    node_port = PORTS[protocol][1]
    out = side.ip(side.node, side.stranger) / segment(protocol, node_port, port)
    before = raw(out)
    for came_by in ("", "p1"):
        result = wire.leave(out, came_by=came_by)
        assert (result.verdict, result.bytes[14:]) == (PASS, before)
    answer = side.ip(side.stranger, side.node) / segment(protocol, port, node_port)
    before = raw(answer)
    result = wire.arrive(answer)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)
    client = wire.arrive(side.ip(side.client, side.node) / segment(protocol, port, node_port))
    assert ends(client.packet)[2:] == (side.remote_pod, PORTS[protocol][2])
