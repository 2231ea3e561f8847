"""The node's own connections from ports and addresses that Services have."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT
from tests.lab import Lab, clients, servers

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053


@pytest.fixture(scope="module")
def outer() -> Iterator[Outer]:
    """The shop's Services on node-a, and a server outside for the node's own connections."""
    with Lab() as lab:
        made = Outer(lab)
        servers.start(made.outside, "outside", 7000)
        made.agent().start()
        yield made


def ask(host: str, source_port: int, kind: int, *, connected: bool = True) -> Any:
    """Asks host:7000 from ``source_port``; the answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(3)
        sock.bind(("::" if ":" in host else "0.0.0.0", source_port))
        if connected or kind == socket.SOCK_STREAM:
            sock.connect((host, 7000))
            if kind == socket.SOCK_DGRAM:
                sock.send(b"?")
        else:
            sock.sendto(b"?", (host, 7000))
        return json.loads(sock.recv(4096))


def addresses(outer: Outer) -> tuple[str, ...]:
    return outer.outside.address, outer.outside.address6, f"::ffff:{outer.outside.address}"


def test_a_tcp_connection_from_a_node_ports_number_gets_its_answers(outer: Outer) -> None:
    """The SYN-ACK to the node's own connection is the node's, whatever Service has the port as NodePort."""
    for address in addresses(outer):
        answer = outer.a.call(ask, address, NODE_PORT, socket.SOCK_STREAM)
        assert (answer["name"], answer["port"]) == ("outside", NODE_PORT)


@pytest.mark.parametrize("connected", [True, False])
def test_datagrams_from_a_node_ports_number_get_their_answers(outer: Outer, connected: bool) -> None:
    """The answer to the node's own datagram is the node's, of a connected socket and of an unconnected one."""
    for address in addresses(outer):
        answer = outer.a.call(_ask_datagram, address, connected)
        assert (answer["name"], answer["port"]) == ("outside", UDP_NODE_PORT)


def _ask_datagram(host: str, connected: bool) -> Any:
    return ask(host, UDP_NODE_PORT, socket.SOCK_DGRAM, connected=connected)


def test_clients_are_served_from_the_same_numbers_all_the_while(outer: Outer) -> None:
    """A flow of the node's own takes nothing from clients outside, not even from others of the same host."""
    for address in (outer.a.address, outer.a.address6):
        assert outer.outside.call(clients.ask_tcp, address, NODE_PORT)["name"] in ("w1", "w2")
        assert outer.outside.call(clients.ask_udp, address, UDP_NODE_PORT)["name"] in ("w1", "w2")


def test_a_pod_behind_netfilters_masquerade_gets_its_answers(outer: Outer) -> None:
    """A CNI's MASQUERADE may give a pod a NodePort's number: answers go to the pod, not to the Service."""
    outer.a.run(["nft", "add", "table", "ip", "cni"])
    try:
        chain = "{ type nat hook postrouting priority 100 ; }"
        outer.a.run(["nft", "add", "chain", "ip", "cni", "post", chain])
        for protocol, port in (("tcp", NODE_PORT), ("udp", UDP_NODE_PORT)):
            rule = (
                f"ip saddr {outer.client.address} oifname eth0 meta l4proto {protocol} masquerade to :{port}"
            )
            outer.a.run(["nft", "add", "rule", "ip", "cni", "post", *rule.split()])
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            answer = outer.client.call(ask, outer.outside.address, 41000 + kind, kind)
            port = NODE_PORT if kind == socket.SOCK_STREAM else UDP_NODE_PORT
            assert (answer["name"], answer["peer"], answer["port"]) == ("outside", outer.a.address, port)
    finally:
        outer.a.run(["nft", "delete", "table", "ip", "cni"])
