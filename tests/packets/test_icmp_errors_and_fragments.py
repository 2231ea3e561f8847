"""ICMP errors that quote translated packets, and IP fragments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    in6_chksum,
)
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from tests.packets.packet_cluster import V4, FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of, masqueraded_port, segment
from tests.packets.wire import DROP, PASS, Result, Wire, ip_of, with_right_checksums

pytestmark = pytest.mark.root

ROUTER = {4: "198.51.100.1", 6: "2001:db8:51::1"}
KINDS = ["too-big", "time-exceeded", "unreachable"]


def icmp_error(family: FamilyAddresses, kind: str) -> Packet:
    if family.version == 4:
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


def inner_of(family: FamilyAddresses, result: Result) -> Packet:
    """The quoted packet, parsed as a packet of its own, with checksums verified."""
    payload = raw(ip_of(result.packet).payload)[8:]
    kind = type(
        family.ip("::" if family.version == 6 else "0.0.0.0", "::" if family.version == 6 else "0.0.0.0")
    )
    inner = kind(payload)
    assert with_right_checksums(inner) == payload
    return inner


def check_outer(family: FamilyAddresses, result: Result, source: str, destination: str) -> None:
    assert result.verdict == PASS
    outer = result.packet
    assert (ip_of(outer).src, ip_of(outer).dst) == (source, destination)
    # The ICMP checksum covers the quoted bytes, whatever they are.
    ip = ip_of(outer)
    payload = raw(ip.payload)
    if family.version == 4:
        zeroed = payload[:2] + b"\0\0" + payload[4:]
        assert checksum(zeroed) == int.from_bytes(payload[2:4], "big")
        assert with_right_checksums(IP(raw(ip)[:20])) == raw(ip)[:20]
    else:
        zeroed = payload[:2] + b"\0\0" + payload[4:]
        assert in6_chksum(58, ip, zeroed) == int.from_bytes(payload[2:4], "big")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_icmp_error_for_a_packet_in_reply_direction_reaches_the_backend(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str, kind: str
) -> None:
    """The quoted packet has the frontend as source; the backend sent it with its own address."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    wire.ingress(family.ip(family.client, family.local_balancer) / segment(protocol, port, service_port))
    reply = family.ip(family.local_balancer, family.client) / segment(protocol, service_port, port, "A")
    router = ROUTER[family.version]
    result = wire.ingress(family.ip(router, family.local_balancer) / icmp_error(family, kind) / reply)
    check_outer(family, result, router, family.local_pod)
    assert ends_of(inner_of(family, result)) == (family.local_pod, target, family.client, port)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_icmp_error_for_a_direct_flow_with_a_changed_source_port_reaches_client_and_backend(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str, kind: str
) -> None:
    """Each gets the port that it knows in the quoted packet, so that path MTU discovery works for both."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    router = ROUTER[family.version]
    wire.ingress(family.ip(family.client, family.local_balancer) / segment(protocol, port, service_port))
    request = wire.ingress(
        family.ip(family.client, family.local_pod) / segment(protocol, port, target)
    ).packet
    other = ends_of(request)[1]
    assert other != port
    reply = family.ip(family.local_pod, family.client) / segment(protocol, target, port, "A")
    result = wire.ingress(family.ip(router, family.local_pod) / icmp_error(family, kind) / reply)
    check_outer(family, result, router, family.local_pod)
    assert ends_of(inner_of(family, result)) == (family.local_pod, target, family.client, other)
    result = wire.egress(
        family.ip(router, family.client) / icmp_error(family, kind) / ip_of(request), iif="p1"
    )
    check_outer(family, result, router, family.client)
    assert ends_of(inner_of(family, result)) == (family.client, port, family.local_pod, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_icmp_error_for_a_masqueraded_packet_in_original_direction_reaches_the_client(
    wire: Wire, family: FamilyAddresses, port: int, protocol: str, kind: str
) -> None:
    """It is translated twice: from the node to the client at ingress, from backend to frontend at egress."""
    service_port, target = (80, 8080) if protocol == "TCP" else (53, 8053)
    wire.ingress(family.ip(family.client, family.web) / segment(protocol, port, service_port))
    snat_port = masqueraded_port(wire, family, protocol, port, family.node)
    request = family.ip(family.node, family.remote_pod) / segment(protocol, snat_port, target)
    router = "172.18.0.2" if family.version == 4 else "fd00:172:18::2"
    result = wire.ingress(family.ip(router, family.node) / icmp_error(family, kind) / request)
    check_outer(family, result, router, family.client)
    assert ends_of(inner_of(family, result)) == (family.client, port, family.remote_pod, target)
    between = ip_of(result.packet)
    result = wire.egress(between, iif="eth0")
    check_outer(family, result, router, family.client)
    assert ends_of(inner_of(family, result)) == (family.client, port, family.web, service_port)


def test_icmp_port_unreachable_of_the_backend_has_the_frontend_as_source(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """The pod has no socket on the port; to the client, the error comes from the Service."""
    wire.ingress(family.ip(family.client, family.local_balancer) / segment("UDP", port, 53))
    request = family.ip(family.client, family.local_pod) / segment("UDP", port, 8053)
    unreachable = ICMP(type=3, code=3) if family.version == 4 else ICMPv6DestUnreach(code=4)
    packet = family.ip(family.local_pod, family.client) / unreachable / request
    result = wire.egress(packet, iif="p1")
    check_outer(family, result, family.local_balancer, family.client)
    assert ends_of(inner_of(family, result)) == (family.client, port, family.local_balancer, 53)


def test_icmp_error_that_quotes_eight_bytes_of_tcp_is_translated(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """RFC 792 requires no more. The TCP checksum is not among these bytes."""
    wire.ingress(family.ip(family.client, family.local_balancer) / segment("TCP", port, 80))
    reply = raw(family.ip(family.local_balancer, family.client) / segment("TCP", 80, port, "A"))
    header = 20 if family.version == 4 else 40
    router = ROUTER[family.version]
    packet = (
        family.ip(router, family.local_balancer) / icmp_error(family, "too-big") / Raw(reply[: header + 8])
    )
    result = wire.ingress(packet)
    check_outer(family, result, router, family.local_pod)
    inner = raw(ip_of(result.packet).payload)[8:]
    assert inner[header : header + 4] == (8080).to_bytes(2, "big") + port.to_bytes(2, "big")


def test_icmp_redirect_for_a_translated_packet_is_dropped(wire: Wire, port: int) -> None:
    """The kernel of this node sends one where client and backend's node are on the uplink's network."""
    family = V4
    wire.ingress(family.ip(family.client, family.web) / segment("TCP", port, 80))
    redirect = ICMP(type=5, code=1, gw=family.node_b)
    for destination, verdict in ((family.remote_pod, DROP), (family.other_client, PASS)):
        inner = family.ip(family.client, destination) / segment("TCP", port, 8080)
        packet = family.ip(family.node, family.client) / redirect / inner
        before = raw(packet)
        result = wire.egress(packet)
        assert result.verdict == verdict
        assert result.bytes[14:] == before


def test_icmp_error_without_a_flow_is_not_translated(wire: Wire, family: FamilyAddresses, port: int) -> None:
    inner = family.ip(family.node, family.other_client) / segment("TCP", 22, port)
    packet = family.ip(ROUTER[family.version], family.node) / icmp_error(family, "too-big") / inner
    before = raw(packet)
    result = wire.ingress(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_icmp_error_with_a_truncated_inner_header_is_not_translated(
    wire: Wire, family: FamilyAddresses
) -> None:
    packet = (
        family.ip(ROUTER[family.version], family.node) / icmp_error(family, "too-big") / Raw(b"\x45\x00\x00")
    )
    before = raw(packet)
    result = wire.ingress(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


# -- fragments


def fragments(family: FamilyAddresses, packet: Packet, identification: int) -> list[Packet]:
    """Splits a packet into three fragments."""
    if family.version == 4:
        packet[IP].id = identification
        return list(fragment(packet, 400))
    payload = raw(packet.payload)
    found = []
    for offset in range(0, len(payload), 400):
        chunk = payload[offset : offset + 400]
        more = offset + 400 < len(payload)
        head = IPv6ExtHdrFragment(nh=17, offset=offset // 8, m=int(more), id=identification)
        found.append(family.ip(packet.src, packet.dst) / head / Raw(chunk))
    return found


def test_later_fragments_are_translated_as_the_first(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """All get the backend's address; the reassembled datagram has the right checksum."""
    datagram = family.ip(family.client, family.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    parts = fragments(family, datagram, 0x4321)
    assert len(parts) == 3
    payload = b""
    for part in parts:
        result = wire.ingress(part)
        assert result.verdict == PASS
        ip = ip_of(result.packet)
        assert (ip.src, ip.dst) == (family.client, family.local_pod)
        body = raw(ip.payload)
        payload += body if family.version == 4 else body[8:]
    whole = family.ip(family.client, family.local_pod) / UDP(payload)
    assert (whole[UDP].sport, whole[UDP].dport) == (port, 8053)
    kind = type(family.ip(family.client, family.client))
    full = kind(
        raw(
            family.ip(
                family.client, family.local_pod, **({"proto": 17} if family.version == 4 else {"nh": 17})
            )
            / Raw(payload)
        )
    )
    assert with_right_checksums(full) == raw(full)


def test_fragments_in_reply_direction_are_translated(wire: Wire, family: FamilyAddresses, port: int) -> None:
    wire.ingress(family.ip(family.client, family.local_balancer) / segment("UDP", port, 53))
    reply = family.ip(family.local_pod, family.client) / UDP(sport=8053, dport=port) / Raw(b"a" * 1100)
    for part in fragments(family, reply, 0x1234):
        result = wire.egress(part, iif="p1")
        assert result.verdict == PASS
        assert ip_of(result.packet).src == family.local_balancer


def test_later_fragment_to_a_cluster_ip_without_its_first_is_dropped(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    datagram = family.ip(family.client, family.web) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    assert wire.ingress(fragments(family, datagram, 0x77)[1]).verdict == DROP


def test_later_fragment_to_the_node_without_its_first_is_passed_to_the_host(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    datagram = family.ip(family.client, family.node) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    part = fragments(family, datagram, 0x78)[2]
    before = raw(part)
    result = wire.ingress(part)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_fragments_of_two_clients_with_the_same_id_go_to_their_own_backends(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    for client, destination, expected in (
        (family.client, family.local_balancer, family.local_pod),
        (family.other_client, family.web, family.remote_pod),
    ):
        datagram = family.ip(client, destination) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
        parts = fragments(family, datagram, 0x99)
        found = {ip_of(wire.ingress(part).packet).dst for part in parts}
        assert found == {expected}


def identification(packet: Packet) -> int:
    """The identification by which a receiver reassembles fragments."""
    ip = ip_of(packet)
    return int(ip.id if ip.version == 4 else ip[IPv6ExtHdrFragment].id)


def datagram_id(family: FamilyAddresses, results: list[Result], source: str, destination: str) -> int:
    """Asserts that the results are all fragments of one datagram with these addresses; returns their id."""
    payload = b""
    for result in results:
        ip = ip_of(result.packet)
        assert (ip.src, ip.dst) == (source, destination)
        body = raw(ip.payload)
        payload += body if family.version == 4 else body[8:]
        if family.version == 4:
            assert with_right_checksums(IP(raw(ip)[:20])) == raw(ip)[:20]
    (found,) = {identification(result.packet) for result in results}
    fields = {"proto": 17} if family.version == 4 else {"nh": 17}
    full = type(family.ip(source, destination))(raw(family.ip(source, destination, **fields) / Raw(payload)))
    assert with_right_checksums(full) == raw(full)
    return found


def test_fragments_of_masqueraded_clients_have_distinct_ids(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """Datagrams of two clients have equal ids and get the node's address: each gets an id of its own."""
    between = []
    for client in (family.client, family.other_client):
        datagram = family.ip(client, family.web) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
        between.append([wire.ingress(part) for part in fragments(family, datagram, 0x55)])
        datagram_id(family, between[-1], client, family.remote_pod)
    # The fragments of both are interleaved: each belongs to the first one of its own datagram.
    first, second = [], []
    for one, other in zip(*between, strict=True):
        first.append(wire.egress(ip_of(one.packet), iif="eth0"))
        second.append(wire.egress(ip_of(other.packet), iif="eth0"))
    ids = [datagram_id(family, results, family.node, family.remote_pod) for results in (first, second)]
    assert len({0x55, *ids}) == 3


def test_reused_ip_id_is_translated_to_a_new_one(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """Ids of 16 bits are soon reused: the receiver must not mix the next datagram with the previous one."""
    datagram = family.ip(family.client, family.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    parts = fragments(family, datagram, 0x56)
    ids = [
        datagram_id(family, [wire.ingress(part) for part in parts], family.client, family.local_pod)
        for _ in range(2)
    ]
    assert ids[0] != ids[1]


def test_fragments_with_ip_options_or_extension_headers_get_a_new_id(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """The id is found behind IPv4 options and IPv6 extension headers, and the IPv4 checksum is updated."""
    datagram = family.ip(family.client, family.local_balancer) / UDP(sport=port, dport=53) / Raw(b"q" * 1100)
    if family.version == 4:
        datagram[IP].options = [IPOption_Router_Alert()]
    parts = fragments(family, datagram, 0x57)
    if family.version == 6:
        for part in parts:
            part[IPv6].payload = IPv6ExtHdrDestOpt(nh=44) / part[IPv6].payload
            part[IPv6].nh = 60
    found = set()
    for part in parts:
        ip = ip_of(wire.ingress(part).packet)
        assert ip.dst == family.local_pod
        found.add(identification(ip))
        if family.version == 4:
            header = raw(ip)[: ip.ihl * 4]
            assert checksum(header) == 0
    assert len(found) == 1
    assert 0x57 not in found


def test_fragments_of_replies_from_one_frontend_have_distinct_ids(
    wire: Wire, family: FamilyAddresses, new_port: Callable[[], int]
) -> None:
    """Datagrams of a backend get the frontend's address: equal ids of several must not collide."""
    ids = set()
    for port in (new_port(), new_port()):
        wire.ingress(family.ip(family.client, family.local_balancer) / segment("UDP", port, 53))
        reply = family.ip(family.local_pod, family.client) / UDP(sport=8053, dport=port) / Raw(b"a" * 1100)
        results = [wire.egress(part, iif="p1") for part in fragments(family, reply, 0x1235)]
        ids.add(datagram_id(family, results, family.local_balancer, family.client))
    assert len(ids) == 2


def test_fragments_to_no_service_keep_their_id(wire: Wire, family: FamilyAddresses, port: int) -> None:
    datagram = family.ip(family.client, family.node) / UDP(sport=port, dport=9) / Raw(b"q" * 1100)
    for part in fragments(family, datagram, 0x58):
        before = raw(part)
        assert wire.ingress(part).bytes[14:] == before


def test_icmp_too_big_does_not_close_a_tcp_flow(wire: Wire, family: FamilyAddresses, port: int) -> None:
    wire.ingress(family.ip(family.client, family.local_balancer) / segment("TCP", port, 80))
    reply = family.ip(family.local_balancer, family.client) / segment("TCP", 80, port, "A")
    wire.ingress(
        family.ip(ROUTER[family.version], family.local_balancer) / icmp_error(family, "too-big") / reply
    )
    packet = family.ip(family.client, family.local_balancer) / TCP(sport=port, dport=80, flags="A") / PAYLOAD
    assert ends_of(wire.ingress(packet).packet) == (family.client, port, family.local_pod, 8080)
