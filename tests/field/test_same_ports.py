"""A client uses one source port for a Service and directly for a backend of the Service.

An unconnected socket has one source port for all destinations, and the kernel may give connections with distinct
destinations the same port, also right after one is closed. For comparison, the tests run with NAT of netfilter,
which changes the source port of the later flow.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from tests.e2e.outside_client import BALANCER6, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, Pod
from tests.lab.processes import read_line
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053
LOCAL, LOCAL6 = "203.0.113.77", BALANCER6
FAR, FAR6 = "10.96.0.78", "fd00:10:96::78"
ENDS = ("open", "closed", "reset")
_ports = iter(range(23000, 30000))


class Targets(NamedTuple):
    """Address and port of a Service, and of its backend."""

    service: tuple[str, int]
    direct: tuple[str, int]


def targets(service: str, pod: Pod, kind: str, node_port: int = 0) -> Targets:
    """A Service and its backend ``pod``; ``kind``: tcp or udp."""
    port, target = (80, 8080) if kind == "tcp" else (53, 8053)
    return Targets((service, node_port or port), (pod.address6 if ":" in service else pod.address, target))


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


def ask_tcp(to: Targets, port: int, end: str) -> str:
    """Connects to the Service, ends this connection by ``end``, and connects to the backend. Returns its name."""
    first, _ = _connected(to.service, port)
    if end == "reset":
        _reset(first)
    if end == "closed":
        first.close()
    second, reply = _connected(to.direct, port)
    assert _echoes(second)
    if end == "open":
        assert _echoes(first)
        first.close()
    # It connects again while entries of both connections are left, except TIME_WAIT.
    _reset(second)
    third, again = _connected(to.direct, port)
    assert _echoes(third)
    third.close()
    assert again["name"] == reply["name"]
    return str(reply["name"])


def ask_udp(to: Targets, port: int) -> str:
    """Sends to the Service and the backend alternately from one socket; returns the backend's name."""
    with _socket(to.service[0], socket.SOCK_DGRAM, port) as sock:
        names = set()
        for where in (*to, *to):
            sock.sendto(b"?", where)
            data, source = sock.recvfrom(4096)
            assert source[:2] == where, f"{source} instead of {where}"
            names.add(str(json.loads(data)["name"]))
    assert len(names) == 1
    return names.pop()


def ask_unhooked(space: Space, to: Targets, end: str) -> str:
    """As :func:`ask_tcp`, or :func:`ask_udp` if ``end`` is udp, in a process that passes no socket hook."""
    return read_line(space.fork(_print_name, to, next(_ports), end, join_cgroup=False))


def _print_name(to: Targets, port: int, end: str) -> None:
    print(ask_udp(to, port) if end == "udp" else ask_tcp(to, port, end))


def _translate_by_netfilter(cluster: OutsideClientCluster) -> None:
    """Adds the same frontends and masquerading on node-a as kube-proxy does, in one nftables table."""
    rules = []
    for ip, node, local, far, w1, w2 in (
        ("ip", cluster.a.address, LOCAL, FAR, cluster.w1.address, cluster.w2.address),
        ("ip6", cluster.a.address6, LOCAL6, FAR6, f"[{cluster.w1.address6}]", f"[{cluster.w2.address6}]"),
    ):
        for port, node_port, target in (
            ("tcp dport 80", f"tcp dport {NODE_PORT}", 8080),
            ("udp dport 53", f"udp dport {UDP_NODE_PORT}", 8053),
        ):
            rules += [
                f"prerouting {ip} daddr {node} {node_port} meta mark set 1 dnat {ip} to {w1}:{target}",
                f"prerouting {ip} daddr {local} {port} dnat {ip} to {w1}:{target}",
                f"output {ip} daddr {far} {port} dnat {ip} to {w2}:{target}",
            ]
    cluster.a.run(["nft", "add", "table", "inet", "control"])
    for hook, priority in (("prerouting", -100), ("output", -100), ("postrouting", 100)):
        chain = f"{{ type nat hook {hook} priority {priority} ; }}"
        cluster.a.run(["nft", "add", "chain", "inet", "control", hook, chain])
    for rule in (*rules, "postrouting meta mark 1 masquerade"):
        cluster.a.run(["nft", "add", "rule", "inet", "control", *rule.split()])


@pytest.fixture(scope="module", params=["ebpfproxy", "netfilter"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.write_web(made.w1)
        for name, balancer, address, pod in (
            ("near", LOCAL, "10.96.0.77", made.w1.address),
            ("near6", LOCAL6, "fd00:10:96::77", made.w1.address6),
        ):
            endpoints = [{**made.endpoint_on_a(), "addresses": [pod]}]
            made.add_load_balancer(name, address, balancer, endpoints, externalTrafficPolicy="Local")
        for name, address, pod in (("far", FAR, made.w2.address), ("far6", FAR6, made.w2.address6)):
            made.add(name, address, [{**made.endpoint_on_b(), "addresses": [pod]}])
        if request.param == "netfilter":
            _translate_by_netfilter(made)
        else:
            made.agent().start()
        yield made


def _targets(cluster: OutsideClientCluster, policy: str, family: str, kind: str) -> Targets:
    is_v4, is_tcp = family == "v4", kind == "tcp"
    if policy == "local":
        return targets(LOCAL if is_v4 else LOCAL6, cluster.w1, kind)
    address = cluster.a.address if is_v4 else cluster.a.address6
    return targets(address, cluster.w1, kind, NODE_PORT if is_tcp else UDP_NODE_PORT)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("policy", ["cluster", "local"])
def test_direct_connection_from_the_source_port_of_a_service_connection(
    cluster: OutsideClientCluster, policy: str, family: str, end: str
) -> None:
    """The Service's connection is open, closed or reset when the direct one is opened."""
    found = cluster.outside.call(ask_tcp, _targets(cluster, policy, family, "tcp"), next(_ports), end)
    assert found == "w1"


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("policy", ["cluster", "local"])
def test_udp_socket_gets_replies_from_a_service_and_its_backend(
    cluster: OutsideClientCluster, policy: str, family: str
) -> None:
    """Replies to one unconnected socket have the address that each datagram was sent to."""
    assert cluster.outside.call(ask_udp, _targets(cluster, policy, family, "udp"), next(_ports)) == "w1"


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_host_process_without_a_hook_uses_one_source_port_for_both(
    cluster: OutsideClientCluster, family: str
) -> None:
    """TCP and UDP of the host work, with a remote backend."""
    service = FAR if family == "v4" else FAR6
    for end in (*ENDS, "udp"):
        kind = "udp" if end == "udp" else "tcp"
        assert ask_unhooked(cluster.a, targets(service, cluster.w2, kind), end) == "w2", end
