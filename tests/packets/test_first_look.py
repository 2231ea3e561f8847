"""The first look at a packet: what it leaves behind of packets of no Service."""

from __future__ import annotations

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Raw

from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import FamilyAddresses
from tests.packets.wire import PASS, Wire

pytestmark = pytest.mark.root


def test_fragment_of_no_service_from_an_address_of_the_service_network_is_not_remembered(
    wire: Wire, family: FamilyAddresses, tables: MapSet, port: int
) -> None:
    """The client is noted, as replies to it must pass; its packet to a pod is no Service's."""
    source = "10.96.77.5" if family.version == 4 else "fd00:10:96::7705"
    udp = UDP(sport=port, dport=9) / Raw(bytes(16))
    if family.version == 4:
        packet = family.ip(source, family.local_pod, flags=1, id=port) / udp
    else:
        packet = family.ip(source, family.local_pod) / IPv6ExtHdrFragment(m=1, id=port) / udp
    known = tables["fragments"].keys()
    assert wire.ingress(packet).verdict == PASS
    assert tables["fragments"].keys() == known
