"""Direct server return in packet tests: the cluster, packets with the option, and entries.

One node is both: Services with a backend on node-b tell node-b of their frontends, and what node-b would tell comes
in for a backend on this node.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import Flow, Nat, pack_flow, unpack_nat, with_check
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab import Lab, manifests
from tests.packets.packet_cluster import PORTS, V4, V6, FamilyAddresses, PacketCluster
from tests.packets.wire import Wire, earlier, ip_of, with_right_checksums

PROTOCOLS = ("TCP", "UDP")
NUMBERS = {"TCP": 6, "UDP": 17}
#: A Service with policy Cluster and its backend on this node, and one with source ranges.
HERE = {4: "203.0.113.50", 6: "2001:db8:113::50"}
CLUSTER_IP = {4: "10.96.0.70", 6: "fd00:10:96::70"}
RANGED = {4: "203.0.113.60", 6: "2001:db8:113::60"}
NODE_PORTS = {"TCP": 30600, "UDP": 30601}
NODE_B_MAC = "02:00:00:00:00:0b"
NS = 10**9


def documents() -> list[manifests.Document]:
    """Services of both."""
    made: list[manifests.Document] = []
    ranges = {"loadBalancerSourceRanges": ["198.51.100.128/25", "2001:db8:51::200/120"]}
    variants: list[tuple[str, dict[int, str], int, dict[str, Any]]] = [
        ("here", HERE, 70, {}),
        ("here-ranged", RANGED, 80, ranges),
    ]
    for name, balancers, number, spec in variants:
        ports: list[dict[str, Any]] = [
            {"name": each.lower(), "port": PORTS[each][0], "protocol": each} for each in PROTOCOLS
        ]
        if name == "here":
            ports = [{**port, "nodePort": NODE_PORTS[port["protocol"]]} for port in ports]
        service = manifests.service(
            name,
            type="LoadBalancer",
            clusterIPs=[f"10.96.0.{number}", f"fd00:10:96::{number}"],
            ports=ports,
            **spec,
        )
        service["status"] = {"loadBalancer": {"ingress": [{"ip": each} for each in balancers.values()]}}
        made.append(service)
        targets = [{"name": each.lower(), "port": PORTS[each][2], "protocol": each} for each in PROTOCOLS]
        made += [
            manifests.slice_of(name, [manifests.endpoint(each, "node-a")], ports=targets)
            for each in (V4.local_pod, V6.local_pod)
        ]
    return made


@contextmanager
def dsr_cluster() -> Iterator[PacketCluster]:
    """A cluster with DSR, and with XDP, which forwards a part of the packets."""
    with Lab(takes_xdp=True) as lab:
        options = ("--external-traffic-mode", "dsr", "--xdp", "generic")
        made = PacketCluster(lab, *options, more=documents())
        for hop in (V4.node_b, V6.node_b):
            address = ["lladdr", NODE_B_MAC, "dev", "eth0", "nud", "permanent"]
            made.node.run(["ip", "neighbour", "replace", hop, *address])
        yield made
        made.wire.close()


def transport(protocol: str, sport: int, dport: int, flags: str = "S", **fields: Any) -> Packet:
    if protocol == "UDP":
        return UDP(sport=sport, dport=dport)
    return TCP(sport=sport, dport=dport, flags=flags, **fields)


def option(family: FamilyAddresses, address: str, port: int) -> bytes:
    """The option as Cilium has it, in network byte order."""
    packed = ipaddress.ip_address(address).packed
    if family.version == 4:
        return bytes([0x9A, 8]) + struct.pack("!H", port) + packed
    return bytes([0x1B, 20]) + packed + struct.pack("!HH", port, 0)


def with_option(
    wire: Wire, family: FamilyAddresses, to: str, content: bytes, inner: Packet, device: str = "eth0"
) -> Packet:
    """A frame of the client whose IP header is followed by an option of any bytes."""
    return frame_with_option(wire.mac(device), family, to, content, inner)


def frame_with_option(mac: str, family: FamilyAddresses, to: str, content: bytes, inner: Packet) -> Packet:
    """The same, addressed to a device with that link address."""
    data = raw(family.ip(family.client, to) / inner)
    if family.version == 4:
        size = 20 + len(content)
        first = bytes([0x40 + size // 4, 0]) + struct.pack("!H", len(data) + len(content)) + data[4:10]
        rest = data[12:20] + content
        check = header_check(first + rest)
        data = first + struct.pack("!H", check) + rest + data[20:]
    else:
        header = data[6:7] + bytes([(len(content) + 2) // 8 - 1]) + content
        length = struct.pack("!H", len(header) + len(data) - 40)
        data = data[:4] + length + b"\x3c" + data[7:40] + header + data[40:]
    number = 0x0800 if family.version == 4 else 0x86DD
    return Ether(dst=mac, src="02:00:00:00:00:99", type=number) / Raw(data)


def header_check(header: bytes) -> int:
    """The checksum of an IPv4 header that has none yet; 0 for one that has the right one."""
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def option_in(packet: Packet) -> bytes:
    """The option of a packet, and nothing else that would follow the IP header; empty without one."""
    data: bytes = raw(ip_of(packet))
    if data[0] >> 4 == 4:
        return data[20 : (data[0] & 15) * 4]
    return data[42:64] if data[6] == 60 else b""


def without_option(packet: Packet) -> Any:
    """The packet's IP and transport headers, parsed as if the option were not there."""
    ip = ip_of(packet)
    data = raw(ip)
    if not option_in(packet):
        return ip
    if ip.version == 4:
        rest = data[(data[0] & 15) * 4 :]
        plain = IP(b"\x45" + data[1:2] + struct.pack("!H", 20 + len(rest)) + data[4:20] + rest)
        plain.chksum = None
        return IP(raw(plain))
    return IPv6(data[:4] + struct.pack("!H", len(data) - 64) + data[40:41] + data[7:40] + data[64:])


def key(source: str, to: str, sport: int, dport: int, protocol: str, *, egress: bool = False) -> bytes:
    ends = ipaddress.ip_address(source).packed, ipaddress.ip_address(to).packed
    return pack_flow(Flow(*ends, sport, dport, NUMBERS[protocol], egress))


def entry_of(tables: MapSet, packed: bytes) -> Nat | None:
    value = tables["conntrack"].lookup(packed)
    return unpack_nat(value) if value is not None else None


def aged(tables: MapSet, packed: bytes, seconds: float, *, lasted: float = 0) -> None:
    """Makes an entry as if its flow had had its last packet so much earlier, and had ``lasted`` longer until then."""
    value = tables["conntrack"].lookup(packed)
    assert value is not None
    changed = bytearray(value)
    for at, moved in ((48, seconds), (56, seconds + lasted)):
        struct.pack_into("=Q", changed, at, earlier(struct.unpack_from("=Q", value, at)[0], moved))
    tables["conntrack"].update(packed, with_check(packed, changed))


def count(tables: MapSet, event: PacketEvent) -> int:
    return counters(tables["packet_events"])[event]


def too_big(family: FamilyAddresses, to: str, quoted: Packet) -> Any:
    if family.version == 4:
        return IP(src="192.0.2.1", dst=to) / ICMP(type=3, code=4, nexthopmtu=1400) / quoted
    return IPv6(src="2001:db8:2::1", dst=to) / ICMPv6PacketTooBig(mtu=1400) / quoted


class DsrRequest:
    """What another node sends for a flow of a client outside to the backend on this node."""

    def __init__(self, wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> None:
        self.wire, self.family, self.protocol, self.port = wire, family, protocol, port
        self.frontend, (self.frontend_port, _, self.target) = HERE[family.version], PORTS[protocol]

    def inner(self, flags: str = "S", payload: bytes = b"", **fields: Any) -> Packet:
        return transport(self.protocol, self.port, self.target, flags, **fields) / Raw(payload)

    def plain(self, flags: str = "S", payload: bytes = b"", **fields: Any) -> Packet:
        return self.family.ip(self.family.client, self.family.local_pod) / self.inner(
            flags, payload, **fields
        )

    def packet(
        self,
        content: bytes | None = None,
        flags: str = "S",
        payload: bytes = b"x",
        device: str = "eth0",
        **fields: Any,
    ) -> Packet:
        if content is None:
            content = option(self.family, self.frontend, self.frontend_port)
        inner = self.inner(flags, payload, **fields)
        return with_option(self.wire, self.family, self.family.local_pod, content, inner, device)

    def reply(self, flags: str = "SA", **fields: Any) -> Any:
        inner = transport(self.protocol, self.target, self.port, flags, **fields) / Raw(b"reply")
        packet = self.family.ip(self.family.local_pod, self.family.client) / inner
        return self.wire.egress(packet, iif="p1")

    @property
    def keys(self) -> tuple[bytes, bytes]:
        client, pod = self.family.client, self.family.local_pod
        return (
            key(client, self.frontend, self.port, self.frontend_port, self.protocol),
            key(pod, client, self.target, self.port, self.protocol, egress=True),
        )

    def assert_answered(self, frontend: str, port: int) -> None:
        result = self.reply()
        ip = ip_of(result.packet)
        assert (ip.src, ip.payload.sport) == (frontend, port)
        assert (ip.dst, ip.payload.dport) == (self.family.client, self.port)
        assert with_right_checksums(result.packet) == result.bytes
