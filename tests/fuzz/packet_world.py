"""The world of ``packets/main.c``: the loaded programs of a node, its Services, and packets to begin with."""

from __future__ import annotations

import enum
import ipaddress
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ebpfproxy.datapath.abi.node_layout import DROPPED, FORWARDED, REJECTED, PacketEvent
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import Traffic
from ebpfproxy.services.model import FrontendKind
from tests.fuzz.packet_seeds import RAW_CLIENTS, seeds
from tests.lab import Lab
from tests.lab.waiting import READY_SECONDS
from tests.packets.dsr_packets import documents as dsr_documents
from tests.packets.packet_cluster import FAMILIES, PORTS, PacketCluster

_RAW_BACKENDS = ("8.0.0.9", "2001:db8:86dd::9")
_KINDS = {"tc": 0, "raw": 1, "xdp": 2, "loopback": 3}
#: This node's.
_PODS = {each for family in FAMILIES for each in (family.local_pod, family.client_pod)}
_NETWORKS = ("10.96.0.0/16", "fd00:10:96::/112")
_PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
_HERE = Path(__file__).parent


class Counts(msgspec.Struct, frozen=True):
    """What one program did with the packets. ``forwarded`` ones are translated, too; the kernel ``refused`` others.

    The option of DSR was sent on some of those that are forwarded, and taken from others, which are in no other count.
    """

    name: str
    runs: int
    passed: int
    dropped: int
    rejected: int
    translated: int
    forwarded: int
    refused: int
    option_sent: int
    option_taken: int


class Outcome(msgspec.Struct, frozen=True):
    """``violations``: how often each rule of ``packets/packets.h`` was broken.

    ``packets`` and ``bytes`` are what Services have to count with ``measureTraffic``; of the ``unsure`` ones nobody
    can tell.
    """

    unserved: int
    packets: int
    bytes: int
    unsure_packets: int
    unsure_bytes: int
    violations: dict[int, int]
    programs: list[Counts]

    def total(self, count: str, *, pin: str = "") -> int:
        """Of the programs that begin with ``pin``."""
        return sum(getattr(each, count) for each in self.programs if each.name.startswith(pin))


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


class Options(enum.IntFlag):
    """Those of the agent that the model needs to know."""

    BYPASS = 1
    XDP = 2
    DSR = 4
    ACCEPTS_DSR = 8


_XDP = ("--xdp", "generic")
_DSR = ("--external-traffic-mode", "dsr")
#: What agents are started with: each has its own programs.
WORLDS: dict[str, tuple[tuple[str, ...], Options]] = {
    "no options": ((), Options(0)),
    "--xdp generic": (_XDP, Options.XDP),
    "--bypass-netfilter": (("--bypass-netfilter",), Options.BYPASS),
    "dsr": (_DSR, Options.DSR | Options.ACCEPTS_DSR),
    "dsr --xdp generic": ((*_DSR, *_XDP), Options.DSR | Options.ACCEPTS_DSR | Options.XDP),
    "dsr-accept": (("--external-traffic-mode", "dsr-accept"), Options.ACCEPTS_DSR),
    "--measure-traffic --xdp generic": (
        ("--measure-traffic", "--measure-connections", *_XDP),
        Options.XDP,
    ),
}
#: Below those of sockets in a lab.
_MASQUERADE_PORTS = 1024, 14999
#: Services whose backends clients outside reach on their own node alone, and those that ranges protect.
_LOCAL = ("local", "elsewhere")
_RANGED = ("ranged", "here-ranged")


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


class PacketWorld:
    """A node with all packet programs loaded: also those for raw devices, the loopback device and XDP.

    The model knows flows from their first packet on, and so packets are sent once.
    """

    def __init__(self, lab: Lab, folder: Path, name: str) -> None:
        self._folder = folder
        self._write_raw_backends(lab.folder / "manifests")
        arguments, self._options = WORLDS[name]
        ports = "-".join(map(str, _MASQUERADE_PORTS))
        arguments = ("--service-cidr", ",".join(_NETWORKS), "--masquerade-ports", ports, *arguments)
        self.cluster = PacketCluster(lab, *arguments, more=dsr_documents())
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
        self._programs = {
            each: self._program(each.pin)
            for each in PROGRAMS
            if each.kind != "xdp" or self._options & Options.XDP
        }
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
        documents = [manifests.service("raw", clusterIPs=["10.96.0.90", "fd00:10:96::90"], ports=ports)]
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
        deadline = time.monotonic() + READY_SECONDS
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
            is_ingress, is_of_pods = each.pin.startswith(("from", "forward")), each.device != "eth0"
            yield f"P {_KINDS[each.kind]} {each.title} {fd} {ifindex} {ingress} {mac} {is_ingress:d} {is_of_pods:d}"
        numbers: dict[Any, int] = {}
        ends = set()
        for row in Dump(self.maps).frontends():
            endpoint, protocol = row.frontend.rsplit("/", 1)
            host, port = endpoint.rsplit(":", 1)
            address = ipaddress.ip_address(host.strip("[]"))
            number = numbers.setdefault((row.namespace, row.name, row.port_name), len(numbers))
            same = [a for a in local if ipaddress.ip_address(a).version == address.version]
            is_node_port = row.type == str(FrontendKind.NODE_PORT)
            is_outside = row.type != str(FrontendKind.CLUSTER_IP) and row.name not in _LOCAL
            kind = is_outside | 2 * (row.name in _RANGED) | 4 * is_node_port
            for each_address in same if is_node_port else [str(address)]:
                ends.add(f"F {_hex(each_address)} {port} {_PROTOCOLS[protocol]} {number} {kind}")
            for backend in row.backends:
                host, port_of = backend.address.rsplit(":", 1)
                host = host.strip("[]")
                ends.add(f"B {_hex(host)} {port_of} {_PROTOCOLS[protocol]} {number} {host in _PODS:d}")
        yield from sorted(ends)
        mtu = next(each["mtu"] for each in links if each["ifname"] == "eth0")
        first, last = _MASQUERADE_PORTS
        yield f"W {self._options.value} {first} {last} {mtu}"
        for each_address in local:
            yield f"O {_hex(each_address)}"
        for each_address in sorted(_PODS):
            yield f"H {_hex(each_address)}"
        yield f"L {self.maps['icmp_bucket'].fd}"
        for network in _NETWORKS:
            found = ipaddress.ip_network(network)
            length = found.prefixlen + (96 if found.version == 4 else 0)
            yield f"N {_hex(str(found.network_address))} {length}"
        known = {each for family in FAMILIES for each in family if isinstance(each, str)}
        for each_address in sorted(known | {*local, *RAW_CLIENTS.values(), *_RAW_BACKENDS}):
            yield f"A {_hex(each_address)}"
        for seed in seeds(accepts_dsr=bool(self._options & Options.ACCEPTS_DSR)):
            yield f"S {seed.hex()}"

    def events(self) -> dict[PacketEvent, int]:
        """What the programs have counted so far."""
        return counters(self.maps["packet_events"])

    def traffic(self) -> list[Traffic]:
        """What each Service has counted."""
        return [*measures.traffic(self.maps).values()]

    def has_flow_cache(self) -> bool:
        """True if a flow was translated from the flow cache: a slot of it was valid."""
        table = self.maps["flow_cache"]
        slots = Map(table.fd, table.spec)
        return any(any(value[-8:]) for _, value in slots.items())

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
    """How many packets that were dropped, rejected, or forwarded at XDP no counter has."""

    def counted(events: frozenset[PacketEvent]) -> int:
        return sum(after[each] - before[each] for each in events)

    refused = outcome.total("dropped") + outcome.total("rejected")
    forwarded = outcome.total("forwarded", pin="forward@")
    return abs(refused - counted(DROPPED | REJECTED)) + abs(forwarded - counted(FORWARDED))


def miscounted(traffic: Iterable[Traffic], outcome: Outcome) -> str:
    """What Services have counted otherwise than the model; empty if they agree."""
    found = [*traffic]
    packets = sum(sum(each[2:]) for each in found)
    size = sum(sum(each[:2]) for each in found)
    if (
        0 <= packets - outcome.packets <= outcome.unsure_packets
        and 0 <= size - outcome.bytes <= outcome.unsure_bytes
    ):
        return ""
    expected = (
        f"{outcome.packets}+{outcome.unsure_packets} packets, {outcome.bytes}+{outcome.unsure_bytes} bytes"
    )
    return f"Services count {packets} packets, {size} bytes, and not {expected}"


@contextmanager
def packet_world(folder: Path, name: str) -> Iterator[PacketWorld]:
    with Lab(takes_xdp=True) as lab:
        world = PacketWorld(lab, folder, name)
        try:
            yield world
        finally:
            world.close()
