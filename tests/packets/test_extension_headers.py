"""IPv6's extension headers: in a packet that an ICMP error quotes, and behind the header of a fragment."""

from __future__ import annotations

import pytest
from scapy.compat import raw
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet, Raw

from tests.packets.packet_cluster import PORTS, V6
from tests.packets.test_flows import PAYLOAD, segment
from tests.packets.test_icmp_errors_and_fragments import (
    KINDS,
    ROUTER,
    check_outer,
    icmp_error,
    identification,
)
from tests.packets.wire import DROP, PASS, Result, Wire, ip_of

pytestmark = pytest.mark.root

NUMBERS = {"TCP": 6, "UDP": 17}
TYPES = {IPv6ExtHdrHopByHop: 0, IPv6ExtHdrRouting: 43, IPv6ExtHdrFragment: 44, AH: 51, IPv6ExtHdrDestOpt: 60}
OPTIONS = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"x" * 12)])
CHAINS = {
    "fragment": [IPv6ExtHdrFragment(m=1, id=7)],
    "destination-options": [OPTIONS],
    "hop-by-hop": [IPv6ExtHdrHopByHop()],
    "routing": [IPv6ExtHdrRouting(addresses=["2001:db8::1"], segleft=0)],
    "authentication": [AH(icv=b"x" * 12, payloadlen=4)],
    "several": [IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(), IPv6ExtHdrFragment(m=1), OPTIONS],
}


@pytest.fixture(params=NUMBERS)
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def transport(
    protocol: str, source: str, sport: int, destination: str, dport: int, payload: bytes = PAYLOAD
) -> bytes:
    """A segment or datagram, whose checksum covers its addresses and none of the headers between."""
    return bytes(V6.ip(source, destination) / segment(protocol, sport, dport, payload=payload))[40:]


def chained(source: str, destination: str, headers: list[Packet], number: int, payload: bytes) -> bytes:
    """A packet with these extension headers before its payload, which is of the protocol with this number."""
    types = [*(TYPES[type(each)] for each in headers), number]
    made = b""
    for header, following in zip(headers, types[1:], strict=True):
        each = header.copy()
        each.nh = following
        made += raw(each)
    return bytes(V6.ip(source, destination, nh=types[0]) / Raw(made + payload))


def quoted_in(result: Result) -> bytes:
    return bytes(ip_of(result.packet).payload)[8:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chain", CHAINS)
def test_icmp_error_about_a_packet_with_extension_headers_is_translated(
    wire: Wire, port: int, protocol: str, chain: str, kind: str
) -> None:
    """Ports and checksum are found behind them: path MTU discovery works for a server that sends fragments."""
    router, frontend, target = ROUTER[6], PORTS[protocol][0], PORTS[protocol][2]

    def error(reporter: str, source: str, sport: int, destination: str, dport: int) -> tuple[Packet, bytes]:
        """An error for the source of the packet between these ends, and that packet."""
        payload = transport(protocol, source, sport, destination, dport)
        quoted = chained(source, destination, CHAINS[chain], NUMBERS[protocol], payload)
        return V6.ip(reporter, source) / icmp_error(V6, kind) / Raw(quoted), quoted

    wire.ingress(V6.ip(V6.client, V6.local_balancer) / segment(protocol, port, frontend))
    result = wire.ingress(error(router, V6.local_balancer, frontend, V6.client, port)[0])
    check_outer(V6, result, router, V6.local_pod)
    assert quoted_in(result) == error(router, V6.local_pod, target, V6.client, port)[1]
    # An error of this node about a packet to the backend quotes what the client has sent.
    result = wire.egress(error(V6.node, V6.client, port, V6.local_pod, target)[0])
    check_outer(V6, result, V6.node, V6.client)
    assert quoted_in(result) == error(V6.node, V6.client, port, V6.local_balancer, frontend)[1]


@pytest.mark.parametrize("is_cut", [False, True], ids=["later-fragment", "cut"])
def test_icmp_error_about_a_packet_whose_ports_are_not_quoted_is_not_translated(
    wire: Wire, port: int, is_cut: bool
) -> None:
    """A later fragment has none, and a router may quote only the beginning of the extension headers."""
    wire.ingress(V6.ip(V6.client, V6.local_balancer) / segment("UDP", port, 53))
    datagram = transport("UDP", V6.local_balancer, 53, V6.client, port)
    header = [IPv6ExtHdrFragment(offset=int(not is_cut), m=1, id=7)]
    quoted = chained(V6.local_balancer, V6.client, header, 17, datagram)
    packet = (
        V6.ip(ROUTER[6], V6.local_balancer)
        / icmp_error(V6, "too-big")
        / Raw(quoted[:44] if is_cut else quoted)
    )
    before = raw(packet)
    result = wire.ingress(packet)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)


# -- fragments


def fragments(source: str, destination: str, number: int, payload: bytes, identity: int) -> list[IPv6]:
    """Three fragments of a packet with options between the fragment header and the transport header."""
    options = OPTIONS.copy()
    options.nh = number
    body = raw(options) + payload
    return [
        V6.ip(source, destination)
        / IPv6ExtHdrFragment(nh=60, offset=at // 8, m=int(at < 800), id=identity)
        / Raw(body[at : at + 400])
        for at in (0, 400, 800)
    ]


def test_fragments_with_options_behind_their_header_are_translated(
    wire: Wire, port: int, protocol: str
) -> None:
    """Of the fragments, only the first one says what the transport protocol is (RFC 8200, 4.5)."""
    frontend, target, number, payload = PORTS[protocol][0], PORTS[protocol][2], NUMBERS[protocol], b"q" * 1000

    def reassembled(results: list[Result], source: str, destination: str) -> bytes:
        """What lies behind the options of a packet with these addresses."""
        packets = [ip_of(result.packet) for result in results]
        assert {(ip.src, ip.dst) for ip in packets} == {(source, destination)}
        assert len({identification(ip) for ip in packets}) == 1
        return b"".join(raw(ip)[48:] for ip in packets)[16:]

    request = transport(protocol, V6.client, port, V6.local_balancer, frontend, payload)
    parts = fragments(V6.client, V6.local_balancer, number, request, 0x5A)
    found = reassembled([wire.ingress(part) for part in parts], V6.client, V6.local_pod)
    assert found == transport(protocol, V6.client, port, V6.local_pod, target, payload)
    reply = transport(protocol, V6.local_pod, target, V6.client, port, payload)
    parts = fragments(V6.local_pod, V6.client, number, reply, 0x5B)
    found = reassembled([wire.egress(part, iif="p1") for part in parts], V6.local_balancer, V6.client)
    assert found == transport(protocol, V6.local_balancer, frontend, V6.client, port, payload)


def test_later_fragment_that_may_begin_with_options_is_dropped_without_its_first(
    wire: Wire, port: int
) -> None:
    """The host could not take one to a cluster IP; it gets one to the node."""
    datagram = raw(segment("UDP", port, 53, payload=b"q" * 1000))
    assert wire.ingress(fragments(V6.client, V6.web, 17, datagram, 0x5C)[1]).verdict == DROP
    to_node = fragments(V6.client, V6.node, 17, datagram, 0x5D)[1]
    before = raw(to_node)
    result = wire.ingress(to_node)
    assert (result.verdict, result.bytes[14:]) == (PASS, before)
