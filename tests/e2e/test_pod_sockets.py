"""Pods whose sockets are left alone: what redirects in a pod sees Services, and packets are translated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT, SERVICE_IPS
from tests.lab import Lab, clients
from tests.lab.sidecar import Sidecar

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]


@pytest.fixture
def outer() -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.agent("--no-pod-sockets").start()
        yield made


def test_a_mesh_in_a_pod_sees_services_and_all_goes_on(outer: Outer) -> None:
    mesh = Sidecar(outer.client)
    for _ in range(5):
        assert outer.client.call(clients.ask_tcp, IP, 80)["name"] in ("w1", "w2")
        assert mesh.next() == f"{IP}:80"
    # Without a mesh, packets of pods are translated: TCP, UDP in both ways, IPv6, what is refused.
    assert set(outer.w1.call(clients.spread_tcp, IP, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert set(outer.w1.call(clients.spread_tcp, SERVICE_IPS["v6"], 80, clients.ENOUGH)) == {"w1", "w2"}
    assert outer.client.call(clients.ask_udp, IP, 53)["from"] == (IP, 53)
    assert outer.client.call(clients.ask_udp_connected, IP, 53)["getpeername"] == (IP, 53)
    assert outer.w1.call(clients.spread_tcp, outer.a.address, NODE_PORT, 5)
    assert outer.w1.call(clients.connect_error, IP, 81) == "ECONNREFUSED"
    # The host's sockets are served as ever: its connections are no flows.
    outer.a.cli("conntrack", "flush", "--all")
    assert outer.a.call(clients.ask_tcp, IP, 80)["getpeername"] == (IP, 80)
    assert outer.a.call(clients.connect_error, "127.0.0.1", NODE_PORT) == "connected"
    assert IP not in outer.a.cli("conntrack", "list")
