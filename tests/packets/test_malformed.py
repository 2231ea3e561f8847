"""Packets whose headers are longer than the packets, or quote what is none: tests/fuzz found them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import PAYLOAD, masqueraded_port, segment
from tests.packets.test_icmp_errors_and_fragments import ROUTER
from tests.packets.wire import PASS, Wire, ip_of

pytestmark = pytest.mark.root

#: Bytes of a header without which there is no checksum to bring up to date.
HEADERS = {"TCP": 20, "UDP": 8, "SCTP": 12}


def with_length(family: FamilyAddresses, packet: Packet, after_header: int) -> Packet:
    """The packet as it is, with a length of IP that includes so many bytes behind IP's header."""
    ip = ip_of(packet)
    if family.version == 4:
        ip.len = 20 + after_header
    else:
        ip.plen = after_header
    return packet


def assert_untouched(wire: Wire, packet: Packet, device: str = "eth0", *, egress: bool = False) -> None:
    frame = raw(Ether(dst=wire.mac(device), src="02:00:00:00:00:99") / packet)
    program, iif = ("to_device", "p1") if egress else ("from_device", "")
    result = wire.send_bytes(program, device, frame, iif=iif)
    assert (result.verdict, result.bytes) == (PASS, frame)


@pytest.mark.parametrize("protocol", PORTS)
def test_ports_in_the_padding_are_none(
    wire: Wire, family: FamilyAddresses, protocol: str, new_port: Callable[[], int]
) -> None:
    """A header that ends behind the IP packet, in the frame's padding, is not read and not rewritten."""
    for length in (1, 4, HEADERS[protocol] - 1):
        packet = family.ip(family.client, family.web) / segment(protocol, new_port(), PORTS[protocol][0])
        assert_untouched(wire, with_length(family, packet, length))


@pytest.mark.parametrize("protocol", PORTS)
def test_packet_that_is_not_whole_is_left_to_the_kernel(
    wire: Wire, family: FamilyAddresses, protocol: str, new_port: Callable[[], int]
) -> None:
    """IP's length exceeds the frame: the kernel drops it. It opens no flow, and is not rejected either."""
    for frontend in (family.web, family.empty):
        packet = family.ip(family.client, frontend) / segment(protocol, new_port(), PORTS[protocol][0])
        assert_untouched(wire, with_length(family, packet, 1000))


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_quoted_ports_in_the_padding_are_none(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """The same within an ICMP error."""
    service_port, target, _ = PORTS[protocol][0], PORTS[protocol][2], None
    wire.ingress(family.ip(family.client, family.web) / segment(protocol, port, service_port))
    source = masqueraded_port(wire, family, protocol, port, family.node)
    quoted = raw(family.ip(family.node, family.remote_pod) / segment(protocol, source, target))
    error = ICMP(type=11) if family.version == 4 else ICMPv6TimeExceeded()
    packet = family.ip(ROUTER[family.version], family.node) / error / Raw(quoted)
    header = 20 if family.version == 4 else 40
    assert_untouched(wire, with_length(family, packet, 8 + header + 7))


def test_quoted_checksum_in_the_padding_is_not_rewritten(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """Routers may quote no more than the ports: then what follows is the frame's padding, and stays."""
    wire.ingress(family.ip(family.client, family.web) / segment("TCP", port, 80))
    source = masqueraded_port(wire, family, "TCP", port, family.node)
    header = 20 if family.version == 4 else 40
    quoted = raw(family.ip(family.node, family.remote_pod) / segment("TCP", source, 8080))[: header + 8]
    error = ICMP(type=11) if family.version == 4 else ICMPv6TimeExceeded()
    packet = family.ip(ROUTER[family.version], family.node) / error / Raw(quoted)
    padding = b"\x55" * 16
    frame = raw(Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99") / packet) + padding
    result = wire.send_bytes("from_device", "eth0", frame)
    assert result.verdict == PASS
    assert ip_of(result.packet).dst == family.client
    assert result.bytes.endswith(padding)


def test_icmp_error_that_quotes_no_packet_of_its_family_is_left_alone(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    """The version in the quoted header tells."""
    wire.ingress(family.ip(family.client, family.web) / segment("TCP", port, 80))
    source = masqueraded_port(wire, family, "TCP", port, family.node)
    quoted = bytearray(raw(family.ip(family.node, family.remote_pod) / segment("TCP", source, 8080)))
    quoted[0] ^= 0x20
    error = ICMP(type=11) if family.version == 4 else ICMPv6TimeExceeded()
    assert_untouched(wire, family.ip(ROUTER[family.version], family.node) / error / Raw(bytes(quoted)))


def test_icmp_error_is_judged_by_its_own_addresses(wire: Wire, family: FamilyAddresses) -> None:
    """Its quoted packet comes from an unallocated address of the Service network, and has no ports.

    That address does not decide whether the error itself may leave.
    """
    unallocated = "10.96.200.7" if family.version == 4 else "fd00:10:96::c807"
    quoted = family.ip(unallocated, family.client_pod)
    inner: IP | IPv6 = quoted / (ICMP() if family.version == 4 else ICMPv6TimeExceeded())
    error = ICMP(type=12) if family.version == 4 else ICMPv6TimeExceeded()
    packet = family.ip(family.client_pod, family.client) / error / Raw(raw(inner) + PAYLOAD)
    assert_untouched(wire, packet, egress=True)
