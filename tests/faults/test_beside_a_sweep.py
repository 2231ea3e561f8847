"""New flows get ports of flows that have timed out, while the sweep ends these on another CPU."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from scapy.layers.inet import UDP

from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from tests.datapath.test_pressure import OnOtherCpu, on_cpu
from tests.lab import Lab
from tests.packets.early_drop.clients import TARGETS
from tests.packets.packet_cluster import FAMILIES, PORTS, FamilyAddresses, PacketCluster
from tests.packets.wire import DROP, PreparedRun, Wire

pytestmark = [
    pytest.mark.root,
    pytest.mark.faults,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

#: So few that flows have to end for others.
FIRST, LAST = 61000, 61255
TIMEOUT = 0.012
#: Between two sweeps, so that there is something to end.
PAUSE = 0.002
#: Without claims about one of 250,000 datagrams was lost.
SECONDS = 45.0
#: None comes twice: a packet of a flow that is over may find one half of it.
CLIENT, CLIENT_PORTS = 20, range(1024, 60000)


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    with Lab() as lab:
        made = PacketCluster(lab, "--masquerade-ports", f"{FIRST}-{LAST}")
        yield made
        made.wire.close()


@pytest.fixture(scope="module")
def tables(cluster: PacketCluster) -> Iterator[MapSet]:
    with closing(open_pinned(next((cluster.node.bpf_root / "ebpfproxy").glob("v*")))) as opened:
        yield opened


class Datagrams:
    """Datagrams of clients outside to a backend elsewhere, each from a new port, and their replies."""

    def __init__(self, wire: Wire, family: FamilyAddresses) -> None:
        port, target = PORTS["UDP"][1], TARGETS["UDP"]
        asked = family.ip(family.client, family.node) / UDP(dport=port) / b"?"
        chosen = family.ip(family.client, family.remote_pod) / UDP(dport=target) / b"?"
        answer = family.ip(family.remote_pod, family.node) / UDP(sport=target) / b"!"
        self._arrives = wire.prepared("from_device", "eth0", asked)
        self._leaves = wire.prepared("to_device", "eth0", chosen, iif="eth0")
        self._returns = wire.prepared("from_device", "eth0", answer)
        self._ports_at = 34 if family.version == 4 else 54
        #: The last byte of the client's address.
        self._client_at = 29 if family.version == 4 else 37
        self.lost: list[str] = []
        self.sent = 0

    def send(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            number, port = divmod(self.sent, len(CLIENT_PORTS))
            self._send(bytes([CLIENT + number]), struct.pack("!H", CLIENT_PORTS[port]))
            self.sent += 1

    def _send(self, client: bytes, packed: bytes) -> None:
        began = time.monotonic()
        for each in (self._arrives, self._leaves):
            each.change(self._client_at, client)
            each.change(self._ports_at, packed)
        if self._arrives() == DROP:
            # All ports that it has looked at are in use.
            return
        self._leaves()
        left = self._ports_of(self._leaves)[:2]
        self._returns.change(self._ports_at + 2, left)
        self._returns()
        back = self._ports_of(self._returns)[2:]
        is_right = left != packed and back == packed
        # Where this process has waited, the flow may have timed out.
        if not is_right and time.monotonic() - began < TIMEOUT / 2:
            self.lost.append(f"{packed.hex()} left from {left.hex()}, and was answered at {back.hex()}")

    def _ports_of(self, run: PreparedRun) -> bytes:
        return run.packet[self._ports_at : self._ports_at + 4]


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_port_that_another_flow_has_got_is_not_taken_by_the_sweep(
    cluster: PacketCluster, tables: MapSet, family: FamilyAddresses
) -> None:
    """A sweep on another CPU ends flows whose ports new ones get: it deletes by key, which may be the new flow's."""
    wire = cluster.wire
    sweeper = Sweeper(tables, Timeouts(udp=TIMEOUT, udp_stream=TIMEOUT), next(tables.folder.glob("progs-*")))
    datagrams = Datagrams(wire, family)
    cpus = os.sched_getaffinity(0)

    def send() -> None:
        with on_cpu(min(cpus)):
            datagrams.send(SECONDS)

    def sweep() -> None:
        sweeper.sweep()
        time.sleep(PAUSE)

    with closing(sweeper), OnOtherCpu(max(cpus), sweep):
        wire.within(send)
    assert not datagrams.lost, f"{len(datagrams.lost)} of {datagrams.sent}: {datagrams.lost[:3]}"
