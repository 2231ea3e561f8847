"""``--measure-traffic``: what single packets count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Padding

from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import Traffic
from tests.lab import Lab
from tests.packets.packet_cluster import FamilyAddresses, PacketCluster
from tests.packets.wire import DROP, REDIRECT, Wire

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[PacketCluster]:
    with Lab() as lab:
        made = PacketCluster(lab, "--measure-traffic", "--bypass-netfilter")
        yield made
        made.wire.close()


def test_padding_of_a_short_frame_is_not_counted(
    wire: Wire, tables: MapSet, family: FamilyAddresses, port: int
) -> None:
    """Ethernet fills up frames of less than 60 bytes."""
    before = measures.traffic(tables)
    packet = family.ip(family.client, family.node) / TCP(sport=port, dport=30080, flags="S")
    length = len(packet)
    assert wire.ingress(packet / Padding(bytes(6))).verdict == REDIRECT
    new = {number: found for number, found in measures.traffic(tables).items() if number not in before}
    assert list(new.values()) == [Traffic(length, 0, 1, 0)]


def test_packet_that_is_dropped_is_not_counted(
    wire: Wire, tables: MapSet, family: FamilyAddresses, port: int
) -> None:
    """A flow that is sent on from the hook ends there for a packet without hops left."""
    last = {"ttl" if family.version == 4 else "hlim": 1}
    request = family.ip(family.client, family.web_balancer) / TCP(sport=port, dport=80, flags="S")
    assert wire.ingress(request).verdict == REDIRECT
    before = measures.traffic(tables)
    request = family.ip(family.client, family.web_balancer, **last) / TCP(sport=port, dport=80, flags="S")
    assert wire.ingress(request).verdict == DROP
    assert measures.traffic(tables) == before
