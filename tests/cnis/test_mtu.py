"""Packets that are too big for a part of the way: every size arrives, and errors go to the right client."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from tests.cnis.calico import Calico
from tests.cnis.cluster import Cluster, unhooked
from tests.cnis.flannel import Flannel
from tests.cnis.network import FAMILIES, Network, ip
from tests.lab import Lab, LabNode, Pod, clients
from tests.lab.spaces import Space

pytestmark = [pytest.mark.root, pytest.mark.cnis]

#: Around the sizes that fit into 1400, 1430, 1450 and 1500 bytes with the headers of either family, and beyond.
SIZES = (1352, 1353, 1372, 1373, 1382, 1383, 1402, 1403, 1422, 1423, 1452, 1453, 1472, 1473, 1500, 1900)
_MTU, _MTU6 = 14, 24  # IP_MTU, IPV6_MTU
_BULK = 2_000_000


class Jumbo(Network):
    """Nodes and pods take 9000 bytes, and the way to the client 1400 somewhere behind the client's own device."""

    def prepare(self, node: LabNode) -> None:
        ip(node, "link set eth0 mtu 9000")
        for port in ("br0", f"n{node.number}", "outside"):
            ip(node.lab.switch, f"link set {port} mtu 9000")

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.pod(name)
        ip(pod, "link set eth0 mtu 9000")
        ip(node, f"link set p{len(node.pods)} mtu 9000")
        return pod


NETWORKS: list[Network] = [
    Jumbo("jumbo inside, 1400 outside"),
    Flannel("flannel, VXLAN, iptables", vxlan=True, nftables=False),
    Calico("Calico, VXLAN, nftables", vxlan=True, nftables=True),
]


class MtuCluster(Cluster):
    """``client_outside`` is where the client is."""

    def __init__(self, lab: Lab, network: Network) -> None:
        super().__init__(lab, network)
        self.client_outside: Space = self.outside
        if isinstance(network, Jumbo):
            self.client_outside = _behind_a_narrow_link(self)


def _behind_a_narrow_link(cluster: Cluster) -> Space:
    """Puts the client behind the host outside, which becomes a router with a link of 1400 bytes to the nodes."""
    lab, router = cluster.lab, cluster.outside
    client = Space(f"{lab.id}-far", router.cgroup)
    lab.namespace(client.netns).close()
    ip(
        router,
        f"link add eth1 type veth peer name eth0 netns {client.netns}",
        "link set eth1 mtu 9000 up",
        "address add 198.18.0.254/24 dev eth1",
        "address add 2001:db8:18::fe/64 dev eth1 nodad",
    )
    ip(
        client,
        "link set eth0 mtu 9000 up",
        "address add 198.18.0.1/24 dev eth0",
        "address add 2001:db8:18::1/64 dev eth0 nodad",
        "route add default via 198.18.0.254",
        "route add default via 2001:db8:18::fe",
    )
    # The link's MTU is the router's towards the nodes, and the nodes' towards the router.
    ip(router, "link set eth0 mtu 1400")
    for node in (cluster.a, cluster.b):
        ip(
            node,
            "route add 198.18.0.0/24 via 172.18.0.254 dev eth0 mtu 1400",
            "route add 2001:db8:18::/64 via fd00:172:18::fe dev eth0 mtu 1400",
        )
    return client


@pytest.fixture(scope="module", params=NETWORKS, ids=[each.title for each in NETWORKS])
def cluster(request: pytest.FixtureRequest) -> Iterator[MtuCluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        yield MtuCluster(lab, request.param)


def datagrams(host: str, port: int, sizes: tuple[int, ...]) -> tuple[list[int], int]:
    """Returns the sizes whose datagrams come back, and the path's MTU as the kernel has learned it.

    A packet that was too big is lost; its sender knows better at the next one, which may be the client or the server.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = []
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.3)
        sock.connect((host, port))
        for size in sizes:
            data = b"echo" + random.randbytes(size - 4)
            for _ in range(8):
                try:
                    sock.send(data)
                    if sock.recv(65536) == data:
                        found.append(size)
                        break
                except (TimeoutError, OSError):
                    continue
        level, option = (socket.IPPROTO_IPV6, _MTU6) if ":" in host else (socket.IPPROTO_IP, _MTU)
        return found, sock.getsockopt(level, option)


def _clients(cluster: MtuCluster, family: str) -> list[tuple[str, Space, str, int, int]]:
    """Clients of the endpoint on the other node: who, in which namespace, the address, TCP's port, UDP's port."""
    service = cluster.cluster_ip("far", family)
    node = cluster.address(cluster.a, family)
    ports = cluster.node_port("far"), cluster.node_port("far", "UDP")
    return [
        ("outside", cluster.client_outside, node, *ports),
        ("pod", cluster.client, service, 80, 53),
        ("pod, in packets", unhooked(cluster.client), service, 80, 53),
        ("node", cluster.a, service, 80, 53),
        ("node, in packets", unhooked(cluster.a), service, 80, 53),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_bulk_data_passes_both_ways_where_the_path_is_narrower_than_both_ends(
    cluster: MtuCluster, family: str
) -> None:
    """Megabytes pass in both directions, also where the client or the server first sends segments that are too big."""
    for who, space, address, port, _ in _clients(cluster, family):
        assert space.call(clients.is_echoed, address, port, _BULK), who
    local = cluster.node_port("local")
    assert cluster.client_outside.call(clients.is_echoed, cluster.address(cluster.a, family), local, _BULK)


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_of_all_sizes_pass_where_the_path_is_narrower_than_both_ends(
    cluster: MtuCluster, family: str
) -> None:
    """Datagrams around every MTU of the path come back unchanged, in fragments where they have to be."""
    for who, space, address, _, port in _clients(cluster, family):
        assert space.call(datagrams, address, port, SIZES)[0] == [*SIZES], who


@pytest.mark.parametrize("family", FAMILIES)
def test_a_client_outside_learns_the_mtu_of_the_way_to_the_endpoint(cluster: MtuCluster, family: str) -> None:
    """An error that a datagram of a client outside is too big reaches this client, for the address that it uses."""
    node, port = cluster.address(cluster.a, family), cluster.node_port("far", "UDP")
    # The pods of tunnels take 1430 bytes in both families.
    wanted = 1400 if isinstance(cluster.network, Jumbo) else 1430
    _, mtu = cluster.client_outside.call(datagrams, node, port, (1472, 1472))
    assert mtu == wanted
