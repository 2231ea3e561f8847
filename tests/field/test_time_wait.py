"""Backends that close connections first, whose sockets are in TIME_WAIT for a minute.

Such a socket answers a SYN that looks older than its connection with an ACK, which another client resets.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.outside_client import VARIANTS, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, Pod, manifests
from tests.lab.processes import read_line
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: As many connections as there are ports.
FIRST, COUNT = 61000, 16
CLIENT = 20000
TARGET = 8099


def _stay_on_one_cpu() -> None:
    """Packets of both sides are in order then: a FIN that overtakes an ACK makes the client reset the TIME_WAIT."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _serve() -> None:
    """Accepts connections, closes each at once, and prints the port that it came from."""
    _stay_on_one_cpu()
    with socket.create_server(("::", TARGET), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        print("ready", flush=True)
        while True:
            connection, peer = listener.accept()
            connection.close()
            print(json.dumps(peer[1]), flush=True)


def _connect(host: str) -> None:
    """Connects, each time from another port, and closes after the server.

    A client that uses its port again gets the same port of the node again, and the kernel chooses by chance.
    """
    _stay_on_one_cpu()
    for number in range(COUNT):
        source = "", CLIENT + number
        with socket.create_connection((host, NODE_PORT), 30, source_address=source) as sock:
            assert not sock.recv(1)


def _in_time_wait() -> int:
    """How many sockets of the server are in TIME_WAIT."""
    rows = [
        line.split()
        for family in ("tcp", "tcp6")
        for line in Path("/proc/net", family).read_text().splitlines()[1:]
    ]
    return sum(row[1].endswith(f":{TARGET:04X}") and row[3] == "06" for row in rows)


def _write(cluster: OutsideClientCluster, pod: Pod) -> None:
    port = {"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT}
    slices = [
        manifests.slice_of(
            "web", [manifests.endpoint(address, pod.node.name)], ports=[{**port, "port": TARGET}]
        )
        for address in (pod.address, pod.address6)
    ]
    service = manifests.service(
        "web", type="NodePort", clusterIPs=["10.96.0.10", "fd00:10:96::10"], ports=[port]
    )
    manifests.write(cluster.manifests / "web.yaml", service, *slices)


@pytest.fixture(scope="module", params=VARIANTS)
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        _write(made, made.w2)
        made.agent("--masquerade-ports", f"{FIRST}-{FIRST + COUNT - 1}", *VARIANTS[request.param]).start()
        # Sequence numbers alone tell then, and those of two connections are in no order.
        made.outside.run(["sysctl", "-qw", "net.ipv4.tcp_timestamps=0"])
        yield made


@pytest.mark.parametrize("version", [4, 6])
def test_each_of_many_short_connections_gets_another_port(
    cluster: OutsideClientCluster, version: int
) -> None:
    """No SYN meets a socket in TIME_WAIT: all of these are left when the last connection has ended."""
    server = cluster.w2.popen(
        [sys.executable, "-c", "from tests.field.test_time_wait import _serve; _serve()"], stdout=-1
    )
    assert read_line(server) == "ready"
    try:
        before = cluster.w2.call(_in_time_wait)
        cluster.outside.call(_connect, cluster.a.address if version == 4 else cluster.a.address6)
        ports = {int(read_line(server)) for _ in range(COUNT)}
        assert ports == set(range(FIRST, FIRST + COUNT))
        # The client closes last, and the server may not know yet.
        until(lambda: cluster.w2.call(_in_time_wait) - before == COUNT)
    finally:
        server.kill()
        server.wait()
