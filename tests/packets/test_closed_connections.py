"""A client's next connection from the port of a closed one, to the same backend through another frontend."""

from __future__ import annotations

import pytest
from scapy.layers.inet import TCP

from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import ends_of
from tests.packets.wire import Wire

pytestmark = pytest.mark.root

SERVICE_PORT, NODE_PORT, TARGET = PORTS["TCP"]


class PortOfClient:
    """Connections of one client from one port, which keeps its address at the first hook."""

    def __init__(self, wire: Wire, family: FamilyAddresses, port: int) -> None:
        self.wire, self.family, self.port = wire, family, port

    def _send(self, frontend: tuple[str, int], flags: str, seq: int, ack: int = 0) -> int:
        address, dport = frontend
        tcp = TCP(sport=self.port, dport=dport, flags=flags, seq=seq, ack=ack)
        result = self.wire.ingress(self.family.ip(self.family.client, address) / tcp)
        source, port, to, target = ends_of(result.packet)
        assert (source, to, target) == (self.family.client, self.family.remote_pod, TARGET)
        return port

    def _answer(self, port: int, flags: str, seq: int, ack: int) -> None:
        tcp = TCP(sport=TARGET, dport=port, flags=flags, seq=seq, ack=ack)
        reply = self.wire.egress(self.family.ip(self.family.remote_pod, self.family.client) / tcp, iif="eth0")
        assert ends_of(reply.packet)[2:] == (self.family.client, self.port)

    def open(self, frontend: tuple[str, int], seq: int = 1000) -> int:
        """Returns the source port of the packets that leave the first hook."""
        seen = self._send(frontend, "S", seq)
        self._answer(seen, "SA", 5000, seq + 1)
        assert self._send(frontend, "A", seq + 1, 5001) == seen
        return seen

    def close(self, frontend: tuple[str, int], *, reset: bool) -> None:
        seen = self._send(frontend, "R" if reset else "FA", 1001, 5001)
        if not reset:
            self._answer(seen, "FA", 5001, 1002)


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
def test_port_of_a_connection_through_another_frontend_rests_unless_it_was_reset(
    wire: Wire, family: FamilyAddresses, port: int, reset: bool
) -> None:
    """The backend may be in TIME_WAIT, and the client cannot know: to its stack they are different connections."""
    client, first, second = (
        PortOfClient(wire, family, port),
        (family.web, SERVICE_PORT),
        (family.node, NODE_PORT),
    )
    assert client.open(first) == port
    client.close(first, reset=reset)
    assert (client.open(second) == port) is reset


def test_connection_through_the_same_frontend_keeps_the_port(
    wire: Wire, family: FamilyAddresses, port: int
) -> None:
    client, frontend = PortOfClient(wire, family, port), (family.web, SERVICE_PORT)
    assert client.open(frontend) == port
    client.close(frontend, reset=False)
    assert client.open(frontend, 1 << 20) == port


def test_reserved_port_is_kept(wire: Wire, family: FamilyAddresses, port: int) -> None:
    """Servers may insist on a port below 1024 (NFS): the client may have to send its SYN once more."""
    client = PortOfClient(wire, family, port % 1000 + 1)
    first, second = (family.web, SERVICE_PORT), (family.node, NODE_PORT)
    assert client.open(first) == client.port
    client.close(first, reset=False)
    assert client.open(second) == client.port
