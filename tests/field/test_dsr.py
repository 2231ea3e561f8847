"""Direct server return between two nodes: replies of the backend's node do not pass the one that got the request."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from ebpfproxy.datapath.abi.flow_layout import with_check
from ebpfproxy.datapath.flows.conntrack_table import Timeouts
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.e2e.outside_client import BALANCER6, HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import BALANCER, EXTERNAL, NODE_PORT
from tests.field.records import maps_of
from tests.lab import Agent, Lab, LabNode, clients, manifests, servers
from tests.lab.spaces import enter_namespace, namespace_restored

pytestmark = pytest.mark.root

UDP_PORT = 30053
#: A Service whose backend is node-b itself.
ON_HOST = "203.0.113.27"
NS = 10**9
_ALL, _OTHER_HOST = 3, 3  # ETH_P_ALL, PACKET_OTHERHOST


class DsrCluster(OutsideClientCluster):
    """The backend of the Service is on node-b, the client's packets come in on node-a."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.pod_on_b = self.b.pod("client-b")
        self.write_web(self.w2)
        ports = [
            {"name": "http", "port": 80, "protocol": "TCP"},
            {"name": "udp", "port": 53, "protocol": "UDP"},
        ]
        endpoint = {"addresses": [self.w2.address6], "nodeName": "node-b", "conditions": {"ready": True}}
        self.add_load_balancer("six", "fd00:10:96::66", BALANCER6, [endpoint], ports=ports)
        servers.start(self.b, "host-b", 8080, 8053)
        on_host = manifests.endpoint(self.b.address, "node-b")
        self.add_load_balancer("host", "10.96.1.7", ON_HOST, [on_host])
        self.agents = {node.name: self.agent_on(node) for node in (self.a, self.b)}

    def agent_on(self, node: LabNode, mode: str = "dsr") -> Agent:
        return node.agent("--external-traffic-mode", mode, manifests=self.manifests).start()

    def flows(self, node: LabNode) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(node.cli("conntrack", "list", "-o", "json"))
        return found

    def addresses(self) -> tuple[tuple[str, str], ...]:
        """Those of node-a, each with the client's."""
        return (self.a.address, self.outside.address), (self.a.address6, self.outside.address6)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DsrCluster]:
    with Lab() as lab:
        yield DsrCluster(lab)


class Capture:
    """What a node's uplink receives and sends for a client: TCP and UDP with its address, by direction."""

    def __init__(self, node: LabNode, client: str) -> None:
        family = socket.AF_INET6 if ":" in client else socket.AF_INET
        self._client = socket.inet_pton(family, client)
        with namespace_restored():
            enter_namespace(f"/run/netns/{node.netns}")
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
            self._socket.bind(("eth0", 0))
        self._socket.setblocking(False)
        self.of_client = self.to_client = 0

    def read(self) -> tuple[int, int]:
        """Returns how many packets of the client, and how many to it, have been seen."""
        while True:
            try:
                frame, address = self._socket.recvfrom(65536)
            except BlockingIOError:
                return self.of_client, self.to_client
            if address[2] != _OTHER_HOST:
                self._count(frame[12:14], frame[14:])

    def _count(self, kind: bytes, ip: bytes) -> None:
        if kind == b"\x08\x00" and ip[9] in (6, 17):
            source, destination = ip[12:16], ip[16:20]
        elif kind == b"\x86\xdd" and ip[6] in (6, 17, 60):
            source, destination = ip[8:24], ip[24:40]
        else:
            return
        self.of_client += source == self._client
        self.to_client += destination == self._client

    def close(self) -> None:
        self._socket.close()


def test_replies_do_not_pass_the_node_that_got_the_request(cluster: DsrCluster) -> None:
    """For NodePorts of both families and protocols. The backend sees the client, which sees the frontend."""
    for address, client in cluster.addresses():
        capture = Capture(cluster.a, client)
        reply = cluster.outside.call(clients.ask_tcp, address, NODE_PORT)
        assert (reply["name"], reply["peer"]) == ("w2", client)
        assert tuple(reply["getpeername"]) == (address, NODE_PORT)
        for ask in (clients.ask_udp, clients.ask_udp_connected):
            reply = cluster.outside.call(ask, address, UDP_PORT)
            assert (reply["peer"], reply["from"]) == (client, (address, UDP_PORT))
        assert cluster.outside.call(clients.is_echoed, address, NODE_PORT, 2_000_000)
        of_client, to_client = capture.read()
        capture.close()
        # What comes in is sent on: both are seen.
        assert of_client > 10
        assert to_client == 0


@pytest.mark.parametrize("address", [EXTERNAL, BALANCER, BALANCER6])
def test_other_frontends_outside_are_answered_by_the_backends_node(cluster: DsrCluster, address: str) -> None:
    client = cluster.outside.address6 if ":" in address else cluster.outside.address
    capture = Capture(cluster.a, client)
    assert cluster.outside.call(clients.ask_tcp, address, 80)["peer"] == client
    assert cluster.outside.call(clients.ask_udp, address, 53)["from"] == (address, 53)
    assert capture.read()[1] == 0
    capture.close()


def test_backend_on_the_host_network_answers_itself(cluster: DsrCluster) -> None:
    capture = Capture(cluster.a, cluster.outside.address)
    reply = cluster.outside.call(clients.ask_tcp, ON_HOST, 80)
    assert (reply["name"], reply["peer"]) == ("host-b", cluster.outside.address)
    assert cluster.outside.call(clients.ask_udp, ON_HOST, 53)["from"] == (ON_HOST, 53)
    assert capture.read()[1] == 0
    capture.close()


def test_clients_on_the_backends_node_get_replies(cluster: DsrCluster) -> None:
    """The node itself is masqueraded by node-a, as it takes no packets with its own address; its pods are not."""
    for address, _ in cluster.addresses():
        for space in (cluster.b, cluster.pod_on_b, cluster.w2):
            reply = space.call(clients.ask_tcp, address, NODE_PORT)
            assert tuple(reply["getpeername"]) == (address, NODE_PORT)
            assert space.call(clients.ask_udp, address, UDP_PORT)["from"] == (address, UDP_PORT)
            pod = cluster.pod_on_b
            assert reply["peer"] in ((pod.address, pod.address6) if space is pod else (address,))


def test_large_and_fragmented_datagrams_arrive(cluster: DsrCluster) -> None:
    """The first ones, which tell of the frontend, and those after them; with and without room for the option."""
    for address, _ in cluster.addresses():
        for sizes in ((2000, 10), (10, 2000, 1400), (1472,), (10, 1472)):
            assert cluster.outside.call(_all_arrive, address, UDP_PORT, sizes), sizes


def _all_arrive(host: str, port: int, sizes: tuple[int, ...]) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        for size in sizes:
            sock.sendto(b"echo".ljust(size, b"."), (host, port))
            data, source = sock.recvfrom(65536)
            assert (len(data), source[:2]) == (size, (host, port))
    return True


def test_commands_show_flows_at_both_nodes(cluster: DsrCluster) -> None:
    held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)
    assert held.ask() == "alive"
    frontend, backend = f"{cluster.a.address}:{NODE_PORT}", f"{cluster.w2.address}:8080"
    for node, role in ((cluster.a, "sent"), (cluster.b, "received")):
        (flow,) = [each for each in cluster.flows(node) if each["state"] == "ESTABLISHED"]
        assert (flow["frontend"], flow["backend"]) == (frontend, backend)
        assert (flow["service"], flow["masquerade"], flow["dsr"]) == ("shop/web", "", role)
    explained = cluster.a.cli("explain", cluster.outside.address, frontend)
    assert "the backend's node answers" in explained
    held.process.kill()


def _age(maps: MapSet, seconds: int) -> None:
    """Makes all flows as if they had begun, and had been silent, since so many seconds before."""
    table = maps["conntrack"]
    for packed, value in list(table.items()):
        changed = bytearray(value)
        for at in (48, 56):
            struct.pack_into("=Q", changed, at, struct.unpack_from("=Q", value, at)[0] - seconds * NS)
        table.update(packed, with_check(packed, changed))


def test_datagrams_get_replies_again_when_the_backends_node_has_lost_its_entries(cluster: DsrCluster) -> None:
    for address, _ in cluster.addresses():
        assert cluster.outside.call(clients.ask_udp, address, UDP_PORT)["name"] == "w2"
        cluster.b.cli("conntrack", "flush", "--all")
        assert cluster.outside.call(clients.ask_udp, address, UDP_PORT)["name"] == "w2"


def test_connections_outlive_sweeps_agents_and_a_change_of_the_mode(cluster: DsrCluster) -> None:
    """They were idle for ten minutes; both agents were killed, and nothing ran meanwhile but a sweep at each node.

    Then node-a masquerades new connections, as its agent has another mode.
    """
    held = [HeldConnection(cluster.outside, address, NODE_PORT) for address, _ in cluster.addresses()]
    assert [each.ask() for each in held] == ["alive", "alive"]
    for node in (cluster.a, cluster.b):
        cluster.agents[node.name].kill()
        with maps_of(node) as maps:
            _age(maps, 600)
            sweeper = Sweeper(maps, Timeouts(), next(maps.folder.glob("progs-*")))
            sweeper.sweep()
            sweeper.close()
    assert [each.ask() for each in held] == ["alive", "alive"]
    for address, client in cluster.addresses():
        assert cluster.outside.call(clients.ask_tcp, address, NODE_PORT)["peer"] == client
    cluster.agent_on(cluster.a, "dsr-accept")
    cluster.agent_on(cluster.b)
    assert [each.ask() for each in held] == ["alive", "alive"]
    for address, _ in cluster.addresses():
        assert cluster.outside.call(clients.ask_tcp, address, NODE_PORT)["peer"] == address
    for each in held:
        each.process.kill()
