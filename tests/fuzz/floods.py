"""Floods from spoofed sources: what is left of others' established flows when the table of flows is full."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from scapy.compat import raw
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import NAT, Flow, pack_flow
from ebpfproxy.datapath.kernel import bpf
from tests.lab import Lab
from tests.packets.packet_cluster import PORTS, V4, PacketCluster
from tests.packets.wire import PASS, PreparedRun

HEAD = (
    "flood, from all CPUs",
    "packets, of the table's entries",
    "idle TCP",
    "idle UDP",
    "TCP with packets in every 10 %",
    "UDP with packets in every 10 %",
)
#: Entries of the table; a flow without masquerading has two.
ENTRIES = 16384
FLOWS = 1000
#: A table in which a flood of masqueraded flows finds an end of ports first.
LARGE = 262144
NEW_HEAD = ("flows of the flood, masqueraded to one backend", "new flows of others that are accepted")
NEW_SIZES = (5_000, 10_000, 15_000, 20_000, 40_000)
#: So many packets of a flood, as multiples of the table's entries.
SIZES = (0.5, 1.0, 2.0, 4.0, 16.0)
#: Active flows send something after so much of the table has been asked for.
PULSE = 0.1
_SOURCE_AT, _DESTINATION_AT, _PORT_AT = 26, 30, 34
_FRONTEND, _POD = (socket.inet_aton(each) for each in (V4.local_balancer, V4.local_pod))
_NUMBERS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
#: Processors of a flood; flows of others are on the first.
_CPUS = sorted(os.sched_getaffinity(0))[:2]


class Victim(NamedTuple):
    """An established flow. The runs, of a packet in each direction, belong to all flows of its protocol."""

    port: int
    original: PreparedRun
    reply: PreparedRun

    def is_translated(self) -> bool:
        """Sends a packet in each direction. The reply comes first: a datagram would begin the flow anew."""
        return (
            _run(self.reply, _PORT_AT + 2, self.port) == PASS
            and self.reply.packet[_SOURCE_AT : _SOURCE_AT + 4] == _FRONTEND
            and _run(self.original, _PORT_AT, self.port) == PASS
            and self.original.packet[_DESTINATION_AT : _DESTINATION_AT + 4] == _POD
        )


def _run(packet: PreparedRun, at: int, port: int) -> int:
    packet.change(at, port.to_bytes(2, "big"))
    return packet()


class Runner:
    """Runs programs on packets, in a process that is in the node's namespace."""

    def __init__(self, cluster: PacketCluster) -> None:
        version = next((cluster.node.bpf_root / "ebpfproxy").glob("v*"))
        programs = next(version.glob("progs-*"))
        self._conntrack = bpf.get_pinned(version / "maps" / "conntrack")
        self._ingress = bpf.get_pinned(programs / "from_device")
        self._egress = bpf.get_pinned(programs / "to_device")
        self._devices = cluster.wire.devices
        self._mac = cluster.wire.mac("eth0")

    def _frame(self, packet: Packet) -> bytes:
        return bytes(raw(Ether(dst=self._mac, src="02:00:00:00:00:99") / packet))

    def _in(self, packet: Packet) -> PreparedRun:
        return PreparedRun(self._ingress, self._frame(packet), self._devices["eth0"][0])

    def _out(self, packet: Packet) -> PreparedRun:
        return PreparedRun(
            self._egress, self._frame(packet), self._devices["eth0"][0], self._devices["p1"][0]
        )

    def _segment(self, protocol: str, flags: str, *, replies: bool = False) -> PreparedRun:
        service_port, _, target = PORTS[protocol]
        ends = {"sport": target, "dport": 1} if replies else {"sport": 1, "dport": service_port}
        segment: Packet = UDP(**ends) / Raw(b"x")
        if protocol == "TCP":
            opens = "S" in flags
            numbers = (2000 + (not opens), 1001) if replies else (1000 + (not opens), 2001)
            segment = TCP(**ends, flags=flags, seq=numbers[0], ack=numbers[1])
        if replies:
            return self._out(V4.ip(V4.local_pod, V4.client) / segment)
        return self._in(V4.ip(V4.client, V4.local_balancer) / segment)

    def victims(self, protocol: str, ports: Iterable[int]) -> list[Victim]:
        """Establishes flows, all of them before any goes on.

        The kernel takes what nobody has used since it was inserted for the first to be evicted.
        """
        begins, confirms = self._segment(protocol, "S"), self._segment(protocol, "SA", replies=True)
        original, reply = self._segment(protocol, "A"), self._segment(protocol, "A", replies=True)
        found = [Victim(port, original, reply) for port in ports]
        for flow in found:
            assert _run(begins, _PORT_AT, flow.port) == PASS
            assert _run(confirms, _PORT_AT + 2, flow.port) == PASS
        for flow in found:
            assert _run(original, _PORT_AT, flow.port) == PASS
            assert self.is_whole(protocol, flow)
        return found

    def is_whole(self, protocol: str, flow: Victim) -> bool:
        """True if a flow is known, and packets of both directions are translated."""
        ends = ipaddress.ip_address(V4.client).packed, ipaddress.ip_address(V4.local_balancer).packed
        number, port = _NUMBERS[protocol], PORTS[protocol][0]
        key = pack_flow(Flow(*ends, flow.port, port, number, egress=False))
        return bpf.map_lookup(self._conntrack, key, NAT.size) is not None and flow.is_translated()

    def _flood(self, protocol: str, count: int, cpu: int) -> Iterator[int]:
        """Sends packets of a flood on one CPU; gives the number of each before it."""
        chance = random.Random(cpu)
        flags = "S" if protocol == "SYN" else ""
        packet = self._segment("TCP" if flags else "UDP", flags)
        for number in range(count):
            yield number
            packet.change(_SOURCE_AT, b"\xc6" + bytes([0x12 + cpu % 2]) + chance.randbytes(2))
            packet.change(_PORT_AT, chance.randrange(1024, 65536).to_bytes(2, "big"))
            packet()

    @contextmanager
    def _flooded_from_elsewhere(self, protocol: str, count: int) -> Iterator[None]:
        """Children send such a flood on all CPUs but the first."""
        children = []
        for cpu in _CPUS[1:]:
            if not (child := os.fork()):
                os.sched_setaffinity(0, {cpu})
                for _ in self._flood(protocol, count, cpu):
                    pass
                os._exit(0)
            children.append(child)
        yield
        for child in children:
            assert os.waitpid(child, 0)[1] == 0

    def survivors(self, protocol: str, size: float, first_port: int, *, active: bool) -> tuple[int, int]:
        """Opens flows of TCP and UDP, floods, and returns how many of each are still whole.

        An active flow is whole if it has been each time.
        """
        os.sched_setaffinity(0, {_CPUS[0]})
        ports = range(first_port, first_port + FLOWS)
        flows = {each: self.victims(each, ports) for each in _NUMBERS}
        count = int(size * ENTRIES / len(_CPUS))
        with self._flooded_from_elsewhere(protocol, count):
            for number in self._flood(protocol, count, _CPUS[0]):
                if active and number % int(PULSE * ENTRIES / len(_CPUS)) == 0:
                    flows = {name: [*filter(Victim.is_translated, some)] for name, some in flows.items()}
        tcp, udp = (sum(self.is_whole(name, each) for each in flows[name]) for name in ("TCP", "UDP"))
        return tcp, udp

    def accepted(self, flood: int, first_port: int) -> int:
        """How many of FLOWS new masqueraded flows find a port after so many of a flood, which are never answered."""
        chance = random.Random(first_port)
        packet = self._in(V4.ip(V4.client, V4.web_balancer) / TCP(sport=1, dport=80, flags="S"))
        for _ in range(flood):
            packet.change(_SOURCE_AT, b"\xc6\x12" + chance.randbytes(2))
            packet.change(_PORT_AT, chance.randrange(1024, 65536).to_bytes(2, "big"))
            packet()
        client = self._in(V4.ip(V4.client, V4.web_balancer) / TCP(sport=1, dport=80, flags="S"))
        found = 0
        for port in range(first_port, first_port + FLOWS):
            client.change(_PORT_AT, port.to_bytes(2, "big"))
            found += client() == PASS
        return found


@contextmanager
def flooded_world(entries: int = ENTRIES) -> Iterator[PacketCluster]:
    """No datagram's flow times out while a slow machine floods."""
    longer = ("--conntrack-udp-timeout", "1h", "--conntrack-udp-timeout-stream", "1h")
    with Lab() as lab:
        cluster = PacketCluster(lab, "--max-conntrack", str(entries), *longer)
        yield cluster
        cluster.wire.close()


def measure(cluster: PacketCluster) -> Iterator[tuple[str, ...]]:
    """The rows of the page."""
    runner = Runner(cluster)
    port = 1024
    for protocol in ("SYN", "UDP"):
        for size in SIZES:
            shares = []
            for active in (False, True):
                left = cluster.node.call(_survivors, runner, protocol, size, port, active, timeout=600)
                shares += [f"{100 * each / FLOWS:.0f} %" for each in left]
                port += FLOWS
            yield protocol, f"{size:g}", *shares


def measure_new(cluster: PacketCluster) -> Iterator[tuple[str, str]]:
    """Each size adds to the floods before."""
    runner = Runner(cluster)
    port, before = 1024, 0
    for size in NEW_SIZES:
        found = cluster.node.call(_accepted, runner, size - before, port, timeout=300)
        yield f"{size:,}", f"{100 * found / FLOWS:.0f} %"
        port, before = port + FLOWS, size


def _accepted(runner: Runner, flood: int, first_port: int) -> int:
    return runner.accepted(flood, first_port)


def _survivors(runner: Runner, protocol: str, size: float, first_port: int, active: bool) -> tuple[int, int]:
    return runner.survivors(protocol, size, first_port, active=active)
