"""``--no-pod-sockets``: a sidecar in a pod sees Service addresses, and packets of pods are translated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS
from tests.lab import Lab, clients
from tests.lab.sidecar import Sidecar

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]


@pytest.fixture
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.agent("--no-pod-sockets").start()
        yield made


def test_sidecar_sees_service_addresses_with_no_pod_sockets(cluster: OutsideClientCluster) -> None:
    sidecar = Sidecar(cluster.client)
    for _ in range(5):
        assert cluster.client.call(clients.ask_tcp, IP, 80)["name"] in ("w1", "w2")
        assert sidecar.next() == f"{IP}:80"
    # Packets of pods without a sidecar are translated: TCP, UDP of both kinds of socket, IPv6, and rejects.
    assert set(cluster.w1.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert set(cluster.w1.call(clients.spread_tcp, SERVICE_IPS["v6"], 80, clients.ENOUGH)) == {"w1", "w2"}
    assert cluster.client.call(clients.ask_udp, IP, 53)["from"] == (IP, 53)
    assert cluster.client.call(clients.ask_udp_connected, IP, 53)["getpeername"] == (IP, 53)
    assert cluster.w1.call(clients.spread_tcp, cluster.a.address, NODE_PORT, 5)
    assert cluster.w1.call(clients.connect_error, IP, 81) == "ECONNREFUSED"
    # The host's sockets are still translated: its connections have no conntrack entries.
    cluster.a.cli("conntrack", "flush", "--all")
    assert cluster.a.call(clients.ask_tcp, IP, 80)["getpeername"] == (IP, 80)
    assert cluster.a.call(clients.connect_error, "127.0.0.1", NODE_PORT) == "connected"
    assert IP not in cluster.a.cli("conntrack", "list")


def test_a_pod_whose_default_route_leads_elsewhere_reaches_services(cluster: OutsideClientCluster) -> None:
    """It has a route to cluster IPs, and none to endpoints by its first network, as pods with several may."""
    for command in (
        "link add net1 type veth peer name beyond1",
        "link set net1 up",
        "link set beyond1 up",
        "address add 192.0.2.2/24 dev net1",
        "route add 10.96.0.0/12 via 10.244.1.1 dev eth0",
        "route replace default via 192.0.2.1 dev net1",
    ):
        cluster.client.run(["ip", *command.split()])
    assert cluster.client.call(clients.ask_tcp, IP, 80)["name"] in ("w1", "w2")
    assert cluster.client.call(clients.ask_udp, IP, 53)["from"] == (IP, 53)
