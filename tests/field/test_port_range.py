"""Masquerading with source ports that overlap with ``ip_local_port_range``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, clients
from tests.lab.processes import read_line
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053
#: Few ports, so that each is tried for a new flow; host sockets use all but one.
PORTS = range(40000, 40004)
#: Keeps sockets from each port to HOST:8080 (TCP) and HOST:8053 (UDP) open; prints ``alive`` if all work.
HOLDS = """
import json, socket, sys
host, held = sys.argv[1], []
family = socket.AF_INET6 if ":" in host else socket.AF_INET
for port in map(int, sys.argv[2:]):
    for kind, to in ((socket.SOCK_STREAM, 8080), (socket.SOCK_DGRAM, 8053)):
        sock = socket.socket(family, kind)
        sock.settimeout(3)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port))
        if kind == socket.SOCK_STREAM:
            sock.connect((host, to))
            json.loads(sock.recv(4096))
        held.append((sock, kind, to))
print("ready", flush=True)
for line in sys.stdin:
    for sock, kind, to in held:
        if kind == socket.SOCK_STREAM:
            sock.sendall(b"x")
            assert sock.recv(10)
        else:
            sock.sendto(b"?", (host, to))
            assert json.loads(sock.recv(4096))["name"] == "w2"
    print("alive", flush=True)
"""


def set_range() -> None:
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1024 65535")


class Holder:
    """Host sockets with these source ports and a backend as peer, connected TCP and unconnected UDP."""

    def __init__(self, space: Space, host: str, *ports: int) -> None:
        command = [sys.executable, "-c", HOLDS, host, *map(str, ports)]
        self._process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert read_line(self._process) == "ready"

    def ask(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return read_line(self._process)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    """The only backend is remote, so that external clients are masqueraded."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.write_web(made.w2)
        made.a.call(set_range)
        made.agent().start()
        yield made


def ask_both(cluster: OutsideClientCluster, address: str, times: int) -> None:
    for _ in range(times):
        assert cluster.outside.call(clients.ask_tcp, address, NODE_PORT)["name"] == "w2"
        assert cluster.outside.call(clients.ask_udp, address, UDP_NODE_PORT)["name"] == "w2"


def test_agent_starts_if_ip_local_port_range_is_all_ports(cluster: OutsideClientCluster) -> None:
    """It uses a fixed range, and reports in log and status that the range overlaps."""
    for address in (cluster.a.address, cluster.a.address6):
        ask_both(cluster, address, 1)
    agent = cluster.lab.agents[-1]
    assert agent.text.count("32768-65535") == 1
    problems = json.loads(cluster.a.cli("status", "-o", "json"))["problems"]
    assert any("32768-65535" in problem for problem in problems)


def test_masquerading_uses_no_source_port_of_a_host_socket(cluster: OutsideClientCluster) -> None:
    """A configured range may overlap, too: only the port that no socket uses is selected."""
    cluster.lab.agents[-1].stop()
    agent = cluster.agent("--masquerade-ports", f"{PORTS[0]}-{PORTS[-1]}").start()
    assert agent.text.count("40000-40003") == 1
    for address, backend in (
        (cluster.a.address, cluster.w2.address),
        (cluster.a.address6, cluster.w2.address6),
    ):
        holder = Holder(cluster.a, backend, *PORTS[:-1])
        # The only free port is not reused before its flow has ended, so that each protocol is tried once.
        reply = cluster.outside.call(clients.ask_tcp, address, NODE_PORT)
        assert (reply["name"], reply["port"]) == ("w2", PORTS[-1])
        reply = cluster.outside.call(clients.ask_udp, address, UDP_NODE_PORT)
        assert (reply["name"], reply["port"]) == ("w2", PORTS[-1])
        assert holder.ask() == "alive"
        holder.close()


@pytest.mark.parametrize(
    ("first", "options"), [(41000, []), (42000, ["--bypass-netfilter"])], ids=["default", "bypass"]
)
def test_flow_without_a_free_source_port_is_dropped_and_host_sockets_work(
    cluster: OutsideClientCluster, first: int, options: list[str]
) -> None:
    """Host sockets use every port of the range."""
    cluster.lab.agents[-1].stop()
    cluster.agent("--masquerade-ports", f"{first}-{first + 1}", *options).start()
    for address, backend in (
        (cluster.a.address, cluster.w2.address),
        (cluster.a.address6, cluster.w2.address6),
    ):
        holder = Holder(cluster.a, backend, first, first + 1)
        with pytest.raises(TimeoutError):
            cluster.outside.call(_ask_briefly, address)
        assert holder.ask() == "alive"
        holder.close()


def _ask_briefly(address: str) -> None:
    clients.ask_tcp(address, NODE_PORT, 0.5)
