"""Packets to begin with, for ``packets/main.c``."""

from __future__ import annotations

from collections.abc import Iterator

from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Router_Alert, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkHeartbeatReq, SCTPChunkInit
from scapy.packet import Packet, Raw

from tests.packets.dsr_packets import HERE, NODE_PORTS, RANGED, frame_with_option, option
from tests.packets.packet_cluster import FAMILIES, PORTS, FamilyAddresses

#: The EtherTypes of both families, which raw packets have where a source address begins: the kernel reads the protocol
#: of a test run from there.
RAW_CLIENTS = {4: "8.0.0.7", 6: "2001:db8:86dd::7"}


def _transports(port: int, numbers: dict[str, int]) -> Iterator[Packet]:
    for protocol, number in numbers.items():
        if protocol == "TCP":
            for flags in ("S", "A", "SA", "R", "FA"):
                yield _tcp(port, number, flags)
        elif protocol == "UDP":
            yield UDP(sport=port, dport=number) / Raw(b"0123456789abcdef")
        else:
            for chunk in (SCTPChunkInit(init_tag=7), SCTPChunkHeartbeatReq()):
                yield SCTP(sport=port, dport=number, tag=7) / chunk


def _tcp(sport: int, dport: int, flags: str) -> Packet:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000) / Raw(b"0123456789abcdef")


def _packets(family: FamilyAddresses) -> Iterator[Packet]:
    services = {name: ports[0] for name, ports in PORTS.items()}
    node_ports = {name: ports[1] for name, ports in PORTS.items()}
    targets = {name: ports[2] for name, ports in PORTS.items()}
    frontends = [
        family.web,
        family.web_external,
        family.web_balancer,
        family.local_balancer,
        family.elsewhere_balancer,
        family.ranged_balancer,
        family.empty,
        family.own,
    ]
    raw_client = RAW_CLIENTS[family.version]
    loopback = "127.0.0.1" if family.version == 4 else "::1"
    for client in (family.client, family.client_pod, family.node, raw_client):
        for frontend in frontends:
            for each in _transports(20001, services):
                yield family.ip(client, frontend) / each
        for each in _transports(20002, node_ports):
            yield family.ip(client, family.node) / each
        for each in _transports(20003, targets):
            yield family.ip(client, family.local_pod) / each
            yield family.ip(client, family.remote_pod) / each
    for each in _transports(20004, node_ports):
        yield family.ip(loopback, loopback) / each
    echo = ICMP() if family.version == 4 else ICMPv6EchoRequest()
    unallocated = "10.96.9.9" if family.version == 4 else "fd00:10:96::999"
    for to in (family.web, family.web_external, family.node, unallocated):
        yield family.ip(family.client, to) / echo
    yield family.ip(family.client, unallocated) / _tcp(20005, 80, "S")
    big = UDP(sport=20006, dport=53) / Raw(bytes(range(256)) * 4)
    if family.version == 4:
        for to in (family.web, family.local_balancer):
            yield from fragment(IP(src=family.client, dst=to, id=7) / big, 400)
        options = [IPOption_NOP()] * 4, [IPOption_Router_Alert()]
        for chosen in options:
            for each in _transports(20007, services):
                yield IP(src=family.client, dst=family.web, options=chosen) / each
        return
    options = raw(IPv6ExtHdrDestOpt(nh=17))
    for at, more in ((0, 1), (50, 1), (100, 0)):
        for number, following, body in ((7, 17, raw(big)), (8, 60, options + raw(big))):
            part = body[at * 8 : at * 8 + 400]
            header = IPv6ExtHdrFragment(id=number, offset=at, m=more, nh=following)
            yield IPv6(src=family.client, dst=family.web) / header / Raw(part)
    for kind in (IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting):
        for each in _transports(20007, services):
            yield IPv6(src=family.client, dst=family.web) / kind() / each


def _with_options(family: FamilyAddresses) -> Iterator[Packet]:
    """What another node sends for flows to backends, with right and with wrong options."""
    for protocol, (port, _, target) in PORTS.items():
        named = {HERE[family.version]: port, RANGED[family.version]: port, family.web_balancer: port}
        if protocol in NODE_PORTS:
            named |= {family.node_b: NODE_PORTS[protocol], family.node: NODE_PORTS[protocol]}
        for address, number in {**named, family.web: port, family.client: 1}.items():
            for to in (family.local_pod, family.remote_pod, family.node):
                for each in _transports(20008, {protocol: target}):
                    content = option(family, address, number)
                    yield frame_with_option("02:00:00:00:00:01", family, to, content, each)


def seeds(*, accepts_dsr: bool) -> Iterator[bytes]:
    """Packets to begin with; with those that have the option of DSR."""
    for family in FAMILIES:
        for packet in _packets(family):
            yield raw(Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:99") / packet)
        if accepts_dsr:
            yield from map(raw, _with_options(family))
    first = next(_packets(FAMILIES[0]))
    yield raw(Ether() / Dot1Q(vlan=7) / first)
    yield raw(Ether() / ARP(pdst="10.96.0.10"))
