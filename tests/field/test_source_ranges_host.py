"""loadBalancerSourceRanges for processes of the host."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outer import Outer
from tests.lab import Lab, clients, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root

BALANCER, OWN = "203.0.113.70", "203.0.113.71"


@pytest.fixture(scope="module")
def outer() -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        servers.start(made.a, "host-a", 8080, 8053)
        made.agent().start()
        yield made


def _serve(outer: Outer, balancer: str, ranges: list[str]) -> None:
    """Endpoints are the host network, a local pod and a remote pod."""
    endpoints = [manifests.endpoint(outer.a.address, "node-a"), outer.on_a(), outer.on_b()]
    outer.balanced("ranged", "10.96.1.70", balancer, endpoints, loadBalancerSourceRanges=ranges)


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


def test_host_process_in_the_source_ranges_reaches_every_backend(outer: Outer) -> None:
    """It reaches the host-network backend, too."""
    _serve(outer, BALANCER, [f"{outer.a.address}/32"])
    until(
        lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected",
        "the node is not served",
    )
    assert set(outer.a.call(clients.spread_tcp, BALANCER, 80, 60)) == {"host-a", "w1", "w2"}
    assert outer.a.call(clients.ask_tcp, BALANCER, 80)["getpeername"] == (BALANCER, 80)
    assert outer.client.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_host_process_outside_the_source_ranges_is_dropped(outer: Outer) -> None:
    """It is served once its address is added to the ranges."""
    _serve(outer, BALANCER, ["198.51.100.0/24"])
    until(
        lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError",
        "the connection is not dropped",
    )
    _serve(outer, BALANCER, ["198.51.100.0/24", f"{outer.a.address}/31"])
    until(
        lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected",
        "the node is not served",
    )


def test_source_ranges_apply_to_the_bound_address_of_a_socket(outer: Outer) -> None:
    """A socket may be bound to another address of the node."""
    outer.a.run(["ip", "addr", "add", "172.18.0.88/24", "dev", "eth0"])
    _serve(outer, BALANCER, ["172.18.0.88/32"])
    until(lambda: outer.a.call(_bound, BALANCER, "172.18.0.88") != "TimeoutError", "the node is not served")
    found = Counter(outer.a.call(_bound, BALANCER, "172.18.0.88") for _ in range(12))
    assert set(found) <= {"host-a", "w1", "w2"}
    assert outer.a.call(_bound, BALANCER, outer.a.address) == "TimeoutError"
    assert outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_load_balancer_ip_on_a_device_of_the_node_applies_source_ranges(outer: Outer) -> None:
    """Health checks from the node to the IP work if the ranges include the node."""
    outer.a.run(["ip", "addr", "add", f"{OWN}/32", "dev", "lo"])
    _serve(outer, OWN, [f"{outer.a.address}/32"])
    until(
        lambda: outer.a.call(clients.connect_error, OWN, 80, 0.3) == "connected", "the node is not served", 15
    )
    _serve(outer, OWN, ["198.51.100.0/24"])
    until(
        lambda: outer.a.call(clients.connect_error, OWN, 80, 0.3) != "connected",
        "the node is still served",
        15,
    )
