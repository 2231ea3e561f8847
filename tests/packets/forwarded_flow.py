"""Flows that XDP forwards, and their packets."""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable

from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import Flow as FlowKey
from ebpfproxy.datapath.abi.flow_layout import pack_flow
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.wire import REDIRECT, Wire, ip_of

PORTS_OF_CLIENTS = itertools.count(20000)
Segment = Callable[[int, int, str, bytes], Packet]


def tcp(sport: int, dport: int, flags: str, payload: bytes) -> Packet:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000) / Raw(payload)


def udp(sport: int, dport: int, _: str, payload: bytes) -> Packet:
    return UDP(sport=sport, dport=dport) / Raw(payload)


SEGMENTS: dict[str, Segment] = {"TCP": tcp, "UDP": udp}


class Flow:
    """A flow of an external client through a NodePort to the backend on node-b. Its first packet has passed tc."""

    def __init__(self, wire: Wire, family: FamilyAddresses, protocol: str) -> None:
        self._wire, self._family, self._protocol = wire, family, protocol
        self.port = next(PORTS_OF_CLIENTS)
        self.segment = SEGMENTS[protocol]
        _, self.node_port, self.target = PORTS[protocol]
        first = wire.ingress(self.request("S", b"x"))
        assert first.verdict == REDIRECT
        seen = ip_of(first.packet)
        assert (seen.src, seen.dst) == (family.node, family.remote_pod)
        self.seen_as: int = seen.payload.sport

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """Those of its entries in conntrack."""
        number = {"TCP": 6, "UDP": 17}[self._protocol]
        client, node, backend = (
            ipaddress.ip_address(each).packed
            for each in (self._family.client, self._family.node, self._family.remote_pod)
        )
        ends = (client, node, self.port, self.node_port), (backend, node, self.target, self.seen_as)
        original, reply = (pack_flow(FlowKey(*each, number, egress=False)) for each in ends)
        return original, reply

    def request(self, flags: str = "A", payload: bytes = b"request") -> Packet:
        return self._family.ip(self._family.client, self._family.node) / self.segment(
            self.port, self.node_port, flags, payload
        )

    def response(self, flags: str = "A", payload: bytes = b"response") -> Packet:
        return self._family.ip(self._family.remote_pod, self._family.node) / self.segment(
            self.target, self.seen_as, flags, payload
        )
