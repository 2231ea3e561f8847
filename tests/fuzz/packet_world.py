"""The world of ``packets/main.c``: the loaded programs of a node, its Services, and packets to begin with."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, UDP, IPOption_NOP, IPOption_Router_Alert, fragment
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

from ebpfproxy.datapath.abi.node_layout import DROPPED, REJECTED, PacketEvent
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from ebpfproxy.services.model import FrontendKind
from tests.lab import Lab
from tests.packets.packet_cluster import FAMILIES, PORTS, FamilyAddresses, PacketCluster

#: The EtherTypes of both families, which raw packets have where a source address begins: the kernel reads the protocol
#: of a test run from there.
RAW_CLIENTS = {4: "8.0.0.7", 6: "2001:db8:86dd::7"}
_RAW_BACKENDS = ("8.0.0.9", "2001:db8:86dd::9")
_KINDS = {"tc": 0, "raw": 1, "xdp": 2, "loopback": 3}
_NETWORKS = ("10.96.0.0/16", "fd00:10:96::/112")
_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
_HERE = Path(__file__).parent


class Counts(msgspec.Struct, frozen=True):
    """What one program did with the packets. ``forwarded`` ones are translated, too; the kernel ``refused`` others."""

    name: str
    runs: int
    passed: int
    dropped: int
    rejected: int
    translated: int
    forwarded: int
    refused: int


class Outcome(msgspec.Struct, frozen=True):
    """``violations``: how often each rule of ``packets/packets.h`` was broken."""

    unserved: int
    violations: dict[int, int]
    programs: list[Counts]


class Program(NamedTuple):
    kind: str
    pin: str
    device: str
    ingress: str = ""

    @property
    def title(self) -> str:
        return f"{self.pin}@{self.device}" + (f"<{self.ingress}" if self.ingress else "")


PROGRAMS = (
    Program("tc", "from_device", "eth0"),
    Program("tc", "from_device", "p1"),
    Program("tc", "from_device", "p2"),
    Program("tc", "to_device", "eth0"),
    Program("tc", "to_device", "eth0", "p1"),
    Program("tc", "to_device", "p1", "eth0"),
    Program("tc", "to_device", "p2"),
    Program("raw", "from_device-raw", "p2"),
    Program("raw", "to_device-raw", "p1", "eth0"),
    Program("loopback", "to_loopback", "lo"),
    Program("xdp", "forward", "eth0"),
)


def build(folder: Path, *flags: str) -> Path:
    """Compiles the program that sends packets."""
    program = folder / "packets"
    sources = sorted(map(str, (_HERE / "packets").glob("*.c")))
    command = ["clang", "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(program), *sources]
    subprocess.run(command, check=True)
    return program


def _hex(address: str) -> str:
    found = ipaddress.ip_address(address)
    packed = found.packed
    return (packed if found.version == 6 else bytes(10) + b"\xff\xff" + packed).hex()


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
    from scapy.layers.inet import TCP  # noqa: PLC0415

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


def _seeds() -> Iterator[bytes]:
    for family in FAMILIES:
        for packet in _packets(family):
            yield raw(Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:99") / packet)
    first = next(_packets(FAMILIES[0]))
    yield raw(Ether() / Dot1Q(vlan=7) / first)
    yield raw(Ether() / ARP(pdst="10.96.0.10"))


class PacketWorld:
    """A node with all packet programs loaded: also those for raw devices, the loopback device and XDP."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._folder = folder
        self._write_raw_backends(lab.folder / "manifests")
        self.cluster = PacketCluster(lab, "--service-cidr", ",".join(_NETWORKS), "--xdp", "generic")
        node = self.cluster.node
        # A device without a link layer, for which the agent loads programs of its own.
        node.run(["ip", "tuntap", "add", "tun0", "mode", "tun"])
        node.run(["ip", "address", "add", "172.30.0.1/24", "dev", "tun0"])
        node.run(["ip", "link", "set", "tun0", "up"])
        for hop in ("172.18.0.254", "fd00:172:18::fe", "172.18.0.2", "fd00:172:18::2"):
            node.run(
                [
                    "ip",
                    "neighbour",
                    "replace",
                    hop,
                    "lladdr",
                    "02:00:00:00:00:fe",
                    "dev",
                    "eth0",
                    "nud",
                    "permanent",
                ]
            )
        self._version = next((node.bpf_root / "ebpfproxy").glob("v*"))
        self._programs = {each: self._program(each.pin) for each in PROGRAMS}
        self.maps: MapSet = open_pinned(self._version)
        self._executable = build(folder)

    @staticmethod
    def _write_raw_backends(folder: Path) -> None:
        from tests.lab import manifests  # noqa: PLC0415

        ports = [
            {"name": name.lower(), "port": port, "protocol": name, "nodePort": 0}
            for name, (port, _, _) in PORTS.items()
        ]
        targets = [
            {"name": name.lower(), "port": target, "protocol": name} for name, (_, _, target) in PORTS.items()
        ]
        documents = [manifests.service("raw", clusterIPs=["10.96.0.70", "fd00:10:96::70"], ports=ports)]
        documents += [
            manifests.slice_of("raw", [manifests.endpoint(each, "node-b")], ports=targets)
            for each in _RAW_BACKENDS
        ]
        manifests.write(folder / "raw.yaml", *documents)

    def close(self) -> None:
        self.maps.close()
        for fd in self._programs.values():
            os.close(fd)
        self.cluster.wire.close()

    def _program(self, pin: str) -> int:
        deadline = time.monotonic() + 60
        while not (found := list(self._version.glob(f"progs-*/{pin}"))):
            assert time.monotonic() < deadline, f"{pin} is not loaded:\n{self.cluster.agent.text}"
            time.sleep(0.05)
        return bpf.get_pinned(found[0])

    def _lines(self) -> Iterator[str]:
        links = json.loads(self.cluster.node.run(["ip", "-j", "address"]))
        devices = {
            each["ifname"]: (each["ifindex"], each.get("address", "").replace(":", "") or "00")
            for each in links
        }
        local = [known["local"] for each in links for known in each["addr_info"]]
        for each, fd in self._programs.items():
            ifindex, mac = devices[each.device]
            ingress = devices[each.ingress][0] if each.ingress else 0
            mac = mac if each.kind != "raw" else "00" * 6
            yield f"P {_KINDS[each.kind]} {each.title} {fd} {ifindex} {ingress} {mac}"
        numbers: dict[Any, int] = {}
        ends = set()
        for row in Dump(self.maps).frontends():
            endpoint, protocol = row.frontend.rsplit("/", 1)
            host, port = endpoint.rsplit(":", 1)
            address = ipaddress.ip_address(host.strip("[]"))
            number = numbers.setdefault((row.namespace, row.name, row.port_name), len(numbers))
            same = [a for a in local if ipaddress.ip_address(a).version == address.version]
            for each_address in same if row.type == str(FrontendKind.NODE_PORT) else [str(address)]:
                ends.add(f"F {_hex(each_address)} {port} {_PROTOCOLS[protocol]} {number}")
            for backend in row.backends:
                host, port_of = backend.address.rsplit(":", 1)
                ends.add(f"B {_hex(host.strip('[]'))} {port_of} {_PROTOCOLS[protocol]} {number}")
        yield from sorted(ends)
        yield f"L {self.maps['icmp_bucket'].fd}"
        for network in _NETWORKS:
            found = ipaddress.ip_network(network)
            length = found.prefixlen + (96 if found.version == 4 else 0)
            yield f"N {_hex(str(found.network_address))} {length}"
        known = {each for family in FAMILIES for each in family if isinstance(each, str)}
        for each_address in sorted(known | {*local, *RAW_CLIENTS.values(), *_RAW_BACKENDS}):
            yield f"A {_hex(each_address)}"
        for seed in _seeds():
            yield f"S {seed.hex()}"

    def events(self) -> dict[PacketEvent, int]:
        """What the programs have counted so far."""
        return counters(self.maps["packet_events"])

    def send(self, count: int, seed: int) -> tuple[Outcome, Path]:
        """Sends ``count`` packets; the path is that of the broken rules with their packets."""
        world, report = self._folder / "world.txt", self._folder / f"violations-{seed}.txt"
        world.write_text("\n".join(self._lines()) + "\n")
        command = [str(self._executable), str(world), str(count), str(seed), str(report)]
        inside = ["nsenter", f"--net=/run/netns/{self.cluster.node.netns}", *command]
        kept = (*self._programs.values(), self.maps["icmp_bucket"].fd)
        done = subprocess.run(inside, pass_fds=kept, stdout=subprocess.PIPE, check=True)
        return msgspec.json.decode(done.stdout, type=Outcome, strict=False), report


def uncounted(before: dict[PacketEvent, int], after: dict[PacketEvent, int], outcome: Outcome) -> int:
    """How many of the packets that were dropped or rejected no counter has."""
    counted = sum(after[each] - before[each] for each in DROPPED | REJECTED)
    return sum(each.dropped + each.rejected for each in outcome.programs) - counted


@contextmanager
def packet_world(folder: Path) -> Iterator[PacketWorld]:
    with Lab(takes_xdp=True) as lab:
        world = PacketWorld(lab, folder)
        try:
            yield world
        finally:
            world.close()
