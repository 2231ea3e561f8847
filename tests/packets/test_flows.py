"""Flows through the packet path, step by step as their packets pass this node."""

from __future__ import annotations

import ipaddress
import random
import struct
from collections.abc import Callable
from itertools import starmap
from typing import Any

import pytest
from scapy.all import ARP, Dot1Q, Ether, IPv6, Packet, Raw, raw
from scapy.layers.inet import IP, TCP, UDP, IPOption_RR, in4_chksum
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    in6_chksum,
)
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit

from ebpfproxy.datapath.abi.flow_layout import Entry, NatFlags
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.wire import DROP, PASS, REDIRECT, Result, Wire, ip_of, with_right_checksums
from tests.packets.world import PORTS, Side

pytestmark = pytest.mark.root

PAYLOAD = b"0123456789abcdef"


@pytest.fixture(params=PORTS)
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def segment(protocol: str, sport: int, dport: int, flags: str = "S", payload: bytes = PAYLOAD) -> Packet:
    if protocol == "TCP":
        return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000) / Raw(payload)
    if protocol == "UDP":
        return UDP(sport=sport, dport=dport) / Raw(payload)
    opening = SCTPChunkInit(init_tag=7) if flags == "S" else b""
    return SCTP(sport=sport, dport=dport, tag=7) / opening / SCTPChunkData(tsn=1, data=payload)


def ends(packet: Packet) -> tuple[str, int, str, int]:
    """Source and destination with their ports."""
    ip = ip_of(packet)
    return ip.src, ip.payload.sport, ip.dst, ip.payload.dport


def passed(result: Result, *expected: Any) -> Packet:
    """It passed with these ends, its payload as it was, and every checksum right; returns it."""
    assert result.verdict == PASS
    packet = result.packet
    assert ends(packet) == expected
    assert with_right_checksums(packet) == result.bytes
    assert PAYLOAD in result.bytes
    return packet


def masqueraded_port(wire: Wire, side: Side, protocol: str, port: int, node: str) -> int:
    """Sends the first packet of a flow on its way out; the port that stands for the client."""
    target = PORTS[protocol][2]
    out = wire.leave(
        side.ip(side.client, side.remote_pod) / segment(protocol, port, target), came_by="eth0"
    ).packet
    source = ends(out)
    assert (source[0], source[2], source[3]) == (node, side.remote_pod, target)
    assert with_right_checksums(out) == raw(out)
    return source[1]


def test_node_port_from_outside_is_masqueraded_to_a_remote_backend_and_back(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    """All four rewritings: frontend to backend, client to node, and both back again."""
    _, node_port, target = PORTS[protocol]
    passed(
        wire.arrive(side.ip(side.client, side.node) / segment(protocol, port, node_port)),
        *(side.client, port, side.remote_pod, target),
    )
    stands = masqueraded_port(wire, side, protocol, port, side.node)
    passed(
        wire.arrive(side.ip(side.remote_pod, side.node) / segment(protocol, target, stands, "SA")),
        *(side.remote_pod, target, side.client, port),
    )
    passed(
        wire.leave(
            side.ip(side.remote_pod, side.client) / segment(protocol, target, port, "SA"), came_by="eth0"
        ),
        *(side.node, node_port, side.client, port),
    )


def test_a_direct_flow_from_the_port_of_a_services_flow_gets_another(
    wire: Wire, side: Side, protocol: str, port: int, new_port: Callable[[], int]
) -> None:
    """The backend tells the two flows apart, and the client gets the answers of each from whom it asked."""
    service_port, _, target = PORTS[protocol]
    question = side.ip(side.client, side.local_pod)
    answer = side.ip(side.local_pod, side.client)
    passed(
        wire.arrive(side.ip(side.client, side.local_balancer) / segment(protocol, port, service_port)),
        *(side.client, port, side.local_pod, target),
    )
    out = wire.arrive(question / segment(protocol, port, target))
    other = ends(out.packet)[1]
    assert other != port
    for flags in ("S", "A"):
        passed(
            wire.arrive(question / segment(protocol, port, target, flags)),
            *(side.client, other, side.local_pod, target),
        )
    passed(
        wire.leave(answer / segment(protocol, target, other, "SA"), came_by="p1"),
        *(side.local_pod, target, side.client, port),
    )
    passed(
        wire.leave(answer / segment(protocol, target, port, "SA"), came_by="p1"),
        *(side.local_balancer, service_port, side.client, port),
    )
    # Only the Service's own port is in the way.
    for asked, source in ((target, new_port()), (9000, port)):
        packet = question / segment(protocol, source, asked)
        passed(wire.arrive(packet), side.client, source, side.local_pod, asked)


def test_a_direct_connection_that_outlives_its_services_flow_keeps_one_port(
    wire: Wire, side: Side, port: int, tables: MapSet
) -> None:
    """Its client uses the port again once the Service's flow is gone, which is no longer in the way."""
    service_port, _, target = PORTS["TCP"]
    to_pod = side.ip(side.client, side.local_pod)
    wire.arrive(side.ip(side.client, side.local_balancer) / segment("TCP", port, service_port))
    other = ends(wire.arrive(to_pod / segment("TCP", port, target)).packet)[1]
    assert other != port
    reset = to_pod / TCP(sport=port, dport=target, flags="R", seq=1001 + len(PAYLOAD))
    assert ends(wire.arrive(reset).packet)[1] == other
    # The sweep finds the Service's flow silent first.
    client = ipaddress.ip_address(side.client).packed
    gone = [
        entry.key
        for entry in starmap(Entry, tables["conntrack"].items())
        if client in (entry.flow.source, entry.flow.destination)
        and port in (entry.flow.source_port, entry.flow.destination_port)
        and not entry.flags & NatFlags.SOURCE
    ]
    assert len(gone) == 2
    for key in gone:
        tables["conntrack"].delete(key)
    for flags in ("S", "A"):
        packet = to_pod / segment("TCP", port, target, flags)
        passed(wire.arrive(packet), side.client, port, side.local_pod, target)


@pytest.mark.parametrize("frontend", ["web", "web_external", "web_balancer"])
def test_every_address_of_a_service_is_translated_from_outside(
    wire: Wire, side: Side, protocol: str, port: int, frontend: str
) -> None:
    service_port, _, target = PORTS[protocol]
    passed(
        wire.arrive(side.ip(side.client, getattr(side, frontend)) / segment(protocol, port, service_port)),
        *(side.client, port, side.remote_pod, target),
    )
    masqueraded_port(wire, side, protocol, port, side.node)


def test_policy_local_keeps_the_clients_address(wire: Wire, side: Side, protocol: str, port: int) -> None:
    service_port, _, target = PORTS[protocol]
    passed(
        wire.arrive(side.ip(side.client, side.local_balancer) / segment(protocol, port, service_port)),
        *(side.client, port, side.local_pod, target),
    )
    passed(
        wire.leave(
            side.ip(side.client, side.local_pod) / segment(protocol, port, target), "p1", came_by="eth0"
        ),
        *(side.client, port, side.local_pod, target),
    )
    passed(
        wire.arrive(side.ip(side.local_pod, side.client) / segment(protocol, target, port, "SA"), "p1"),
        *(side.local_pod, target, side.client, port),
    )
    passed(
        wire.leave(
            side.ip(side.local_pod, side.client) / segment(protocol, target, port, "SA"), came_by="p1"
        ),
        *(side.local_balancer, service_port, side.client, port),
    )


def test_a_pods_packets_to_a_cluster_ip_keep_its_address(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    """SCTP, kernel clients, sandboxed pods: no socket hook has seen them."""
    service_port, _, target = PORTS[protocol]
    passed(
        wire.arrive(side.ip(side.client_pod, side.web) / segment(protocol, port, service_port), "p2"),
        *(side.client_pod, port, side.remote_pod, target),
    )
    passed(
        wire.leave(side.ip(side.client_pod, side.remote_pod) / segment(protocol, port, target), came_by="p2"),
        *(side.client_pod, port, side.remote_pod, target),
    )
    passed(
        wire.leave(
            side.ip(side.remote_pod, side.client_pod) / segment(protocol, target, port, "SA"),
            "p2",
            came_by="eth0",
        ),
        *(side.web, service_port, side.client_pod, port),
    )


def test_a_pod_reaches_itself_through_its_service(wire: Wire, side: Side, protocol: str, port: int) -> None:
    """Hairpin: masqueraded, or the pod would answer itself without us."""
    service_port, _, target = PORTS[protocol]
    passed(
        wire.arrive(side.ip(side.local_pod, side.own) / segment(protocol, port, service_port), "p1"),
        *(side.local_pod, port, side.local_pod, target),
    )
    out = wire.leave(
        side.ip(side.local_pod, side.local_pod) / segment(protocol, port, target), "p1", came_by="p1"
    )
    stands = ends(out.packet)[1]
    passed(out, side.node_on_pods, stands, side.local_pod, target)
    passed(
        wire.arrive(
            side.ip(side.local_pod, side.node_on_pods) / segment(protocol, target, stands, "SA"), "p1"
        ),
        *(side.local_pod, target, side.local_pod, port),
    )
    passed(
        wire.leave(
            side.ip(side.local_pod, side.local_pod) / segment(protocol, target, port, "SA"),
            "p1",
            came_by="p1",
        ),
        *(side.own, service_port, side.local_pod, port),
    )


def test_a_pod_to_a_load_balancers_address_short_circuits(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    """Policy Local with endpoints elsewhere only: in-cluster clients get policy Cluster."""
    service_port, _, target = PORTS[protocol]
    passed(
        wire.arrive(
            side.ip(side.client_pod, side.elsewhere_balancer) / segment(protocol, port, service_port), "p2"
        ),
        *(side.client_pod, port, side.remote_pod, target),
    )


def test_the_hosts_own_client_is_sent_to_the_backends_route(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    """A kernel client: its packets show up at egress only, with the frontend's address.

    Its port may be that of a direct connection to the backend, too: it gets one that no socket of the host has,
    unless it is one that servers insist on.
    """
    service_port, _, target = PORTS[protocol]
    reserved = port % 1000 + 1
    for own in (port, reserved):
        out = wire.leave(side.ip(side.node, side.web) / segment(protocol, own, service_port))
        assert out.verdict == REDIRECT
        seen = ends(out.packet)[1]
        assert ends(out.packet) == (side.node, seen, side.remote_pod, target)
        assert (seen == own) is (own == reserved)
        assert with_right_checksums(out.packet) == out.bytes
        passed(
            wire.arrive(side.ip(side.remote_pod, side.node) / segment(protocol, target, seen, "SA")),
            *(side.web, service_port, side.node, own),
        )


def test_the_hosts_client_to_a_local_pod_has_the_address_on_that_device(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    service_port, _, target = PORTS[protocol]
    out = wire.leave(side.ip(side.node, side.own) / segment(protocol, port, service_port))
    assert out.verdict == REDIRECT
    source = ends(out.packet)
    assert source == (side.node_on_pods, source[1], side.local_pod, target)
    passed(
        wire.arrive(
            side.ip(side.local_pod, side.node_on_pods) / segment(protocol, target, source[1], "SA"), "p1"
        ),
        *(side.own, service_port, side.node, port),
    )


def test_later_packets_go_where_the_first_went(wire: Wire, side: Side, protocol: str, port: int) -> None:
    service_port, _, target = PORTS[protocol]
    for flags in ("S", "A", "PA", "FA"):
        passed(
            wire.arrive(side.ip(side.client, side.web) / segment(protocol, port, service_port, flags)),
            *(side.client, port, side.remote_pod, target),
        )


def test_the_masquerade_keeps_its_port_for_the_whole_flow(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    wire.arrive(side.ip(side.client, side.node) / segment(protocol, port, PORTS[protocol][1]))
    found = {masqueraded_port(wire, side, protocol, port, side.node) for _ in range(3)}
    assert len(found) == 1


def test_two_clients_with_the_same_port_are_told_apart(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    _, node_port, target = PORTS[protocol]
    stands = {}
    for client in (side.client, side.stranger):
        wire.arrive(side.ip(client, side.node) / segment(protocol, port, node_port))
        out = wire.leave(side.ip(client, side.remote_pod) / segment(protocol, port, target), came_by="eth0")
        stands[client] = ends(out.packet)[1]
    assert len(set(stands.values())) == 2
    for client, stand in stands.items():
        passed(
            wire.arrive(side.ip(side.remote_pod, side.node) / segment(protocol, target, stand, "SA")),
            *(side.remote_pod, target, client, port),
        )


def test_one_client_port_through_two_frontends_to_one_backend_is_told_apart(
    wire: Wire, side: Side, protocol: str, port: int
) -> None:
    """The backend would see one connection twice: the second gets another port at the first hook."""
    service_port, node_port, target = PORTS[protocol]
    ways = []
    for frontend, dport in ((side.web, service_port), (side.node, node_port)):
        out = wire.arrive(side.ip(side.client, frontend) / segment(protocol, port, dport))
        between = ends(out.packet)[1]
        passed(out, side.client, between, side.remote_pod, target)
        ways.append((frontend, dport, between))
    assert len({between for _, _, between in ways}) == 2
    for frontend, dport, between in ways:
        passed(
            wire.leave(
                side.ip(side.remote_pod, side.client) / segment(protocol, target, between, "SA"),
                came_by="eth0",
            ),
            *(frontend, dport, side.client, port),
        )


def test_a_thousand_masqueraded_flows_have_a_thousand_ports(
    wire: Wire, side: Side, new_port: Callable[[], int]
) -> None:
    found = set()
    for _ in range(1000):
        port = new_port()
        # A busy machine takes longer than the 30 s that an unanswered datagram keeps its port.
        wire.arrive(side.ip(side.client, side.node) / segment("TCP", port, PORTS["TCP"][1]))
        found.add(masqueraded_port(wire, side, "TCP", port, side.node))
    assert len(found) == 1000
    assert min(found) >= 1024
    assert max(found) < 15000, "a local port of the node itself"


def test_a_port_used_again_after_the_end_opens_another_connection(wire: Wire, side: Side, port: int) -> None:
    """FIN of both sides, then SYN from the same port: the flow begins anew, whatever is left of the old."""
    ask = side.ip(side.client, side.local_balancer)
    answer = side.ip(side.local_pod, side.client)
    wire.arrive(ask / segment("TCP", port, 80, "S"))
    wire.leave(answer / segment("TCP", 8080, port, "SA"), came_by="p1")
    wire.arrive(ask / TCP(sport=port, dport=80, flags="FA", seq=2000, ack=1000))
    wire.leave(answer / TCP(sport=8080, dport=port, flags="FA", seq=1000, ack=2001), came_by="p1")
    passed(wire.arrive(ask / segment("TCP", port, 80, "S")), side.client, port, side.local_pod, 8080)
    passed(
        wire.leave(answer / segment("TCP", 8080, port, "SA"), came_by="p1"),
        *(side.local_balancer, 80, side.client, port),
    )


# -- packets that are no Service's


@pytest.mark.parametrize("flags", ["S", "A", "R", "FPU"])
def test_packets_to_no_service_leave_bit_identical(wire: Wire, side: Side, port: int, flags: str) -> None:
    for destination, dport in ((side.stranger, 80), (side.node, 22), (side.remote_pod, 8080)):
        packet = side.ip(side.client, destination) / segment("TCP", port, dport, flags)
        for result in (wire.arrive(packet), wire.leave(packet, came_by="p1")):
            assert result.verdict == PASS
            assert with_right_checksums(result.packet) == result.bytes
            assert ends(result.packet) == (side.client, port, destination, dport)


def test_other_protocols_leave_bit_identical(wire: Wire, side: Side) -> None:
    for number in (2, 4, 47, 50, 89, 103, 112):
        packet = side.ip(
            side.client, side.node, **({"proto": number} if side.version == 4 else {"nh": number})
        )
        before = raw(packet / Raw(b"\x01" * 24))
        result = wire.arrive(packet / Raw(b"\x01" * 24))
        assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_a_damaged_checksum_stays_damaged(wire: Wire, side: Side, port: int) -> None:
    """Rewriting is incremental: the receiver still sees that something was wrong."""
    packet = side.ip(side.client, side.web) / TCP(sport=port, dport=80, flags="S", chksum=0x1234) / PAYLOAD
    result = wire.arrive(packet)
    assert result.verdict == PASS
    assert with_right_checksums(result.packet) != result.bytes


def test_udp_without_a_checksum_stays_without(wire: Wire, side: Side, port: int) -> None:
    if side.version == 6:
        pytest.skip("UDP over IPv6 has one")
    packet = side.ip(side.client, side.web) / UDP(sport=port, dport=53, chksum=0) / PAYLOAD
    result = wire.arrive(packet)
    assert result.verdict == PASS
    assert ends(result.packet) == (side.client, port, side.remote_pod, 8053)
    assert result.packet[UDP].chksum == 0


def test_udp_lite_uses_the_services_of_udp(wire: Wire, side: Side, port: int) -> None:
    """RFC 3828: its own number and a checksum over a part; connect() of such sockets has no hook."""
    header = struct.pack("!HHHH", port, 53, 8, 0)
    ip = side.ip(side.client, side.local_balancer, **({"proto": 136} if side.version == 4 else {"nh": 136}))
    # The length has to be set, because the checksum covers it.
    whole = type(ip)(raw(ip / Raw(header + PAYLOAD)))
    check = (in4_chksum if side.version == 4 else in6_chksum)(136, whole, header)
    result = wire.arrive(ip / Raw(header[:6] + check.to_bytes(2, "big") + PAYLOAD))
    assert result.verdict == PASS
    out = ip_of(result.packet)
    assert out.dst == side.local_pod
    body = raw(out.payload)
    sport, dport, coverage, check = struct.unpack("!HHHH", body[:8])
    assert (sport, dport, coverage, body[8:]) == (port, 8053, 8, PAYLOAD)
    zeroed = body[:6] + b"\0\0"
    assert check == (in4_chksum if side.version == 4 else in6_chksum)(136, out, zeroed)


def test_sctp_without_a_checksum_is_left_for_the_device_to_fill_in(wire: Wire, side: Side, port: int) -> None:
    packet = side.ip(side.client, side.web) / SCTP(sport=port, dport=3868, chksum=0) / SCTPChunkInit()
    result = wire.arrive(packet)
    assert ends(result.packet) == (side.client, port, side.remote_pod, 3869)
    assert result.packet[SCTP].chksum == 0


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 1399])
def test_sctp_checksums_of_any_length(wire: Wire, side: Side, port: int, size: int) -> None:
    chunk = SCTPChunkData(tsn=1, data=bytes(range(256)) * 5 + b"x" * size)
    packet = side.ip(side.client, side.web) / SCTP(sport=port, dport=3868) / SCTPChunkInit() / chunk
    result = wire.arrive(packet)
    assert ends(result.packet) == (side.client, port, side.remote_pod, 3869)
    assert with_right_checksums(result.packet) == result.bytes


def test_ipv4_options_are_kept(wire: Wire, port: int) -> None:
    packet = IP(src="198.51.100.7", dst="10.96.0.10", options=[IPOption_RR()]) / segment("TCP", port, 80)
    result = wire.arrive(packet)
    out = passed(result, "198.51.100.7", port, "10.244.2.2", 8080)
    assert out[IP].options[0].copy_flag == IPOption_RR().copy_flag
    assert out[IP].ihl == packet.__class__(raw(packet)).ihl


def test_ipv6_extension_headers_are_walked(wire: Wire, port: int) -> None:
    packet = (
        IPv6(src="2001:db8:51::7", dst="fd00:10:96::10")
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / segment("TCP", port, 80)
    )
    result = wire.arrive(packet)
    assert result.verdict == PASS
    out = result.packet
    assert (out[IPv6].dst, out[TCP].dport) == ("fd00:10:244:2::2", 8080)
    assert with_right_checksums(out) == result.bytes


def test_ipv6_segment_routing_leaves_the_final_destination_alone(wire: Wire, port: int) -> None:
    packet = (
        IPv6(src="2001:db8:51::7", dst="2001:db8:51::8")
        / IPv6ExtHdrRouting(addresses=["fd00:10:96::10"])
        / segment("TCP", port, 80)
    )
    before = raw(packet)
    assert wire.arrive(packet).bytes[14:] == before


def test_more_extension_headers_than_anybody_sends_are_not_followed(wire: Wire, port: int) -> None:
    packet: Any = IPv6(src="2001:db8:51::7", dst="fd00:10:96::10")
    for _ in range(12):
        packet = packet / IPv6ExtHdrDestOpt()
    packet = packet / segment("TCP", port, 80)
    result = wire.arrive(packet)
    assert result.verdict in (DROP, REDIRECT), "a cluster IP answers nothing else"


def test_frames_for_another_host_are_not_looked_at(wire: Wire, side: Side, port: int) -> None:
    packet = Ether(dst="02:00:00:00:00:98", src="02:00:00:00:00:99") / side.ip(side.client, side.web)
    packet = packet / segment("TCP", port, 80)
    result = wire.send("from_device", "eth0", packet)
    assert (result.verdict, result.bytes) == (PASS, raw(packet))


def test_a_vlans_frames_are_the_vlan_devices(wire: Wire, side: Side, port: int) -> None:
    """Tagged frames come again, untagged, on a device of their own."""
    frame = Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99") / Dot1Q(vlan=5)
    frame = frame / side.ip(side.client, side.web) / segment("TCP", port, 80)
    for program in ("from_device", "to_device"):
        result = wire.send(program, "eth0", frame)
        assert (result.verdict, result.bytes) == (PASS, raw(frame))


def test_frames_of_other_ethertypes_leave_bit_identical(wire: Wire) -> None:
    for frame in (
        Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:99") / ARP(pdst="10.96.0.10"),
        Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99", type=0x88CC) / Raw(b"\x00" * 50),
        Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99", type=0x8847) / Raw(b"\x45" * 50),
    ):
        result = wire.send("from_device", "eth0", frame)
        assert (result.verdict, result.bytes) == (PASS, raw(frame))


@pytest.mark.parametrize("length", [20, 22, 27])
def test_truncated_headers_pass_as_they_are(wire: Wire, side: Side, port: int, length: int) -> None:
    packet = raw(side.ip(side.client, side.web) / segment("TCP", port, 80))
    header = 20 if side.version == 4 else 40
    data = bytes.fromhex(wire.mac("eth0").replace(":", "")) + b"\x02\x00\x00\x00\x00\x99"
    data += b"\x08\x00" if side.version == 4 else b"\x86\xdd"
    data += packet[: header + length - 20]
    result = wire.send_bytes("from_device", "eth0", data)
    assert (result.verdict, result.bytes) == (PASS, data)


def test_garbage_never_crashes_and_never_changes(wire: Wire) -> None:
    draw = random.Random(7)
    mac = bytes.fromhex(wire.mac("eth0").replace(":", "")) + b"\x02\x00\x00\x00\x00\x99"
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00"):
        for _ in range(100):
            data = mac + kind + draw.randbytes(draw.randrange(40, 200))
            for program in ("from_device", "to_device"):
                result = wire.send_bytes(program, "eth0", data)
                assert (result.verdict, result.bytes) == (PASS, data)
