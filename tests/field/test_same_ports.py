"""A client asks a backend itself from the very port by which it asks a Service that leads there.

A socket that is not connected has one port for all whom it asks, and the kernel gives one port to two connections
with other destinations, or again as soon as one has ended. The control is netfilter's own NAT: it tells the two
apart by giving the later one another port, and all of these pass.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.e2e.outer import BALANCER6, Outer
from tests.e2e.world import NODE_PORT
from tests.lab import Lab
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053
LOCAL, LOCAL6 = "203.0.113.77", BALANCER6
FAR, FAR6 = "10.96.0.78", "fd00:10:96::78"
ENDS = ("open", "closed", "reset")
_ports = iter(range(23000, 30000))


class Asked(NamedTuple):
    """Two that lead to one backend: address and port each."""

    service: tuple[str, int]
    direct: tuple[str, int]


def _socket(host: str, kind: int, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    sock.settimeout(3)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    return sock


def _connected(where: tuple[str, int], port: int) -> tuple[socket.socket, dict[str, Any]]:
    sock = _socket(where[0], socket.SOCK_STREAM, port)
    sock.connect(where)
    return sock, json.loads(sock.recv(4096))


def _echoes(sock: socket.socket) -> bool:
    sock.sendall(b"x")
    return sock.recv(16) == b"x"


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def _tcp(asked: Asked, port: int, end: str) -> str:
    """The backend's name, asked directly after the Service, whose connection has this end."""
    first, _ = _connected(asked.service, port)
    if end == "reset":
        _reset(first)
    if end == "closed":
        first.close()
    second, answer = _connected(asked.direct, port)
    assert _echoes(second)
    if end == "open":
        assert _echoes(first)
        first.close()
    # Once more, as long as what both have left is there, but TIME_WAIT.
    _reset(second)
    third, again = _connected(asked.direct, port)
    assert _echoes(third)
    third.close()
    assert again["name"] == answer["name"]
    return str(answer["name"])


def _udp(asked: Asked, port: int) -> list[str]:
    """By whom the answers to one socket's datagrams are, in turns."""
    with _socket(asked.service[0], socket.SOCK_DGRAM, port) as sock:
        found = []
        for where in (*asked, *asked):
            sock.sendto(b"?", where)
            data, source = sock.recvfrom(4096)
            assert source[:2] == where, f"{source} instead of {where}"
            found.append(json.loads(data)["name"])
    return found


def _unhooked(space: Space, call: str) -> str:
    """What a function of this module says in a process that no socket hook sees."""
    names = "Asked, _tcp, _udp"
    script = f"from tests.field.test_same_ports import {names}; print({call})"
    process = space.popen([sys.executable, "-c", script], join_cgroup=False, stdout=-1)
    said: bytes = process.communicate(timeout=60)[0]
    return said.decode().strip()


@pytest.fixture(scope="module")
def outer() -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.write_web(made.w1)
        for name, balancer, address, pod in (
            ("near", LOCAL, "10.96.0.77", made.w1.address),
            ("near6", LOCAL6, "fd00:10:96::77", made.w1.address6),
        ):
            endpoints = [{**made.on_a(), "addresses": [pod]}]
            made.balanced(name, address, balancer, endpoints, externalTrafficPolicy="Local")
        for name, address, pod in (("far", FAR, made.w2.address), ("far6", FAR6, made.w2.address6)):
            made.add(name, address, [{**made.on_b(), "addresses": [pod]}])
        made.agent().start()
        yield made


def _asked(outer: Outer, way: str, family: str, kind: str) -> Asked:
    is_v4, is_tcp = family == "v4", kind == "tcp"
    if way == "masqueraded":
        node_port = NODE_PORT if is_tcp else UDP_NODE_PORT
        service = (outer.a.address if is_v4 else outer.a.address6, node_port)
    else:
        service = (LOCAL if is_v4 else LOCAL6, 80 if is_tcp else 53)
    return Asked(service, (outer.w1.address if is_v4 else outer.w1.address6, 8080 if is_tcp else 8053))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("way", ["masqueraded", "local"])
def test_a_connection_to_the_backend_itself_from_a_services_port(
    outer: Outer, way: str, family: str, end: str
) -> None:
    """A direct connection from the port of a Service's connection, open or over, is answered as a direct one."""
    asked = _asked(outer, way, family, "tcp")
    assert outer.outside.call(_tcp, asked, next(_ports), end) == "w1"


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("way", ["masqueraded", "local"])
def test_a_socket_that_asks_both_is_answered_by_each(outer: Outer, way: str, family: str) -> None:
    """Of one unconnected UDP socket the Service's answers are the Service's, and the backend's own are its own."""
    asked = _asked(outer, way, family, "udp")
    assert outer.outside.call(_udp, asked, next(_ports)) == ["w1"] * 4


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_a_process_of_the_host_that_asks_both(outer: Outer, family: str) -> None:
    """The host's own, that no socket hook sees, has both by TCP and UDP from one port as well."""
    service, direct = (FAR, outer.w2.address) if family == "v4" else (FAR6, outer.w2.address6)
    for end in ENDS:
        asked = Asked((service, 80), (direct, 8080))
        assert _unhooked(outer.a, f"_tcp({asked!r}, {next(_ports)}, {end!r})") == "w2", end
    asked = Asked((service, 53), (direct, 8053))
    assert _unhooked(outer.a, f"_udp({asked!r}, {next(_ports)})") == str(["w2"] * 4)
