"""A Service whose endpoints are all terminating: new connections go to them, as nothing better is there (KEP-1669)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Raw

from tests.lab import Lab, manifests
from tests.packets.packet_cluster import FAMILIES, FamilyAddresses, PacketCluster
from tests.packets.test_flows import ends_of
from tests.packets.wire import Wire

pytestmark = pytest.mark.root

NODE_PORT = 30600
#: So many that a choice among them shows.
BACKENDS = 8
REPEATED = 12


def _documents() -> list[manifests.Document]:
    port = {"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT}
    ips = ["10.96.0.90", "fd00:10:96::90"]
    slices = []
    for family in FAMILIES:
        prefix = family.remote_pod.removesuffix("2")
        endpoints = [
            manifests.endpoint(f"{prefix}{50 + number}", "node-b", ready=False, terminating=True)
            for number in range(BACKENDS)
        ]
        slices.append(manifests.slice_of("leaving", endpoints, ports=[{**port, "port": 8080}]))
    return [manifests.service("leaving", type="NodePort", clusterIPs=ips, ports=[port]), *slices]


@pytest.fixture(scope="module", params=[False, True], ids=["masquerade", "bypass"])
def cluster(request: pytest.FixtureRequest) -> Iterator[PacketCluster]:
    with Lab() as lab:
        options = ["--bypass-netfilter"] if request.param else []
        made = PacketCluster(lab, *options, more=_documents())
        yield made
        made.wire.close()


class Client:
    def __init__(self, wire: Wire, family: FamilyAddresses, port: int) -> None:
        self.wire, self.family, self.port = wire, family, port

    def send(self, flags: str, seq: int, ack: int = 0, payload: bytes = b"") -> str:
        """Returns the backend that gets the segment."""
        tcp = TCP(sport=self.port, dport=NODE_PORT, flags=flags, seq=seq, ack=ack) / Raw(payload)
        result = self.wire.ingress(self.family.ip(self.family.client, self.family.node) / tcp)
        return ends_of(result.packet)[2]


@pytest.fixture
def client(wire: Wire, family: FamilyAddresses, port: int) -> Client:
    return Client(wire, family, port)


@pytest.mark.parametrize("payload", [b"", b"GET /"], ids=["", "fast-open"])
def test_syn_that_is_sent_again_stays_with_its_backend(client: Client, payload: bytes) -> None:
    """As with netfilter: the first backend may be about to answer. Data in a SYN may not be sent again with it."""
    backend = client.send("S", 1000, payload=payload)
    assert {client.send("S", 1000) for _ in range(REPEATED)} == {backend}


def test_late_syn_moves_no_established_connection(client: Client) -> None:
    backend = client.send("S", 1000)
    for seq, payload in ((1001, b""), (1001, b"x" * 500), (1501, b"x" * 500)):
        assert client.send("A", seq, 5001, payload) == backend
    assert {client.send("S", 1000) for _ in range(REPEATED)} == {backend}
    assert client.send("A", 2001, 5001) == backend


def test_syn_of_another_connection_gets_any_backend(client: Client) -> None:
    """The client may have lost the former one unnoticed."""
    assert len({client.send("S", 1000 + (number << 20)) for number in range(4 * REPEATED)}) > 1
