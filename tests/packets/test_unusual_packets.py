"""Packets to no Service, and unusual packets of flows."""

from __future__ import annotations

import ipaddress
import random
import struct
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP, UDP, IPOption_NOP, in4_chksum
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    in6_chksum,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw

from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import PAYLOAD, assert_passed, ends_of, segment
from tests.packets.wire import DROP, PASS, REDIRECT, Wire, ip_of, with_right_checksums

pytestmark = pytest.mark.root


@pytest.mark.parametrize("flags", ["S", "A", "R", "FPU"])
def test_packets_to_no_service_are_passed_unchanged(
    wire: Wire, family: FamilyAddresses, port: int, flags: str
) -> None:
    for destination, dport in ((family.other_client, 80), (family.node, 22), (family.remote_pod, 8080)):
        packet = family.ip(family.client, destination) / segment("TCP", port, dport, flags)
        for result in (wire.ingress(packet), wire.egress(packet, iif="p1")):
            assert result.verdict == PASS
            assert with_right_checksums(result.packet) == result.bytes
            assert ends_of(result.packet) == (family.client, port, destination, dport)


def test_other_protocols_are_passed_unchanged(wire: Wire, family: FamilyAddresses) -> None:
    for number in (2, 4, 47, 50, 89, 103, 112):
        packet = family.ip(
            family.client, family.node, **({"proto": number} if family.version == 4 else {"nh": number})
        )
        before = raw(packet / Raw(b"\x01" * 24))
        result = wire.ingress(packet / Raw(b"\x01" * 24))
        assert (result.verdict, result.bytes[14:]) == (PASS, before)


def test_incorrect_checksum_stays_incorrect(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """The update is incremental, so that the receiver still detects the error."""
    packet = (
        family.ip(family.client, family.web) / TCP(sport=port, dport=80, flags="S", chksum=0x1234) / PAYLOAD
    )
    result = wire.ingress(packet)
    assert result.verdict == PASS
    assert with_right_checksums(result.packet) != result.bytes


def test_zero_udp_checksum_is_kept(wire: Wire, family: FamilyAddresses, port: int) -> None:
    if family.version == 6:
        pytest.skip("the UDP checksum is mandatory in IPv6")
    packet = family.ip(family.client, family.web) / UDP(sport=port, dport=53, chksum=0) / PAYLOAD
    result = wire.ingress(packet)
    assert result.verdict == PASS
    assert ends_of(result.packet) == (family.client, port, family.remote_pod, 8053)
    assert result.packet[UDP].chksum == 0


def test_udp_lite_uses_the_udp_service_port(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """UDP-Lite has its own protocol number and partial checksums (RFC 3828); its connect() has no hook."""
    header = struct.pack("!HHHH", port, 53, 8, 0)
    ip = family.ip(
        family.client, family.local_balancer, **({"proto": 136} if family.version == 4 else {"nh": 136})
    )
    # The length has to be set, because the checksum covers it.
    whole = type(ip)(raw(ip / Raw(header + PAYLOAD)))
    check = (in4_chksum if family.version == 4 else in6_chksum)(136, whole, header)
    result = wire.ingress(ip / Raw(header[:6] + check.to_bytes(2, "big") + PAYLOAD))
    assert result.verdict == PASS
    out = ip_of(result.packet)
    assert out.dst == family.local_pod
    body = raw(out.payload)
    sport, dport, coverage, check = struct.unpack("!HHHH", body[:8])
    assert (sport, dport, coverage, body[8:]) == (port, 8053, 8, PAYLOAD)
    zeroed = body[:6] + b"\0\0"
    assert check == (in4_chksum if family.version == 4 else in6_chksum)(136, out, zeroed)


def test_sctp_without_a_checksum_is_left_to_device_offload(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    packet = family.ip(family.client, family.web) / SCTP(sport=port, dport=3868, chksum=0) / SCTPChunkInit()
    result = wire.ingress(packet)
    assert ends_of(result.packet) == (family.client, port, family.remote_pod, 3869)
    assert result.packet[SCTP].chksum == 0


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 1399])
def test_sctp_checksum_is_recomputed_for_any_length(
    wire: Wire, family: FamilyAddresses, port: int, size: int
) -> None:
    chunk = SCTPChunkData(tsn=1, data=bytes(range(256)) * 5 + b"x" * size)
    packet = family.ip(family.client, family.web) / SCTP(sport=port, dport=3868) / SCTPChunkInit() / chunk
    result = wire.ingress(packet)
    assert ends_of(result.packet) == (family.client, port, family.remote_pod, 3869)
    assert with_right_checksums(result.packet) == result.bytes


@pytest.mark.parametrize("words", range(1, 11))
@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_ipv4_options_are_kept(wire: Wire, port: int, protocol: str, words: int) -> None:
    """A header with 20 bytes of options is as long as IPv6's."""
    options = [IPOption_NOP()] * (4 * words)
    service_port, _, target = PORTS[protocol]
    packet = IP(src="198.51.100.7", dst="10.96.0.10", options=options) / segment(protocol, port, service_port)
    result = wire.ingress(packet)
    out = assert_passed(result, "198.51.100.7", port, "10.244.2.2", target)
    assert out[IP].ihl == 5 + words
    assert result.bytes[34 : 34 + 4 * words] == b"\1" * 4 * words


def test_ipv6_extension_headers_are_parsed(wire: Wire, port: int) -> None:
    packet = (
        IPv6(src="2001:db8:51::7", dst="fd00:10:96::10")
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / segment("TCP", port, 80)
    )
    result = wire.ingress(packet)
    assert result.verdict == PASS
    out = result.packet
    assert (out[IPv6].dst, out[TCP].dport) == ("fd00:10:244:2::2", 8080)
    assert with_right_checksums(out) == result.bytes


def test_final_destination_in_an_ipv6_routing_header_is_not_translated(wire: Wire, port: int) -> None:
    packet = (
        IPv6(src="2001:db8:51::7", dst="2001:db8:51::8")
        / IPv6ExtHdrRouting(addresses=["fd00:10:96::10"])
        / segment("TCP", port, 80)
    )
    before = raw(packet)
    assert wire.ingress(packet).bytes[14:] == before


def test_too_many_ipv6_extension_headers_are_rejected(wire: Wire, port: int) -> None:
    packet: Any = IPv6(src="2001:db8:51::7", dst="fd00:10:96::10")
    for _ in range(12):
        packet = packet / IPv6ExtHdrDestOpt()
    packet = packet / segment("TCP", port, 80)
    result = wire.ingress(packet)
    assert result.verdict in (DROP, REDIRECT), "a cluster IP is dropped or rejected"


def test_frames_with_another_destination_mac_are_passed_unchanged(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    packet = Ether(dst="02:00:00:00:00:98", src="02:00:00:00:00:99") / family.ip(family.client, family.web)
    packet = packet / segment("TCP", port, 80)
    result = wire.send("from_device", "eth0", packet)
    assert (result.verdict, result.bytes) == (PASS, raw(packet))


def test_vlan_tagged_frames_are_passed_unchanged(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """The kernel receives them again on the VLAN device, untagged."""
    frame = Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99") / Dot1Q(vlan=5)
    frame = frame / family.ip(family.client, family.web) / segment("TCP", port, 80)
    for program in ("from_device", "to_device"):
        result = wire.send(program, "eth0", frame)
        assert (result.verdict, result.bytes) == (PASS, raw(frame))


def test_frames_of_other_ethertypes_are_passed_unchanged(wire: Wire) -> None:
    for frame in (
        Ether(dst="ff:ff:ff:ff:ff:ff", src="02:00:00:00:00:99") / ARP(pdst="10.96.0.10"),
        Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99", type=0x88CC) / Raw(b"\x00" * 50),
        Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99", type=0x8847) / Raw(b"\x45" * 50),
    ):
        result = wire.send("from_device", "eth0", frame)
        assert (result.verdict, result.bytes) == (PASS, raw(frame))


@pytest.mark.parametrize("length", [20, 22, 27])
def test_truncated_headers_are_passed_unchanged(
    wire: Wire, family: FamilyAddresses, port: int, length: int
) -> None:
    packet = raw(family.ip(family.client, family.web) / segment("TCP", port, 80))
    header = 20 if family.version == 4 else 40
    data = bytes.fromhex(wire.mac("eth0").replace(":", "")) + b"\x02\x00\x00\x00\x00\x99"
    data += b"\x08\x00" if family.version == 4 else b"\x86\xdd"
    data += packet[: header + length - 20]
    result = wire.send_bytes("from_device", "eth0", data)
    assert (result.verdict, result.bytes) == (PASS, data)


def test_random_bytes_are_passed_unchanged(wire: Wire) -> None:
    draw = random.Random(7)
    mac = bytes.fromhex(wire.mac("eth0").replace(":", "")) + b"\x02\x00\x00\x00\x00\x99"
    for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00"):
        for _ in range(100):
            data = mac + kind + draw.randbytes(draw.randrange(40, 200))
            for program in ("from_device", "to_device"):
                result = wire.send_bytes(program, "eth0", data)
                assert (result.verdict, result.bytes) == (PASS, data)


def _folded(data: bytes) -> int:
    """The sum of 16-bit words of the Internet checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_checksum_that_equals_the_sum_of_its_pseudo_header_is_updated(
    wire: Wire, family: FamilyAddresses, protocol: str, port: int
) -> None:
    """A checksum that is left to the device has this value; a finished one may have it by chance."""
    service_port, _, target = PORTS[protocol]

    def packet(word: int) -> Packet:
        transport = segment(protocol, port, service_port, payload=PAYLOAD + struct.pack("!H", word))
        built = family.ip(family.client, family.local_balancer) / transport
        return built.__class__(raw(built))

    some = packet(0)
    addresses = b"".join(ipaddress.ip_address(each).packed for each in (some.src, some.dst))
    number = {"TCP": 6, "UDP": 17}[protocol]
    pseudo = _folded(addresses + struct.pack("!HH", number, len(some.payload)))
    chosen = packet(_folded(struct.pack("!HH", 0xFFFF ^ pseudo, some.payload.chksum)))
    assert chosen.payload.chksum == pseudo
    assert_passed(wire.ingress(chosen), *(family.client, port, family.local_pod, target))
