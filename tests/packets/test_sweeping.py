"""New and established flows while the sweeper rebuilds the filter that packets look up before conntrack."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP

from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.datapath.test_pressure import OnOtherCpu
from tests.packets.packet_cluster import FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of
from tests.packets.wire import Wire

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

FLOWS = 150
SWEEPS = 6


@pytest.fixture
def sweeper(tables: MapSet) -> Iterator[Sweeper]:
    # The clients acknowledge no reply: their flows would end after 60 s, which an emulator needs for fewer of them.
    made = Sweeper(tables, Timeouts(tcp_unreplied=3600.0), next(tables.folder.glob("progs-*")))
    yield made
    made.close()


def client_of(family: FamilyAddresses, number: int) -> str:
    """The address of a client. Nearly every one has a byte of the filter that no other flow sets."""
    return f"100.64.{number >> 8}.{number & 255}" if family.version == 4 else f"2001:db8:64::{number + 1:x}"


def send_request(wire: Wire, family: FamilyAddresses, number: int, flags: str) -> None:
    """Sends to a Service with a backend on this node, so that no masquerading is needed."""
    client = client_of(family, number)
    tcp = TCP(sport=40000, dport=80, flags=flags, seq=1, ack=1) / PAYLOAD
    seen = wire.ingress(family.ip(client, family.local_balancer) / tcp).packet
    assert ends_of(seen) == (client, 40000, family.local_pod, 8080)


def send_reply(wire: Wire, family: FamilyAddresses, number: int) -> None:
    client = client_of(family, number)
    tcp = TCP(sport=8080, dport=40000, flags="A", seq=1, ack=1) / PAYLOAD
    seen = wire.egress(family.ip(family.local_pod, client) / tcp, iif="p1").packet
    assert ends_of(seen) == (family.local_balancer, 80, client, 40000), f"flow {number}"


def test_no_flow_is_missed_while_the_filter_is_rebuilt(
    wire: Wire, family: FamilyAddresses, tables: MapSet, sweeper: Sweeper
) -> None:
    """Every packet of a flow finds its entry, from the first on, while sweeps follow each other without a pause."""
    sweeps = 0

    def sweep() -> None:
        nonlocal sweeps
        sweeper.sweep()
        sweeps += 1

    with OnOtherCpu(max(os.sched_getaffinity(0)), sweep):
        number = 0
        while number < FLOWS or sweeps < SWEEPS:
            send_request(wire, family, number % 65536, "S")
            send_reply(wire, family, number % 65536)
            for known in random.sample(range(min(number, 65535) + 1), min(number + 1, 3)):
                send_reply(wire, family, known)
                send_request(wire, family, known, "A")
            number += 1
    assert sweeps >= SWEEPS
