"""Nodes whose own connections may have any port: ``ip_local_port_range`` leaves none to masquerading alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT
from tests.lab import Lab, clients
from tests.lab.spaces import Space, read_line

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053
#: So few that each is tried for a new flow, and that one is free of the node's own sockets.
PORTS = range(40000, 40004)
#: Holds sockets of the node that have a port each towards HOST:8080 and HOST:8053; says ``alive`` of each that is.
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
    """The node's own sockets with these ports towards a backend, connected TCP and unconnected UDP."""

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
def outer() -> Iterator[Outer]:
    """Only the other node's pod serves: all that comes from outside is masqueraded."""
    with Lab() as lab:
        made = Outer(lab)
        made.write_web(made.w2)
        made.a.call(set_range)
        made.agent().start()
        yield made


def ask_both(outer: Outer, address: str, times: int) -> None:
    for _ in range(times):
        assert outer.outside.call(clients.ask_tcp, address, NODE_PORT)["name"] == "w2"
        assert outer.outside.call(clients.ask_udp, address, UDP_NODE_PORT)["name"] == "w2"


def test_an_agent_starts_where_the_kernels_range_is_all_ports(outer: Outer) -> None:
    """It takes a stated range, serves with it, and says in its log and status that the node shares it."""
    for address in (outer.a.address, outer.a.address6):
        ask_both(outer, address, 1)
    agent = outer.lab.agents[-1]
    assert agent.text.count("32768-65535") == 1
    problems = json.loads(outer.a.cli("status", "-o", "json"))["problems"]
    assert any("32768-65535" in problem for problem in problems)


def test_a_masqueraded_flow_takes_no_port_that_a_socket_of_the_node_has(outer: Outer) -> None:
    """A range named by the operator may overlap, too: only the port that no socket has is taken, every time."""
    outer.lab.agents[-1].stop()
    agent = outer.agent("--masquerade-ports", f"{PORTS[0]}-{PORTS[-1]}").start()
    assert agent.text.count("40000-40003") == 1
    for address, backend in (
        (outer.a.address, outer.w2.address),
        (outer.a.address6, outer.w2.address6),
    ):
        holder = Holder(outer.a, backend, *PORTS[:-1])
        # TCP's flow must be over, and UDP's own, before the only port is free again: one each, then.
        answer = outer.outside.call(clients.ask_tcp, address, NODE_PORT)
        assert (answer["name"], answer["port"]) == ("w2", PORTS[-1])
        answer = outer.outside.call(clients.ask_udp, address, UDP_NODE_PORT)
        assert (answer["name"], answer["port"]) == ("w2", PORTS[-1])
        assert holder.ask() == "alive"
        holder.close()


@pytest.mark.parametrize(
    ("first", "way"), [(41000, []), (42000, ["--bypass-netfilter"])], ids=["safe", "bypass"]
)
def test_without_a_free_port_the_client_is_not_served_and_the_node_is(
    outer: Outer, first: int, way: list[str]
) -> None:
    """With every port in use by the node's own sockets the new flow is dropped, not one of theirs."""
    outer.lab.agents[-1].stop()
    outer.agent("--masquerade-ports", f"{first}-{first + 1}", *way).start()
    for address, backend in (
        (outer.a.address, outer.w2.address),
        (outer.a.address6, outer.w2.address6),
    ):
        holder = Holder(outer.a, backend, first, first + 1)
        with pytest.raises(TimeoutError):
            outer.outside.call(_ask_briefly, address)
        assert holder.ask() == "alive"
        holder.close()


def _ask_briefly(address: str) -> None:
    clients.ask_tcp(address, NODE_PORT, 0.5)
