"""Packets that are rejected, dropped, or passed to the host."""

from __future__ import annotations

import pytest
from scapy.compat import raw
from scapy.layers.inet import ICMP, TCP, UDP, IPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPerror6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkHeartbeatReq

from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of, segment
from tests.packets.wire import DROP, PASS, REDIRECT, Result, Wire, ip_of, with_right_checksums

pytestmark = pytest.mark.root


def assert_rejected(
    wire: Wire, result: Result, family: FamilyAddresses, frontend: str, client: str, device: str = "eth0"
) -> Ether:
    """Asserts a reply of the frontend through the ingress device to the sender's MAC address."""
    assert result.verdict == REDIRECT
    out = result.packet
    assert (out.dst, out.src) == ("02:00:00:00:00:99", wire.mac(device))
    assert (ip_of(out).src, ip_of(out).dst) == (frontend, client)
    assert with_right_checksums(out) == result.bytes
    return out


@pytest.mark.parametrize("where", ["empty", "node"])
def test_no_endpoint_resets_a_syn(wire: Wire, family: FamilyAddresses, port: int, where: str) -> None:
    frontend, dport = getattr(family, where), 80 if where == "empty" else 30500
    result = wire.ingress(
        family.ip(family.client, frontend) / TCP(sport=port, dport=dport, flags="S", seq=77)
    )
    tcp = assert_rejected(wire, result, family, frontend, family.client)[TCP]
    assert (tcp.sport, tcp.dport, str(tcp.flags), tcp.seq, tcp.ack) == (dport, port, "RA", 0, 78)


def test_no_endpoint_resets_a_non_syn_segment_at_its_acknowledgement_number(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    packet = (
        family.ip(family.client, family.empty)
        / TCP(sport=port, dport=80, flags="PA", seq=5, ack=99)
        / PAYLOAD
    )
    tcp = assert_rejected(wire, wire.ingress(packet), family, family.empty, family.client)[TCP]
    assert (str(tcp.flags), tcp.seq, bytes(tcp.payload)) == ("R", 99, b"")


def test_rst_acknowledges_the_syn_and_its_data(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """With TCP Fast Open a SYN has data, which the RST acknowledges, too (RFC 9293, 3.10.7.1)."""
    packet = family.ip(family.client, family.empty) / TCP(sport=port, dport=80, flags="S", seq=1) / PAYLOAD
    assert assert_rejected(wire, wire.ingress(packet), family, family.empty, family.client)[
        TCP
    ].ack == 2 + len(PAYLOAD)


def test_rst_without_a_flow_is_dropped_without_a_reply(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    assert (
        wire.ingress(family.ip(family.client, family.empty) / TCP(sport=port, dport=80, flags="R")).verdict
        == DROP
    )


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
def test_host_packet_that_is_too_big_for_the_way_to_the_backend_gets_an_icmp_error(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str
) -> None:
    """The kernel knows the way to the frontend. The error has the MTU of the way to the backend, and quotes the packet
    as the socket has sent it."""
    header = 20 if family.version == 4 else 40
    packet = family.ip(family.node, family.web)
    fits, mtu = b"x" * (1400 - header - {"TCP": 20, "UDP": 8, "SCTP": 12 + 16}[protocol]), 1400
    node = wire.node
    node.run(
        [
            "ip",
            "route",
            "add",
            family.remote_pod,
            "via",
            family.node_b,
            "dev",
            "eth0",
            "mtu",
            "lock",
            str(mtu),
        ]
    )
    try:
        for payload, flags in ((b"", "S"), (fits, "A")):
            made = packet / segment(protocol, port, PORTS[protocol][0], flags, payload=payload)
            assert ends_of(wire.egress(made).packet)[2] == family.remote_pod
        made = packet / segment(protocol, port, PORTS[protocol][0], "A", payload=fits + b"x" * 4)
        result = wire.egress(made)
        assert result.verdict == REDIRECT
        out = result.packet
        assert (ip_of(out).src, ip_of(out).dst) == (family.web, family.node)
        assert with_right_checksums(out) == result.bytes
        if family.version == 4:
            error = out[ICMP]
            assert (error.type, error.code, error.nexthopmtu) == (3, 4, mtu)
        else:
            error = out[ICMPv6PacketTooBig]
            assert (error.code, error.mtu) == (0, mtu)
        quoted = bytes(error.payload)
        assert raw(made).startswith(quoted[: header + 8])
    finally:
        node.run(["ip", "route", "del", family.remote_pod])


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
@pytest.mark.parametrize("size", [0, 16, 1000])
def test_no_endpoint_sends_icmp_port_unreachable_that_quotes_the_datagram(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str, size: int
) -> None:
    packet = family.ip(family.client, family.empty) / segment(
        protocol, port, PORTS[protocol][0], payload=b"x" * size
    )
    before = raw(packet)
    result = wire.ingress(packet)
    out = assert_rejected(wire, result, family, family.empty, family.client)
    if family.version == 4:
        assert (out[ICMP].type, out[ICMP].code) == (3, 3)
        quoted = result.bytes[14 + 20 + 8 :]
        assert out[IPerror].dst == family.empty
    else:
        assert (out[ICMPv6DestUnreach].type, out[ICMPv6DestUnreach].code) == (1, 4)
        quoted = result.bytes[14 + 40 + 8 :]
        assert out[IPerror6].dst == family.empty
    assert before.startswith(quoted)
    assert len(quoted) == min(len(before), 128)


def test_no_endpoint_resets_a_pod_client_through_its_own_device(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    result = wire.ingress(family.ip(family.client_pod, family.empty) / segment("TCP", port, 80), "p2")
    assert (
        str(assert_rejected(wire, result, family, family.empty, family.client_pod, "p2")[TCP].flags) == "RA"
    )


def test_no_endpoint_resets_a_host_client_by_redirect_to_ingress(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    frame = Ether(src=wire.mac("eth0"), dst="02:00:00:00:00:99") / family.ip(family.node, family.empty)
    result = wire.send("to_device", "eth0", frame / segment("TCP", port, 80))
    assert result.verdict == REDIRECT
    assert (result.packet.dst, result.packet.src) == (wire.mac("eth0"), "02:00:00:00:00:99")
    assert ends_of(result.packet) == (family.empty, 80, family.node, port)


@pytest.mark.parametrize("protocol", PORTS)
def test_unknown_port_of_a_cluster_ip_is_rejected(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str
) -> None:
    result = wire.ingress(family.ip(family.client, family.web) / segment(protocol, port, 9999))
    out = assert_rejected(wire, result, family, family.web, family.client)
    assert (TCP in out) == (protocol == "TCP")


def test_icmp_echo_to_a_cluster_ip_is_rejected(wire: Wire, family: FamilyAddresses) -> None:
    echo = ICMP() if family.version == 4 else ICMPv6EchoRequest()
    result = wire.ingress(family.ip(family.client, family.web) / echo / PAYLOAD)
    assert (ICMPv6DestUnreach if family.version == 6 else IPerror) in assert_rejected(
        wire, result, family, family.web, family.client
    )


def test_icmp_error_is_not_rejected_with_an_icmp_error(wire: Wire, family: FamilyAddresses) -> None:
    inner = family.ip(family.web, family.client) / UDP(sport=1, dport=2) / PAYLOAD
    error = ICMP(type=3, code=3) if family.version == 4 else ICMPv6DestUnreach(code=4)
    packet = family.ip(family.client, family.web) / error / inner
    assert wire.ingress(packet).verdict == PASS


def test_icmp_echo_to_the_node_is_passed_to_the_host(wire: Wire, family: FamilyAddresses) -> None:
    echo = ICMP() if family.version == 4 else ICMPv6EchoRequest()
    packet = family.ip(family.client, family.node) / echo / PAYLOAD
    before = raw(packet)
    result = wire.ingress(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_unallocated_address_of_the_service_cidr_is_dropped_at_egress(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    unknown = "10.96.200.200" if family.version == 4 else "fd00:10:96::c8c8"
    echo = (ICMP() if family.version == 4 else ICMPv6EchoRequest()) / PAYLOAD
    for payload in (segment("TCP", port, 80), segment("UDP", port, 53), segment("SCTP", port, 3868), echo):
        packet = family.ip(family.client, unknown) / payload
        assert wire.ingress(packet).verdict == PASS, "netfilter rules of another proxy see it first"
        assert wire.egress(packet, iif="eth0").verdict == DROP, "from an external client"
        assert wire.egress(packet, iif="p2").verdict == DROP, "from a pod"
        assert wire.egress(family.ip(family.node, unknown) / payload).verdict == DROP, "from this host"
        assert wire.egress(family.ip(family.node, unknown) / payload, "p1").verdict == PASS, (
            "to a pod that has this address"
        )


def test_external_traffic_policy_local_without_a_local_endpoint_drops(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    for destination, dport in ((family.elsewhere_balancer, 80), (family.node, 30300)):
        result = wire.ingress(family.ip(family.client, destination) / segment("TCP", port, dport))
        assert result.verdict == DROP


def test_source_ranges_allow_listed_sources(wire: Wire, family: FamilyAddresses, port: int) -> None:
    packet = family.ip(family.client, family.ranged_balancer) / segment("TCP", port, 80)
    assert ends_of(wire.ingress(packet).packet)[2:] == (family.remote_pod, 8080)


def test_source_ranges_drop_other_sources(wire: Wire, family: FamilyAddresses, port: int) -> None:
    assert (
        wire.ingress(
            family.ip(family.other_client, family.ranged_balancer) / segment("TCP", port, 80)
        ).verdict
        == DROP
    )
    result = wire.ingress(
        family.ip(family.client_pod, family.ranged_balancer) / segment("TCP", port, 80), "p2"
    )
    assert result.verdict == DROP, "from a pod"
    host = wire.egress(family.ip(family.node, family.ranged_balancer) / segment("TCP", port, 80))
    assert host.verdict == DROP, "from the node itself"


def test_source_ranges_do_not_apply_to_node_ports(wire: Wire, family: FamilyAddresses, port: int) -> None:
    packet = family.ip(family.other_client, family.node) / segment("TCP", port, 30400)
    assert ends_of(wire.ingress(packet).packet)[2:] == (family.remote_pod, 8080)


@pytest.mark.parametrize(
    ("version", "source"),
    [(4, "127.0.0.1"), (4, "0.1.2.3"), (4, "224.0.0.5"), (4, "255.255.255.255"), (6, "::1"), (6, "ff02::1")],
)
def test_martian_sources_are_not_translated(
    wire: Wire, family: FamilyAddresses, port: int, version: int, source: str
) -> None:
    if family.version != version:
        pytest.skip("an address of the other family")
    packet = family.ip(source, family.web) / segment("TCP", port, 80)
    before = raw(packet)
    result = wire.ingress(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_node_port_is_served_at_a_local_address_that_is_not_an_uplinks(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """With mode unset NodePorts are served at every local address, as in kube-proxy's iptables mode."""
    result = wire.ingress(
        family.ip(family.client_pod, family.node_on_pods) / segment("TCP", port, 30080), "p2"
    )
    assert result.verdict == PASS
    assert result.packet.payload.dst == family.remote_pod


@pytest.mark.parametrize("flags", ["A", "SA", "PA", "FA", "R", "RA", "SR"])
def test_non_syn_segment_without_a_flow_to_a_node_port_is_passed_to_the_host(
    wire: Wire, family: FamilyAddresses, port: int, flags: str
) -> None:
    """It may belong to a connection of the host whose source port is the number of a NodePort."""
    for packet in (
        family.ip(family.other_client, family.node) / segment("TCP", port, 30080, flags),
        family.ip(family.other_client, family.node) / segment("TCP", port, 30500, flags),
    ):
        before = raw(packet)
        result = wire.ingress(packet)
        assert (result.verdict, result.bytes[14:]) == (PASS, before)


@pytest.mark.parametrize("frontend", ["web", "web_external", "web_balancer"])
def test_tcp_segment_without_a_flow_to_a_service_is_reset(
    wire: Wire, family: FamilyAddresses, port: int, frontend: str
) -> None:
    """It must not be forwarded. The RST is the one that a backend would send; an RST gets none."""
    address = getattr(family, frontend)
    for flags in ("A", "SA", "PA", "FA"):
        result = wire.ingress(family.ip(family.client, address) / segment("TCP", port, 80, flags))
        tcp = assert_rejected(wire, result, family, address, family.client)[TCP]
        assert (str(tcp.flags), tcp.seq) == ("R", 2000)
    assert wire.ingress(family.ip(family.client, address) / segment("TCP", port, 80, "R")).verdict == DROP


def test_sctp_data_chunk_creates_no_flow(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """As in netfilter's conntrack, a DATA chunk without an association creates none."""
    data = segment("SCTP", port, 30868, "A")
    before = raw(family.ip(family.client, family.node) / data)
    result = wire.ingress(family.ip(family.client, family.node) / data)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)
    other = wire.ingress(family.ip(family.client, family.web) / segment("SCTP", port, 3868, "A"))
    assert_rejected(wire, other, family, family.web, family.client)


def test_sctp_heartbeat_creates_a_flow(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """As in netfilter's conntrack, an association survives the loss of its conntrack entry."""
    heartbeat = SCTP(sport=port, dport=3868, tag=7) / SCTPChunkHeartbeatReq()
    result = wire.ingress(family.ip(family.client, family.web) / heartbeat)
    assert (result.verdict, ends_of(result.packet)[3]) == (PASS, PORTS["SCTP"][2])
    again = wire.ingress(family.ip(family.client, family.web) / segment("SCTP", port, 3868, "A"))
    assert (again.verdict, ends_of(again.packet)) == (PASS, ends_of(result.packet))


@pytest.mark.parametrize("protocol", ["UDP", "SCTP"])
def test_replies_to_a_host_flow_from_a_node_port_number_are_not_translated(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str
) -> None:
    """An egress packet with a frontend as source makes its flow the host's; other flows are translated."""
    node_port = PORTS[protocol][1]
    out = family.ip(family.node, family.other_client) / segment(protocol, node_port, port)
    before = raw(out)
    for iif in ("", "p1"):
        result = wire.egress(out, iif=iif)
        assert (result.verdict, result.bytes[14:]) == (PASS, before)
    reply = family.ip(family.other_client, family.node) / segment(protocol, port, node_port)
    before = raw(reply)
    result = wire.ingress(reply)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)
    client = wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, node_port))
    assert ends_of(client.packet)[2:] == (family.remote_pod, PORTS[protocol][2])
