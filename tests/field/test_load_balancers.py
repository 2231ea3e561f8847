"""How load balancers reach nodes: their health checks, their addresses, and the devices that these are on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import BALANCER, NODE_PORT
from tests.lab import Lab, clients
from tests.lab.waiting import until

pytestmark = pytest.mark.root

ADDRESS, HEALTH_PORT = "203.0.113.33", 31999
#: An address of a virtual router (RFC 9568), and its link address.
VIRTUAL, LINK_ADDRESS = "172.18.0.50", "00:00:5e:00:01:33"


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        endpoints = [made.endpoint_on_a()]
        local = {"externalTrafficPolicy": "Local", "healthCheckNodePort": HEALTH_PORT}
        made.add_load_balancer("local", "10.96.1.3", ADDRESS, endpoints, **local)
        yield made


@pytest.fixture(scope="module")
def default(cluster: OutsideClientCluster) -> OutsideClientCluster:
    """An agent with default options runs."""
    cluster.agent().start()
    return cluster


def _ip(cluster: OutsideClientCluster, *commands: str) -> None:
    for command in commands:
        cluster.a.run(["ip", *command.split()])


def _status(host: str, port: int, source: str) -> str:
    """The status of GET, or the error."""
    try:
        with socket.create_connection((host, port), 3, (source, 0) if source else None) as sock:
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return sock.recv(100).decode().partition("\r\n")[0].partition(" ")[2]
    except OSError as error:
        return type(error).__name__


def _backend(host: str, port: int, source: str, kind: int) -> str:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(3)
        sock.bind((source, 0))
        sock.connect((host, port))
        if kind == socket.SOCK_DGRAM:
            sock.send(b"?")
        return str(sock.recv(4096))


@pytest.mark.parametrize("source", [BALANCER, ADDRESS])
def test_a_load_balancer_probes_from_the_address_of_a_service(
    default: OutsideClientCluster, source: str
) -> None:
    """Its packets have a frontend as their source, and replies one as their destination (Tencent's do)."""
    outside = default.outside
    outside.run(["ip", "address", "add", f"{source}/32", "dev", "lo"])
    _ip(default, f"route add {source}/32 via {outside.address}")
    default.b.run(["ip", "route", "add", f"{source}/32", "via", outside.address])
    try:
        for kind, port in ((socket.SOCK_STREAM, NODE_PORT), (socket.SOCK_DGRAM, 30053)):
            for _ in range(6):
                assert '"w' in outside.call(_backend, default.a.address, port, source, kind)
        for port in (10256, HEALTH_PORT):
            assert outside.call(_status, default.a.address, port, source) == "200 OK"
    finally:
        _ip(default, f"route del {source}/32")
        default.b.run(["ip", "route", "del", f"{source}/32"])
        outside.run(["ip", "address", "del", f"{source}/32", "dev", "lo"])


def test_health_checks_at_the_load_balancers_address_reach_the_node(default: OutsideClientCluster) -> None:
    """An agent of Google's makes the address one of the node, and checks are sent there."""
    _ip(default, f"route add local {ADDRESS}/32 dev eth0 proto 66")
    try:
        for port in (10256, HEALTH_PORT):
            assert default.outside.call(_status, ADDRESS, port, "") == "200 OK"
        for space in (default.outside, default.client, default.a):
            assert space.call(clients.ask_tcp, ADDRESS, 80)["name"] == "w1"
    finally:
        _ip(default, f"route del local {ADDRESS}/32 dev eth0 proto 66")


def test_addresses_of_a_virtual_router_are_served(default: OutsideClientCluster) -> None:
    """keepalived has them on a macvlan with the router's link address (use_vmac); replies leave by the uplink."""
    outside = default.outside
    _ip(
        default,
        f"link add vrrp.51 link eth0 address {LINK_ADDRESS} type macvlan mode private",
        "link set vrrp.51 up",
        f"address add {VIRTUAL}/32 dev vrrp.51",
    )
    default.a.run(
        ["sh", "-c", "for d in eth0 vrrp.51; do echo 1 >/proc/sys/net/ipv4/conf/$d/arp_ignore; done"]
    )
    try:
        found: Callable[[], str] = lambda: outside.call(clients.connect_error, VIRTUAL, NODE_PORT, 0.5)  # noqa: E731
        until(lambda: found() == "connected", "no NodePort at the virtual address")
        assert LINK_ADDRESS in outside.run(["ip", "neigh", "show", VIRTUAL])
        assert outside.call(clients.ask_udp, VIRTUAL, 30053)["from"] == (VIRTUAL, 30053)
        assert outside.call(clients.is_echoed, VIRTUAL, NODE_PORT, 1_000_000)
    finally:
        _ip(default, "link del vrrp.51")


def test_health_checks_are_answered_where_node_ports_are(cluster: OutsideClientCluster) -> None:
    """kube-proxy has listeners at the addresses that nodePortAddresses names."""
    other = "198.51.100.51"
    _ip(cluster, f"address add {other}/32 dev lo")
    cluster.outside.route(f"{other}/32", cluster.a)
    for agent in cluster.lab.agents:
        agent.stop()
    agent = cluster.agent("--nodeport-addresses", "primary").start()
    try:
        assert cluster.outside.call(_status, cluster.a.address, HEALTH_PORT, "") == "200 OK"
        assert cluster.outside.call(_status, other, HEALTH_PORT, "") in ("", "ConnectionResetError")
        assert cluster.outside.call(_status, other, 10256, "") == "200 OK"
    finally:
        agent.stop()
        _ip(cluster, f"address del {other}/32 dev lo")
