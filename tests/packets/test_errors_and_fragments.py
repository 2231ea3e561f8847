"""ICMP errors about translated packets, and datagrams in pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.all import IPv6, Packet, Raw, raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    in6_chksum,
)
from scapy.utils import checksum

from tests.packets.test_flows import PAYLOAD, ends, masqueraded_port, segment
from tests.packets.wire import DROP, PASS, Result, Wire, ip_of, with_right_checksums
from tests.packets.world import Side

pytestmark = pytest.mark.root

ROUTER = {4: "198.51.100.1", 6: "2001:db8:51::1"}
KINDS = ["too-big", "time-exceeded", "unreachable"]


def error(side: Side, kind: str) -> Packet:
    if side.version == 4:
        return {
            "too-big": ICMP(type=3, code=4, nexthopmtu=1400),
            "time-exceeded": ICMP(type=11, code=0),
            "unreachable": ICMP(type=3, code=1),
        }[kind]
    return {
        "too-big": ICMPv6PacketTooBig(mtu=1400),
        "time-exceeded": ICMPv6TimeExceeded(),
        "unreachable": ICMPv6DestUnreach(code=0),
    }[kind]


def inner_of(side: Side, result: Result) -> Packet:
    """The packet inside, parsed as one that stands alone: its checksums are checked with the rest."""
    payload = raw(ip_of(result.packet).payload)[8:]
    kind = type(side.ip("::" if side.version == 6 else "0.0.0.0", "::" if side.version == 6 else "0.0.0.0"))
    inner = kind(payload)
    assert with_right_checksums(inner) == payload
    return inner


def outer_is_right(side: Side, result: Result, source: str, destination: str) -> None:
    assert result.verdict == PASS
    outer = result.packet
    assert (ip_of(outer).src, ip_of(outer).dst) == (source, destination)
    # scapy's view of the ICMP layer alone: its own checksum over whatever is inside.
    ip = ip_of(outer)
    payload = raw(ip.payload)
    if side.version == 4:
        zeroed = payload[:2] + b"\0\0" + payload[4:]
        assert checksum(zeroed) == int.from_bytes(payload[2:4], "big")
        assert with_right_checksums(IP(raw(ip)[:20])) == raw(ip)[:20]
    else:
        zeroed = payload[:2] + b"\0\0" + payload[4:]
        assert in6_chksum(58, ip, zeroed) == int.from_bytes(payload[2:4], "big")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_routers_error_about_an_answer_reaches_the_backend(
    wire: Wire, side: Side, port: int, protocol: str, kind: str
) -> None:
    """The answer went out as the frontend's; the backend knows it as its own."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    wire.arrive(side.ip(side.client, side.local_balancer) / segment(protocol, port, service_port))
    answer = side.ip(side.local_balancer, side.client) / segment(protocol, service_port, port, "A")
    router = ROUTER[side.version]
    result = wire.arrive(side.ip(router, side.local_balancer) / error(side, kind) / answer)
    outer_is_right(side, result, router, side.local_pod)
    assert ends(inner_of(side, result)) == (side.local_pod, target, side.client, port)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_routers_error_about_a_direct_flow_with_another_port_reaches_both_ends(
    wire: Wire, side: Side, port: int, protocol: str, kind: str
) -> None:
    """The client knows the flow by its own port, the backend by the other: a path's MTU is learned by both."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    router = ROUTER[side.version]
    wire.arrive(side.ip(side.client, side.local_balancer) / segment(protocol, port, service_port))
    question = wire.arrive(side.ip(side.client, side.local_pod) / segment(protocol, port, target)).packet
    other = ends(question)[1]
    assert other != port
    answer = side.ip(side.local_pod, side.client) / segment(protocol, target, port, "A")
    result = wire.arrive(side.ip(router, side.local_pod) / error(side, kind) / answer)
    outer_is_right(side, result, router, side.local_pod)
    assert ends(inner_of(side, result)) == (side.local_pod, target, side.client, other)
    result = wire.leave(side.ip(router, side.client) / error(side, kind) / ip_of(question), came_by="p1")
    outer_is_right(side, result, router, side.client)
    assert ends(inner_of(side, result)) == (side.client, port, side.local_pod, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_routers_error_about_a_masqueraded_question_reaches_the_client(
    wire: Wire, side: Side, port: int, protocol: str, kind: str
) -> None:
    """Twice: from the node's address to the client's at ingress, from backend to frontend at egress."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    wire.arrive(side.ip(side.client, side.web) / segment(protocol, port, service_port))
    stands = masqueraded_port(wire, side, protocol, port, side.node)
    question = side.ip(side.node, side.remote_pod) / segment(protocol, stands, target)
    router = "172.18.0.2" if side.version == 4 else "fd00:172:18::2"
    result = wire.arrive(side.ip(router, side.node) / error(side, kind) / question)
    outer_is_right(side, result, router, side.client)
    assert ends(inner_of(side, result)) == (side.client, port, side.remote_pod, target)
    between = ip_of(result.packet)
    result = wire.leave(between, came_by="eth0")
    outer_is_right(side, result, router, side.client)
    assert ends(inner_of(side, result)) == (side.client, port, side.web, service_port)


def test_the_backends_own_error_comes_from_the_frontend(wire: Wire, side: Side, port: int) -> None:
    """Port unreachable of a pod that does not listen: the client must see the Service say it."""
    wire.arrive(side.ip(side.client, side.local_balancer) / segment("UDP", port, 53))
    question = side.ip(side.client, side.local_pod) / segment("UDP", port, 8053)
    unreachable = ICMP(type=3, code=3) if side.version == 4 else ICMPv6DestUnreach(code=4)
    packet = side.ip(side.local_pod, side.client) / unreachable / question
    result = wire.leave(packet, came_by="p1")
    outer_is_right(side, result, side.local_balancer, side.client)
    assert ends(inner_of(side, result)) == (side.client, port, side.local_balancer, 53)


def test_an_error_that_quotes_only_eight_bytes_of_tcp(wire: Wire, side: Side, port: int) -> None:
    """RFC 792 asks for no more. The TCP checksum is not there to be changed."""
    wire.arrive(side.ip(side.client, side.local_balancer) / segment("TCP", port, 80))
    answer = raw(side.ip(side.local_balancer, side.client) / segment("TCP", 80, port, "A"))
    header = 20 if side.version == 4 else 40
    router = ROUTER[side.version]
    packet = side.ip(router, side.local_balancer) / error(side, "too-big") / Raw(answer[: header + 8])
    result = wire.arrive(packet)
    outer_is_right(side, result, router, side.local_pod)
    inner = raw(ip_of(result.packet).payload)[8:]
    assert inner[header : header + 4] == (8080).to_bytes(2, "big") + port.to_bytes(2, "big")


def test_an_error_about_a_packet_of_no_flow_is_left_alone(wire: Wire, side: Side, port: int) -> None:
    inner = side.ip(side.node, side.stranger) / segment("TCP", 22, port)
    packet = side.ip(ROUTER[side.version], side.node) / error(side, "too-big") / inner
    before = raw(packet)
    result = wire.arrive(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_an_error_cut_short_is_left_alone(wire: Wire, side: Side) -> None:
    packet = side.ip(ROUTER[side.version], side.node) / error(side, "too-big") / Raw(b"\x45\x00\x00")
    before = raw(packet)
    result = wire.arrive(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


# -- fragments


def pieces(side: Side, packet: Packet, identity: int) -> list[Packet]:
    """The packet in three."""
    if side.version == 4:
        packet[IP].id = identity
        return list(fragment(packet, 400))
    payload = raw(packet.payload)
    found = []
    for offset in range(0, len(payload), 400):
        chunk = payload[offset : offset + 400]
        more = offset + 400 < len(payload)
        head = IPv6ExtHdrFragment(nh=17, offset=offset // 8, m=int(more), id=identity)
        found.append(side.ip(packet.src, packet.dst) / head / Raw(chunk))
    return found


def test_fragments_follow_their_first(wire: Wire, side: Side, port: int) -> None:
    """All get the backend's address; put together again, the datagram and its checksum are right."""
    datagram = side.ip(side.client, side.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    parts = pieces(side, datagram, 0x4321)
    assert len(parts) == 3
    payload = b""
    for part in parts:
        result = wire.arrive(part)
        assert result.verdict == PASS
        ip = ip_of(result.packet)
        assert (ip.src, ip.dst) == (side.client, side.local_pod)
        body = raw(ip.payload)
        payload += body if side.version == 4 else body[8:]
    whole = side.ip(side.client, side.local_pod) / UDP(payload)
    assert (whole[UDP].sport, whole[UDP].dport) == (port, 8053)
    kind = type(side.ip(side.client, side.client))
    full = kind(
        raw(
            side.ip(side.client, side.local_pod, **({"proto": 17} if side.version == 4 else {"nh": 17}))
            / Raw(payload)
        )
    )
    assert with_right_checksums(full) == raw(full)


def test_fragments_of_an_answer_are_translated_back(wire: Wire, side: Side, port: int) -> None:
    wire.arrive(side.ip(side.client, side.local_balancer) / segment("UDP", port, 53))
    answer = side.ip(side.local_pod, side.client) / UDP(sport=8053, dport=port) / Raw(b"a" * 1100)
    for part in pieces(side, answer, 0x1234):
        result = wire.leave(part, came_by="p1")
        assert result.verdict == PASS
        assert ip_of(result.packet).src == side.local_balancer


def test_a_later_fragment_alone_does_not_reach_a_cluster_ip(wire: Wire, side: Side, port: int) -> None:
    datagram = side.ip(side.client, side.web) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    assert wire.arrive(pieces(side, datagram, 0x77)[1]).verdict == DROP


def test_a_later_fragment_alone_for_the_node_is_the_hosts(wire: Wire, side: Side, port: int) -> None:
    datagram = side.ip(side.client, side.node) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    part = pieces(side, datagram, 0x78)[2]
    before = raw(part)
    result = wire.arrive(part)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_fragments_with_the_same_id_of_two_clients_are_told_apart(wire: Wire, side: Side, port: int) -> None:
    for client, destination, expected in (
        (side.client, side.local_balancer, side.local_pod),
        (side.stranger, side.web, side.remote_pod),
    ):
        datagram = side.ip(client, destination) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
        parts = pieces(side, datagram, 0x99)
        found = {ip_of(wire.arrive(part).packet).dst for part in parts}
        assert found == {expected}


def identity(packet: Packet) -> int:
    """The id by which a receiver puts fragments together."""
    ip = ip_of(packet)
    return int(ip.id if ip.version == 4 else ip[IPv6ExtHdrFragment].id)


def sent(side: Side, results: list[Result], source: str, destination: str) -> int:
    """Checks that the results are whole fragments of one datagram between these two; their common id."""
    payload = b""
    for result in results:
        ip = ip_of(result.packet)
        assert (ip.src, ip.dst) == (source, destination)
        body = raw(ip.payload)
        payload += body if side.version == 4 else body[8:]
        if side.version == 4:
            assert with_right_checksums(IP(raw(ip)[:20])) == raw(ip)[:20]
    (found,) = {identity(result.packet) for result in results}
    fields = {"proto": 17} if side.version == 4 else {"nh": 17}
    full = type(side.ip(source, destination))(raw(side.ip(source, destination, **fields) / Raw(payload)))
    assert with_right_checksums(full) == raw(full)
    return found


def test_fragments_of_masqueraded_clients_never_have_one_id(wire: Wire, side: Side, port: int) -> None:
    """Two clients' datagrams of equal ids leave with the node's address: each gets an id of its own."""
    between = []
    for client in (side.client, side.stranger):
        datagram = side.ip(client, side.web) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
        between.append([wire.arrive(part) for part in pieces(side, datagram, 0x55)])
        sent(side, between[-1], client, side.remote_pod)
    # Interleaved: each later fragment follows the first one of its own datagram.
    first, second = [], []
    for one, other in zip(*between, strict=True):
        first.append(wire.leave(ip_of(one.packet), came_by="eth0"))
        second.append(wire.leave(ip_of(other.packet), came_by="eth0"))
    ids = [sent(side, results, side.node, side.remote_pod) for results in (first, second)]
    assert len({0x55, *ids}) == 3


def test_a_client_that_uses_an_id_again_gets_another(wire: Wire, side: Side, port: int) -> None:
    """An id of 16 bits comes again soon: the next datagram is another one, also for the receiver."""
    datagram = side.ip(side.client, side.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    parts = pieces(side, datagram, 0x56)
    ids = [sent(side, [wire.arrive(part) for part in parts], side.client, side.local_pod) for _ in range(2)]
    assert ids[0] != ids[1]


def test_fragments_behind_other_headers_get_their_id(wire: Wire, side: Side, port: int) -> None:
    """IPv4 options and IPv6 extension headers before the fragment's header move it: it is found, and summed."""
    datagram = side.ip(side.client, side.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    if side.version == 4:
        datagram[IP].options = [IPOption_Router_Alert()]
    parts = pieces(side, datagram, 0x57)
    if side.version == 6:
        for part in parts:
            part[IPv6].payload = IPv6ExtHdrDestOpt(nh=44) / part[IPv6].payload
            part[IPv6].nh = 60
    found = set()
    for part in parts:
        ip = ip_of(wire.arrive(part).packet)
        assert ip.dst == side.local_pod
        found.add(identity(ip))
        if side.version == 4:
            header = raw(ip)[: ip.ihl * 4]
            assert checksum(header) == 0
    assert len(found) == 1
    assert 0x57 not in found


def test_fragments_of_answers_by_one_frontend_never_have_one_id(
    wire: Wire, side: Side, new_port: Callable[[], int]
) -> None:
    """Datagrams of a backend to one client leave as the frontend's: equal ids of several do not meet."""
    ids = set()
    for port in (new_port(), new_port()):
        wire.arrive(side.ip(side.client, side.local_balancer) / segment("UDP", port, 53))
        answer = side.ip(side.local_pod, side.client) / UDP(sport=8053, dport=port) / Raw(b"a" * 1100)
        results = [wire.leave(part, came_by="p1") for part in pieces(side, answer, 0x1235)]
        ids.add(sent(side, results, side.local_balancer, side.client))
    assert len(ids) == 2


def test_fragments_of_no_service_keep_their_id(wire: Wire, side: Side, port: int) -> None:
    datagram = side.ip(side.client, side.node) / UDP(sport=port, dport=9) / Raw(b"q" * 1100)
    for part in pieces(side, datagram, 0x58):
        before = raw(part)
        assert wire.arrive(part).bytes[14:] == before


def test_a_tcp_flow_with_an_mtu_error_goes_on(wire: Wire, side: Side, port: int) -> None:
    wire.arrive(side.ip(side.client, side.local_balancer) / segment("TCP", port, 80))
    answer = side.ip(side.local_balancer, side.client) / segment("TCP", 80, port, "A")
    wire.arrive(side.ip(ROUTER[side.version], side.local_balancer) / error(side, "too-big") / answer)
    packet = side.ip(side.client, side.local_balancer) / TCP(sport=port, dport=80, flags="A") / PAYLOAD
    assert ends(wire.arrive(packet).packet) == (side.client, port, side.local_pod, 8080)
