"""Source ranges of a load balancer, for processes of the node itself."""

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
    """One backend on the host's own network, one in a pod here, one elsewhere."""
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


def test_a_host_process_in_the_ranges_reaches_every_backend(outer: Outer) -> None:
    """A process of the node, whose address the ranges have, reaches backends on the node's own network, too."""
    _serve(outer, BALANCER, [f"{outer.a.address}/32"])
    until(lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected", "allowed")
    assert set(outer.a.call(clients.spread_tcp, BALANCER, 80, 60)) == {"host-a", "w1", "w2"}
    assert outer.a.call(clients.ask_tcp, BALANCER, 80)["getpeername"] == (BALANCER, 80)
    assert outer.client.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_a_host_process_outside_the_ranges_is_dropped(outer: Outer) -> None:
    """A process of the node, whose address the ranges do not have, gets no answer; as soon as they have it, it does."""
    _serve(outer, BALANCER, ["198.51.100.0/24"])
    until(lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError", "dropped")
    _serve(outer, BALANCER, ["198.51.100.0/24", f"{outer.a.address}/31"])
    until(lambda: outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "connected", "allowed")


def test_a_bound_socket_is_judged_by_its_own_address(outer: Outer) -> None:
    """A socket that is bound to another address of the node asks by that one."""
    outer.a.run(["ip", "addr", "add", "172.18.0.88/24", "dev", "eth0"])
    _serve(outer, BALANCER, ["172.18.0.88/32"])
    until(lambda: outer.a.call(_bound, BALANCER, "172.18.0.88") != "TimeoutError", "allowed")
    found = Counter(outer.a.call(_bound, BALANCER, "172.18.0.88") for _ in range(12))
    assert set(found) <= {"host-a", "w1", "w2"}
    assert outer.a.call(_bound, BALANCER, outer.a.address) == "TimeoutError"
    assert outer.a.call(clients.connect_error, BALANCER, 80, 0.3) == "TimeoutError"


def test_a_node_that_has_the_address_itself_reaches_it(outer: Outer) -> None:
    """Health checks to a load balancer's address on a device of the node go on, where the ranges have the node."""
    outer.a.run(["ip", "addr", "add", f"{OWN}/32", "dev", "lo"])
    _serve(outer, OWN, [f"{outer.a.address}/32"])
    until(lambda: outer.a.call(clients.connect_error, OWN, 80, 0.3) == "connected", "allowed", 15)
    _serve(outer, OWN, ["198.51.100.0/24"])
    until(lambda: outer.a.call(clients.connect_error, OWN, 80, 0.3) != "connected", "not allowed", 15)
