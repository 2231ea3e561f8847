"""loadBalancerSourceRanges for processes of the host."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import PORTS, OutsideClientCluster, ask_by_socat
from tests.lab import Lab, clients, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root

BALANCER, OWN = "203.0.113.70", "203.0.113.71"


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        servers.start(made.a, "host-a", 8080, 8053)
        made.agent().start()
        yield made


def _serve(cluster: OutsideClientCluster, balancer: str, ranges: list[str]) -> None:
    """Endpoints are the host network, a local pod and a remote pod."""
    endpoints = [
        manifests.endpoint(cluster.a.address, "node-a"),
        cluster.endpoint_on_a(),
        cluster.endpoint_on_b(),
    ]
    ports = [*PORTS, {"name": "sctp", "port": 3868, "protocol": "SCTP"}]
    cluster.add_load_balancer(
        "ranged", "10.96.1.70", balancer, endpoints, ports=ports, loadBalancerSourceRanges=ranges
    )


def _bound(host: str, source: str) -> str:
    with socket.socket() as sock:
        sock.settimeout(0.5)
        sock.bind((source, 0))
        try:
            sock.connect((host, 80))
            found: dict[str, Any] = json.loads(sock.recv(4096))
        except OSError as error:
            return type(error).__name__
        return str(found["name"])


def test_host_process_in_the_source_ranges_reaches_every_backend(cluster: OutsideClientCluster) -> None:
    """It reaches the host-network backend, too."""
    _serve(cluster, BALANCER, [f"{cluster.a.address}/32"])
    until(
        lambda: cluster.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected",
        "the node is not served",
    )
    assert set(cluster.a.call(clients.spread_tcp, BALANCER, 80, 60)) == {"host-a", "w1", "w2"}
    assert cluster.a.call(clients.ask_tcp, BALANCER, 80)["getpeername"] == (BALANCER, 80)
    assert cluster.client.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_host_process_outside_the_source_ranges_is_dropped(cluster: OutsideClientCluster) -> None:
    """It is served once its address is added to the ranges."""
    _serve(cluster, BALANCER, ["198.51.100.0/24"])
    until(
        lambda: cluster.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError",
        "the connection is not dropped",
    )
    _serve(cluster, BALANCER, ["198.51.100.0/24", f"{cluster.a.address}/31"])
    until(
        lambda: cluster.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected",
        "the node is not served",
    )


def test_source_ranges_apply_to_the_bound_address_of_a_socket(cluster: OutsideClientCluster) -> None:
    """A socket may be bound to another address of the node."""
    cluster.a.run(["ip", "addr", "add", "172.18.0.88/24", "dev", "eth0"])
    _serve(cluster, BALANCER, ["172.18.0.88/32"])
    until(lambda: cluster.a.call(_bound, BALANCER, "172.18.0.88") != "TimeoutError", "the node is not served")
    found = Counter(cluster.a.call(_bound, BALANCER, "172.18.0.88") for _ in range(12))
    assert set(found) <= {"host-a", "w1", "w2"}
    assert cluster.a.call(_bound, BALANCER, cluster.a.address) == "TimeoutError"
    assert cluster.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_load_balancer_ip_on_a_device_of_the_node_applies_source_ranges(
    cluster: OutsideClientCluster,
) -> None:
    """Health checks from the node to the IP work if the ranges include the node."""
    cluster.a.run(["ip", "addr", "add", f"{OWN}/32", "dev", "lo"])
    _serve(cluster, OWN, [f"{cluster.a.address}/32"])
    until(
        lambda: cluster.a.call(clients.connect_error, OWN, 80, 0.3) == "connected",
        "the node is not served",
        15,
    )
    until(lambda: "source ranges:  allowed" in _explained(cluster), "explain says something else")
    assert {ask_by_socat(cluster.a, f"{OWN}:80")["name"] for _ in range(3)} <= {"host-a", "w1", "w2"}, (
        "packets at lo have the IP as their source"
    )
    _serve(cluster, OWN, ["198.51.100.0/24"])
    until(
        lambda: cluster.a.call(clients.connect_error, OWN, 80, 0.3) != "connected",
        "the node is still served",
        15,
    )
    assert ask_by_socat(cluster.a, f"{OWN}:80") == {}
    assert "source ranges:  denied" in _explained(cluster)


def _explained(cluster: OutsideClientCluster) -> str:
    """What explain says of SCTP, which passes no socket hook, from the host to the IP on its device."""
    return cluster.a.cli("explain", "host", f"{OWN}:3868", "--protocol", "SCTP", check=False)
