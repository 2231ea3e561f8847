"""Services through the socket hooks: all protocols, address families and frontend types."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.two_node_cluster import BALANCER, EXTERNAL, NODE_PORT, SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients

pytestmark = pytest.mark.root

FEATURES = {
    "this-kernel": [],
    "fallbacks": ["--without", "set-retval", "--without", "tcx", "--without", "socket-fields"],
}


@pytest.fixture(scope="module", params=FEATURES)
def cluster(request: pytest.FixtureRequest) -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        found = TwoNodeCluster(lab)
        found.agent(*FEATURES[request.param]).start()
        if request.param == "fallbacks":
            found.refused = found.dropped = "EPERM"
        yield found


@pytest.fixture(params=SERVICE_IPS)
def service_ip(request: pytest.FixtureRequest) -> str:
    return SERVICE_IPS[request.param]


def test_tcp_reaches_every_backend_and_getpeername_returns_the_service_address(
    cluster: TwoNodeCluster, service_ip: str
) -> None:
    assert set(cluster.client.call(clients.spread_tcp, service_ip, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert cluster.client.call(clients.ask_tcp, service_ip, 80)["getpeername"] == (service_ip, 80)


def test_backend_sees_the_address_of_the_client_pod(cluster: TwoNodeCluster) -> None:
    assert cluster.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)["peer"] == cluster.client.address
    assert cluster.client.call(clients.ask_tcp, SERVICE_IPS["v6"], 80)["peer"] == cluster.client.address6


def test_unconnected_udp_sockets_spread_over_backends_and_replies_have_the_service_address(
    cluster: TwoNodeCluster, service_ip: str
) -> None:
    """``spread_udp`` asserts the source of each reply. tests/field has several datagrams of one socket."""
    assert set(cluster.client.call(clients.spread_udp, service_ip, 53, clients.ENOUGH)) == {"w1", "w2"}


def test_connected_udp_socket_has_the_service_address_as_peer_and_source(
    cluster: TwoNodeCluster, service_ip: str
) -> None:
    reply = cluster.client.call(clients.ask_udp_connected, service_ip, 53)
    assert reply["getpeername"] == (service_ip, 53)
    assert reply["from"] == (service_ip, 53)


def _connected_exchange(host: str, port: int) -> set[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.connect((host, port))
        found = set()
        for _ in range(20):
            sock.send(b"?")
            found.add(json.loads(sock.recv(4096))["name"])
        return found


def test_connected_udp_socket_keeps_its_backend(cluster: TwoNodeCluster) -> None:
    assert len(cluster.client.call(_connected_exchange, SERVICE_IPS["v4"], 53)) == 1


def _udplite_exchange(service: str, port: int, server: str, server_port: int) -> tuple[str, int]:
    """Sends from a client to a server in this namespace; returns the source of the reply."""
    kind = (socket.AF_INET, socket.SOCK_DGRAM, clients.UDPLITE)
    with socket.socket(*kind) as listener, socket.socket(*kind) as sock:
        listener.bind((server, server_port))
        for each in (listener, sock):
            each.settimeout(3)
        sock.sendto(b"?", (service, port))
        data, peer = listener.recvfrom(100)
        listener.sendto(data, peer)
        source: tuple[str, int] = sock.recvfrom(100)[1]
        return source


@pytest.mark.skipif(not clients.has_udp_lite(), reason="this kernel has no sockets of UDP-Lite")
def test_udp_lite_uses_the_udp_service_port(cluster: TwoNodeCluster) -> None:
    """The sockets are unconnected: connect() of UDP-Lite calls no hook, as it has no pre_connect."""
    reply = cluster.w1.call(_udplite_exchange, "10.96.0.40", 53, cluster.w1.address, 8053)
    assert reply == ("10.96.0.40", 53)


@pytest.mark.parametrize("address", [EXTERNAL, BALANCER])
def test_external_and_load_balancer_ips_are_served(cluster: TwoNodeCluster, address: str) -> None:
    assert set(cluster.client.call(clients.spread_tcp, address, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert cluster.client.call(clients.ask_tcp, address, 80)["getpeername"] == (address, 80)


def test_node_port_is_served_at_every_local_address_for_pods_and_host(cluster: TwoNodeCluster) -> None:
    """The gateway address of pods is one, as with kube-proxy in modes iptables and ipvs."""
    node = cluster.a
    for space in (cluster.client, node):
        for address in (node.address, node.address6, "10.244.1.1", "fd00:10:244:1::1"):
            reply = space.call(clients.ask_tcp, address, NODE_PORT)
            assert reply["getpeername"] == (address, NODE_PORT)
    assert cluster.client.call(clients.ask_udp, node.address, 30053)["from"] == (node.address, 30053)


@pytest.mark.parametrize("loopback", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "0.0.0.0"])
def test_node_port_on_loopback_is_served_in_the_host_namespace_only(
    cluster: TwoNodeCluster, loopback: str
) -> None:
    assert cluster.a.call(clients.connect_error, loopback, NODE_PORT) == "connected"
    assert cluster.client.call(clients.connect_error, loopback, NODE_PORT) == "ECONNREFUSED"


def test_node_port_is_not_served_at_the_address_of_a_pod(cluster: TwoNodeCluster) -> None:
    """No NodePort is served at the address of the pod w2, where no socket listens."""
    assert cluster.client.call(clients.connect_error, cluster.w2.address, NODE_PORT) == "ECONNREFUSED"


@pytest.mark.parametrize("host", ["10.96.0.20", "fd00:10:96::20", "::ffff:10.96.0.20"])
def test_no_endpoint_refuses_connect_and_sendto(cluster: TwoNodeCluster, host: str) -> None:
    assert cluster.client.call(clients.connect_error, host, 80) == cluster.refused
    assert cluster.client.call(clients.send_error, host, 53) == cluster.refused


def _connect_ping(host: str) -> None:
    """ping(8) does so without CAP_NET_RAW. Raises OSError."""
    is_v6 = ":" in host
    kind = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if is_v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
    with socket.socket(kind[0], socket.SOCK_DGRAM, kind[1]) as sock:
        sock.connect((host, 0))


@pytest.mark.parametrize("host", [SERVICE_IPS["v4"], SERVICE_IPS["v6"], "10.96.0.20", "fd00:10:96::20"])
def test_a_ping_socket_connects_to_a_cluster_ip(cluster: TwoNodeCluster, host: str) -> None:
    """Its echo requests are packets; connect() sends none."""
    cluster.client.call(_connect_ping, host)


@pytest.mark.parametrize("host", ["10.96.0.30", "fd00:10:96::30"])
def test_internal_traffic_policy_local_does_not_use_remote_endpoints(
    cluster: TwoNodeCluster, host: str
) -> None:
    assert cluster.client.call(clients.connect_error, host, 80) == cluster.dropped
    assert cluster.client.call(clients.send_error, host, 53) == cluster.dropped


def test_connections_to_pod_addresses_are_not_translated(cluster: TwoNodeCluster) -> None:
    for address in (cluster.w2.address, cluster.w2.address6):
        assert cluster.client.call(clients.ask_tcp, address, 9000)["getpeername"] == (address, 9000)
        assert cluster.client.call(clients.ask_udp, address, 9000)["from"] == (address, 9000)
        assert cluster.client.call(clients.ask_udp_connected, address, 8053)["from"] == (address, 8053)


def _two_services(first: str, second: str) -> list[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sources = []
        for host in (first, second) * 10:
            sock.sendto(b"?", (host, 53))
            sources.append((host, sock.recvfrom(4096)[1][0]))
        return sources


def test_replies_of_two_services_to_one_unconnected_socket_have_their_addresses(
    cluster: TwoNodeCluster,
) -> None:
    """Both Services share a backend."""
    for destination, source in cluster.client.call(_two_services, SERVICE_IPS["v4"], "10.96.0.40"):
        assert destination == source


def _connect_again(refused: str, service: str, direct: str) -> list[Any]:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for host, port in ((service, 53), (direct, 8053), (service, 53)):
            sock.connect((host, port))
            found.append(sock.getpeername())
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(3)
        found.append(sock.connect_ex((refused, 80)) != 0)
        sock.connect((direct, 8080))
        found.append(sock.getpeername())
    return found


def test_getpeername_after_a_second_connect(cluster: TwoNodeCluster) -> None:
    found = cluster.client.call(_connect_again, "10.96.0.20", "10.96.0.40", cluster.w1.address)
    assert found == [
        ("10.96.0.40", 53),
        (cluster.w1.address, 8053),
        ("10.96.0.40", 53),
        True,
        (cluster.w1.address, 8080),
    ]


def test_processes_outside_the_cgroup_are_served_in_packets(cluster: TwoNodeCluster) -> None:
    """They pass no socket hook: packets are translated at ingress of the pod's device."""
    outside = cluster.client.popen(
        ["socat", "-T1", "-", "TCP:10.96.0.10:80,connect-timeout=1"],
        join_cgroup=False,
        stdin=-3,
        stdout=-1,
        stderr=-1,
    )
    assert json.loads(outside.communicate()[0])["peer"] == cluster.client.address
    assert outside.returncode == 0


def test_counters_of_chosen_refused_and_dropped_connections(cluster: TwoNodeCluster) -> None:
    def counted(result: str) -> float:
        metrics = cluster.a.call(_metrics)
        wanted = f'result="{result}"'
        lines = [
            line
            for line in metrics.splitlines()
            if line.startswith("ebpfproxy_service_connections_total") and wanted in line
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = {result: counted(result) for result in ("chosen", "refused", "dropped")}
    cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 7)
    cluster.client.call(clients.spread_udp, SERVICE_IPS["v6"], 53, 5)
    cluster.client.call(clients.connect_error, "10.96.0.20", 80)
    cluster.client.call(clients.send_error, "10.96.0.30", 53)
    after = {result: counted(result) for result in before}
    assert {r: after[r] - before[r] for r in before} == {"chosen": 12, "refused": 1, "dropped": 1}
    rows = json.loads(cluster.a.cli("backend", "list", "-o", "json"))
    assert sum(row["connections"] for row in rows) == after["chosen"]


def _metrics() -> str:
    with socket.create_connection(("127.0.0.1", 10249), 5) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        reply = b""
        while chunk := connection.recv(65536):
            reply += chunk
    return reply.decode()
