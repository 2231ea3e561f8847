"""Floods from spoofed sources: what is left of others' established flows when the table of flows is full."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from scapy.compat import raw
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.kernel import bpf
from tests.lab import Lab
from tests.packets.packet_cluster import V4, PacketCluster
from tests.packets.wire import PASS, PreparedRun

HEAD = ("flood", "packets, of the table's entries", "idle flows", "flows with a packet in every 10 %")
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
_SOURCE_AT, _PORT_AT = 26, 34


class Row(NamedTuple):
    flood: str
    packets: str
    idle: str
    active: str


class Runner:
    """Runs programs on packets, in a process that is in the node's namespace."""

    def __init__(self, cluster: PacketCluster) -> None:
        programs = next((cluster.node.bpf_root / "ebpfproxy").glob("v*/progs-*"))
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

    def original(self, port: int, flags: str) -> PreparedRun:
        tcp = TCP(sport=port, dport=80, flags=flags, seq=1000 + ("A" in flags), ack=2001)
        return self._in(V4.ip(V4.client, V4.local_balancer) / tcp)

    def reply(self, port: int, flags: str) -> PreparedRun:
        tcp = TCP(sport=8080, dport=port, flags=flags, seq=2000 + ("S" not in flags), ack=1001)
        return self._out(V4.ip(V4.local_pod, V4.client) / tcp)

    def flood(self, protocol: str) -> PreparedRun:
        if protocol == "SYN":
            return self._in(V4.ip(V4.client, V4.local_balancer) / TCP(sport=1, dport=80, flags="S"))
        return self._in(V4.ip(V4.client, V4.local_balancer) / UDP(sport=1, dport=53) / Raw(b"x"))

    def survivors(self, protocol: str, size: float, first_port: int, *, active: bool) -> int:
        """Opens flows, floods, and returns how many flows still have both directions."""
        chance = random.Random(1)
        flows = []
        for port in range(first_port, first_port + FLOWS):
            assert self.original(port, "S")() == PASS
            assert self.reply(port, "SA")() == PASS
            flows.append((self.original(port, "A"), self.reply(port, "A")))
        for original, _ in flows:
            assert original() == PASS
        packet = self.flood(protocol)
        for number in range(int(size * ENTRIES)):
            if active and number % int(PULSE * ENTRIES) == 0:
                for original, reply in flows:
                    original()
                    reply()
            packet.change(_SOURCE_AT, b"\xc6\x12" + chance.randbytes(2))
            packet.change(_PORT_AT, chance.randrange(1024, 65536).to_bytes(2, "big"))
            packet()
        # A packet whose flow is not known is rejected, or passes unchanged.
        return sum(
            original() == PASS and original.packet[30:34] != bytes([203, 0, 113, 20]) for original, _ in flows
        )

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
    with Lab() as lab:
        cluster = PacketCluster(lab, "--max-conntrack", str(entries))
        yield cluster
        cluster.wire.close()


def measure(cluster: PacketCluster) -> Iterator[Row]:
    runner = Runner(cluster)
    port = 1024
    for protocol in ("SYN", "UDP"):
        for size in SIZES:
            shares = []
            for active in (False, True):
                left = cluster.node.call(_survivors, runner, protocol, size, port, active, timeout=300)
                shares.append(f"{100 * left / FLOWS:.0f} %")
                port += FLOWS
            yield Row(protocol, f"{size:g}", *shares)


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


def _survivors(runner: Runner, protocol: str, size: float, first_port: int, active: bool) -> int:
    return runner.survivors(protocol, size, first_port, active=active)
