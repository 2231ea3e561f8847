"""Connections of the host whose source port is the number of a NodePort."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, clients, servers

pytestmark = pytest.mark.root

UDP_NODE_PORT = 30053


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    """An agent on node-a, and an external server for connections of the host."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        servers.start(made.outside, "outside", 7000)
        made.agent().start()
        yield made


def ask(host: str, source_port: int, kind: int, *, connected: bool = True) -> Any:
    """Sends to host:7000 from ``source_port``; returns the reply."""
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


def addresses(cluster: OutsideClientCluster) -> tuple[str, ...]:
    return cluster.outside.address, cluster.outside.address6, f"::ffff:{cluster.outside.address}"


def test_tcp_connection_of_the_host_from_a_node_port_number(cluster: OutsideClientCluster) -> None:
    """The SYN-ACK is passed to the host and not translated for the Service with this NodePort."""
    for address in addresses(cluster):
        reply = cluster.a.call(ask, address, NODE_PORT, socket.SOCK_STREAM)
        assert (reply["name"], reply["port"]) == ("outside", NODE_PORT)


@pytest.mark.parametrize("connected", [True, False])
def test_udp_of_the_host_from_a_node_port_number(cluster: OutsideClientCluster, connected: bool) -> None:
    """Replies are passed to the host, for connected and unconnected sockets."""
    for address in addresses(cluster):
        reply = cluster.a.call(_ask_datagram, address, connected)
        assert (reply["name"], reply["port"]) == ("outside", UDP_NODE_PORT)


def _ask_datagram(host: str, connected: bool) -> Any:
    return ask(host, UDP_NODE_PORT, socket.SOCK_DGRAM, connected=connected)


def test_node_ports_serve_clients_despite_host_flows_from_their_numbers(
    cluster: OutsideClientCluster,
) -> None:
    """Other flows to the NodePort are translated, also those from the same external host."""
    for address in (cluster.a.address, cluster.a.address6):
        assert cluster.outside.call(clients.ask_tcp, address, NODE_PORT)["name"] in ("w1", "w2")
        assert cluster.outside.call(clients.ask_udp, address, UDP_NODE_PORT)["name"] in ("w1", "w2")


def test_replies_to_a_pod_masqueraded_by_netfilter_to_a_node_port_number(
    cluster: OutsideClientCluster,
) -> None:
    """MASQUERADE of a CNI may select the number of a NodePort; replies go to the pod."""
    cluster.a.run(["nft", "add", "table", "ip", "cni"])
    try:
        chain = "{ type nat hook postrouting priority 100 ; }"
        cluster.a.run(["nft", "add", "chain", "ip", "cni", "post", chain])
        for protocol, port in (("tcp", NODE_PORT), ("udp", UDP_NODE_PORT)):
            rule = f"ip saddr {cluster.client.address} oifname eth0 meta l4proto {protocol} masquerade to :{port}"
            cluster.a.run(["nft", "add", "rule", "ip", "cni", "post", *rule.split()])
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            reply = cluster.client.call(ask, cluster.outside.address, 41000 + kind, kind)
            port = NODE_PORT if kind == socket.SOCK_STREAM else UDP_NODE_PORT
            assert (reply["name"], reply["peer"], reply["port"]) == ("outside", cluster.a.address, port)
    finally:
        cluster.a.run(["nft", "delete", "table", "ip", "cni"])
