"""Frontends that move to another Service or are removed: UDP follows immediately, TCP connections persist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import BALANCER6, SLICE_PORTS, HeldConnection, OutsideClientCluster
from tests.field.remote import Remote
from tests.lab import Lab, clients, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import AT_ONCE, until

pytestmark = pytest.mark.root

PORT, NODE_PORT, TCP_NODE_PORT = 53, 30253, 30280
#: Addresses of both families that move between Services a and b, by the type of frontend.
MOVING = {
    "externalIP": ("203.0.113.60", "2001:db8:113::60"),
    "load balancer": ("203.0.113.61", "2001:db8:113::61"),
    "cluster IP": ("10.96.2.1", "fd00:10:96:2::1"),
}
OWN = {"a": ("10.96.2.10", "fd00:10:96:2::10"), "b": ("10.96.2.11", "fd00:10:96:2::11")}
PORTS = [
    {"name": "udp", "port": PORT, "protocol": "UDP"},
    {"name": "http", "port": 80, "protocol": "TCP"},
]


class MovingFrontendsCluster(OutsideClientCluster):
    """Service a has the endpoint w1, Service b w2; the frontend belongs to one of them or to none."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        for addresses in MOVING.values():
            for address in addresses:
                self.outside.route(address, self.a)
        self.outside.route(BALANCER6, self.a)

    def assign(self, kind: str, owner: str, *services: str) -> None:
        """Assigns the frontend to a Service. ``owner``: a, b, or none. ``services``: those that are there."""
        documents = []
        for name, pod in (("a", self.w1), ("b", self.w2)):
            if services and name not in services:
                continue
            has = name == owner
            spec: dict[str, Any] = {"clusterIPs": list(OWN[name]), "ports": PORTS}
            if kind == "NodePort" and has:
                numbers = (NODE_PORT, TCP_NODE_PORT)
                spec["ports"] = [{**each, "nodePort": n} for each, n in zip(PORTS, numbers, strict=True)]
                spec["type"] = "NodePort"
            elif kind == "externalIP" and has:
                spec["externalIPs"] = list(MOVING[kind])
            elif kind == "cluster IP" and has:
                spec["clusterIPs"] = list(MOVING[kind])
            service = manifests.service(name, **spec)
            if kind == "load balancer" and has:
                service["spec"]["type"] = "LoadBalancer"
                service["status"] = {"loadBalancer": {"ingress": [{"ip": ip} for ip in MOVING[kind]]}}
            documents.append(service)
            documents += [
                manifests.slice_of(name, [manifests.endpoint(address, pod.node.name)], ports=SLICE_PORTS)
                for address in (pod.address, pod.address6)
            ]
        manifests.write(self.manifests / "moving.yaml", *documents)

    def frontend(self, kind: str, family: int) -> tuple[str, int]:
        if kind == "NodePort":
            return (self.a.address if family == 4 else self.a.address6), NODE_PORT
        return MOVING[kind][family == 6], PORT


@pytest.fixture(scope="module")
def cluster() -> Iterator[MovingFrontendsCluster]:
    with Lab() as lab:
        found = MovingFrontendsCluster(lab)
        found.agent().start()
        yield found


KINDS = [*MOVING, "NodePort"]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["outside", "unconnected", "connected"])
def test_udp_follows_a_frontend_that_moves_to_another_service(
    cluster: MovingFrontendsCluster, kind: str, family: int, where: str
) -> None:
    """An external client has a fixed source port; sockets of a pod stay open."""
    host, port = cluster.frontend(kind, family)
    space: Space = cluster.outside if where == "outside" else cluster.client
    cluster.assign(kind, "a")
    until(lambda: _served(cluster.client, host, port) == "w1")
    with Remote(space, host) as sock:
        if where == "outside":
            sock.bind("", 12_000)
        elif where == "connected":
            sock.connect(host, port)

        def ask(seconds: float) -> str:
            return str(sock.ask(seconds) if where == "connected" else sock.ask_at(host, port, seconds))

        for owner, name in (("a", "w1"), ("b", "w2"), ("a", "w1")):
            cluster.assign(kind, owner)
            until(lambda n=name: ask(0.3) == n, f"datagrams do not go to Service {owner}", AT_ONCE)  # type: ignore[misc]
            assert ask(3) == name


def _served(space: Space, host: str, port: int) -> str:
    try:
        return str(space.call(clients.ask_udp, host, port)["name"])
    except OSError as error:
        return str(error)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_udp_flow_of_a_removed_frontend_ends(cluster: MovingFrontendsCluster, kind: str, family: int) -> None:
    """The Service no longer has the address; the flow was in use before."""
    host, port = cluster.frontend(kind, family)
    cluster.assign(kind, "a")
    with Remote(cluster.outside, host) as sock:
        sock.bind("", 12_001)
        until(lambda: sock.ask_at(host, port, 0.3) == "w1")
        cluster.assign(kind, "none")
        until(lambda: sock.ask_at(host, port, 0.3) in ("nothing", "ECONNREFUSED", "EHOSTUNREACH"))


@pytest.mark.parametrize("family", [4, 6])
def test_udp_flow_of_a_deleted_service_ends(cluster: MovingFrontendsCluster, family: int) -> None:
    host, port = cluster.frontend("load balancer", family)
    cluster.assign("load balancer", "a")
    with Remote(cluster.outside, host) as sock:
        sock.bind("", 12_002)
        until(lambda: sock.ask_at(host, port, 0.3) == "w1")
        cluster.remove("moving")
        until(lambda: sock.ask_at(host, port, 0.3) in ("nothing", "ECONNREFUSED", "EHOSTUNREACH"))


@pytest.mark.parametrize(
    ("size", "left"),
    [("500", "ab"), ("1000", "ab"), ("1000", "b")],
    ids=["same size", "other size", "other size, deleted"],
)
@pytest.mark.parametrize("family", [4, 6])
def test_udp_follows_a_frontend_that_moved_while_no_agent_ran(
    cluster: MovingFrontendsCluster, family: int, size: str, left: str
) -> None:
    """Also to maps of another size, into which flows and records of sockets are copied.

    ``left``: the Services that are there after that.
    """
    host, port = cluster.frontend("externalIP", family)
    cluster.lab.agents[-1].stop()
    cluster.assign("externalIP", "a")
    cluster.agent("--max-services", "500").start()
    with Remote(cluster.outside, host) as outside, Remote(cluster.client, host) as connected:
        outside.bind("", 12_003)
        until(lambda: outside.ask_at(host, port, 0.3) == "w1")
        connected.connect(host, port)
        until(lambda: connected.ask(0.3) == "w1")
        cluster.lab.agents[-1].kill()
        cluster.assign("externalIP", "b", *left)
        cluster.agent("--max-services", size).start()
        until(lambda: outside.ask_at(host, port, 0.3) == "w2", "datagrams do not go to Service b", AT_ONCE)
        until(lambda: connected.ask(0.3) == "w2", "datagrams of a socket do not go to Service b", AT_ONCE)


@pytest.mark.parametrize("family", [4, 6])
def test_unconnected_socket_leaves_an_endpoint_that_became_unready_while_no_agent_ran(
    cluster: MovingFrontendsCluster, family: int
) -> None:
    """The next agent's maps have another size."""

    def write(ready: str) -> None:
        pods = (cluster.w1, cluster.w2)
        slices = [
            manifests.slice_of(
                "a",
                [manifests.endpoint(ip, pod.node.name, ready=pod.name == ready) for pod, ip in each],
                ports=SLICE_PORTS,
            )
            for each in ([(pod, pod.address) for pod in pods], [(pod, pod.address6) for pod in pods])
        ]
        service = manifests.service("a", clusterIPs=list(OWN["a"]), ports=PORTS)
        manifests.write(cluster.manifests / "moving.yaml", service, *slices)

    host = OWN["a"][family == 6]
    cluster.lab.agents[-1].stop()
    write("w1")
    cluster.agent("--max-services", "500").start()
    with Remote(cluster.client, host) as sock:
        until(lambda: sock.ask_at(host, PORT, 0.3) == "w1")
        cluster.lab.agents[-1].kill()
        write("w2")
        cluster.agent("--max-services", "1000").start()
        until(lambda: sock.ask_at(host, PORT, 0.3) == "w2", "datagrams do not go to w2", AT_ONCE)


@pytest.mark.parametrize("kind", ["externalIP", "NodePort"])
def test_tcp_connection_keeps_the_service_that_it_was_opened_with(
    cluster: MovingFrontendsCluster, kind: str
) -> None:
    """This is as with netfilter's conntrack; a new connection goes to the new Service."""
    host, _ = cluster.frontend(kind, 4)
    port = TCP_NODE_PORT if kind == "NodePort" else 80
    cluster.assign(kind, "a")
    until(lambda: _name(cluster.outside, host, port) == "w1")
    held = HeldConnection(cluster.outside, host, port)
    cluster.assign(kind, "b")
    until(lambda: _name(cluster.outside, host, port) == "w2")
    assert held.ask() == "alive"


def _name(space: Space, host: str, port: int) -> str:
    try:
        return str(space.call(clients.ask_tcp, host, port, 0.5)["name"])
    except OSError as error:
        return str(error)
