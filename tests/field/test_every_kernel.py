"""What has to work on every kernel, whatever its settings are: one test for each way of traffic.

tests/kernels runs this file with settings with which most other tests cannot run, such as no IPv6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import VARIANTS, HeldConnection, OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS
from tests.lab import Agent, Lab, clients
from tests.lab.spaces import HAS_IPV6
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.kernels]

PORTS = {
    clients.ask_tcp: (80, NODE_PORT),
    clients.ask_udp: (53, 30053),
    clients.ask_udp_connected: (53, 30053),
}
BOTH = {"w1", "w2"}


class Cluster(OutsideClientCluster):
    """With an agent on node-a."""

    def __init__(self, lab: Lab, options: list[str]) -> None:
        super().__init__(lab)
        self.options = options
        self.running: Agent = self.agent(*options).start()

    def start_again(self) -> None:
        self.running.stop()
        self.running = self.agent(*self.options).start()


@pytest.fixture(scope="module", params=VARIANTS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(takes_xdp=request.param == "xdp") as lab:
        yield Cluster(lab, VARIANTS[request.param])


@pytest.fixture(params=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "v6" and not HAS_IPV6:
        pytest.skip("this kernel has no IPv6")
    return str(request.param)


@pytest.fixture(params=PORTS, ids=lambda ask: ask.__name__)
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    found: Callable[..., Any] = request.param
    return found


def names(replies: list[dict[str, Any]]) -> set[str]:
    return {each["name"] for each in replies}


def test_pods_and_the_node_reach_a_cluster_ip_at_sockets(
    cluster: Cluster, family: str, ask: Callable[..., Any]
) -> None:
    for space in (cluster.client, cluster.a):
        replies = space.call(clients.repeated, clients.ENOUGH, ask, SERVICE_IPS[family], PORTS[ask][0])
        assert names(replies) == BOTH


def test_hosts_outside_reach_a_node_port_in_packets(
    cluster: Cluster, family: str, ask: Callable[..., Any]
) -> None:
    address = cluster.a.address if family == "v4" else cluster.a.address6
    replies = cluster.outside.call(clients.repeated, clients.ENOUGH, ask, address, PORTS[ask][1])
    assert names(replies) == BOTH


def test_pods_whose_sockets_have_no_hook_reach_a_cluster_ip_in_packets(cluster: Cluster, family: str) -> None:
    host = SERVICE_IPS[family] if family == "v4" else f"[{SERVICE_IPS[family]}]"
    assert names([ask_by_socat(cluster.client, f"{host}:80") for _ in range(clients.ENOUGH)]) == BOTH


def test_a_service_without_endpoints_refuses(cluster: Cluster, family: str) -> None:
    address = "10.96.0.20" if family == "v4" else "fd00:10:96::20"
    assert cluster.client.call(clients.connect_error, address, 80) in {"ECONNREFUSED", "EPERM"}


def test_connections_outlive_the_agent_and_the_next_one_counts_on(cluster: Cluster, family: str) -> None:
    address = cluster.a.address if family == "v4" else cluster.a.address6
    held = [
        HeldConnection(cluster.client, SERVICE_IPS[family], 80),
        HeldConnection(cluster.outside, address, NODE_PORT),
    ]
    cluster.start_again()
    assert [each.ask() for each in held] == ["alive", "alive"]


def test_removed_endpoints_get_no_connection(cluster: Cluster, family: str) -> None:
    address = cluster.a.address if family == "v4" else cluster.a.address6

    def answering() -> set[str]:
        many = clients.repeated, clients.ENOUGH, clients.ask_tcp
        replies = cluster.client.call(*many, SERVICE_IPS[family], 80)
        return names(replies + cluster.outside.call(*many, address, NODE_PORT))

    cluster.write_web(cluster.w2)
    until(lambda: answering() == {"w2"}, "w1 is not removed")
    cluster.write_web(cluster.w1, cluster.w2)
    until(lambda: answering() == BOTH, "w1 does not come back")


def test_status_is_healthy(cluster: Cluster) -> None:
    assert json.loads(cluster.a.cli("status", "-o", "json"))["healthy"]


def test_cleanup_leaves_nothing(cluster: Cluster) -> None:
    cluster.running.stop()
    cluster.a.cli("cleanup", *cluster.a.roots[2:])
    assert not cluster.a.bpf_root.exists() or not list(cluster.a.bpf_root.iterdir())
    assert cluster.client.call(clients.connect_error, SERVICE_IPS["v4"], 80, 1.0) != "connected"
