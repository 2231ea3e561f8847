"""Pods on a bridge of their node (flannel, the CNI plugin ``bridge``), where they are each other's neighbours.

Their packets pass the programs twice: at the bridge's port and at the bridge.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pyroute2 import NetNS

from tests.e2e.outer import PORTS, SLICE_PORTS
from tests.field import test_same_ports as same_ports
from tests.field.remote import Remote
from tests.lab import Lab, LabNode, Pod, clients, manifests, servers
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

SERVICE = {"v4": "10.96.0.10", "v6": "fd00:10:96::10"}


class World:
    """``client`` and ``w1`` on a bridge of node-a, ``w2`` on node-b; the Service shop/web has one of the two."""

    def __init__(self, lab: Lab) -> None:
        self.a, b = lab.node("node-a"), lab.node("node-b")
        self.a.run(["ip", "link", "add", "cni0", "type", "bridge"])
        for address in ("10.244.1.1/24", "fd00:10:244:1::1/64"):
            self.a.run(["ip", "addr", "add", address, "dev", "cni0", *_at_once(address)])
        self.a.run(["ip", "link", "set", "cni0", "up"])
        self.client, self.w1 = (_bridged(lab, self.a, *each) for each in (("client", 2), ("w1", 3)))
        self.w2 = b.pod("w2")
        for pod in (self.w1, self.w2):
            servers.start(pod, pod.name, 8080, 8053)
        self.folder = lab.folder / "manifests"
        self.write(self.w1)
        self.a.agent(manifests=self.folder).start()

    def write(self, pod: Pod) -> None:
        manifests.write(
            self.folder / "web.yaml",
            manifests.service("web", clusterIPs=[*SERVICE.values()], ports=PORTS),
            *(
                manifests.slice_of("web", [manifests.endpoint(address, pod.node.name)], ports=SLICE_PORTS)
                for address in (pod.address, pod.address6)
            ),
        )


def _bridged(lab: Lab, node: LabNode, name: str, number: int) -> Pod:
    pod = Pod(node, name, number)
    node.pods.append(pod)
    lab.namespace(pod.netns).close()
    with NetNS(node.netns) as outside:
        outside.link("add", ifname=f"v{number}", kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.netns})
    node.run(["ip", "link", "set", f"v{number}", "master", "cni0", "up"])
    pod.run(["ip", "link", "set", "eth0", "up"])
    for address, gateway in (
        (f"{pod.address}/24", "10.244.1.1"),
        (f"{pod.address6}/64", "fd00:10:244:1::1"),
    ):
        pod.run(["ip", "addr", "add", address, "dev", "eth0", *_at_once(address)])
        pod.run(["ip", "route", "add", "default", "via", gateway])
    return pod


def _at_once(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World(lab)


@pytest.mark.parametrize("version", SERVICE)
@pytest.mark.parametrize("where", ["pod", "host"])
def test_a_connected_socket_whose_backend_was_a_neighbour_is_told_that_it_has_gone(
    world: World, where: str, version: str
) -> None:
    """What it sends goes to the neighbour's link address alone, or nowhere once that is gone: it has to
    connect again, and is served at once."""
    space: Space = world.client if where == "pod" else world.a
    host = SERVICE[version]
    world.write(world.w1)
    until(lambda: space.call(clients.ask_udp, host, 53)["name"] == "w1")
    with Remote(space, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w1"
        world.write(world.w2)
        until(lambda: sock.ask(0.3) in ("ECONNABORTED", "EDESTADDRREQ"), "it is told nothing", 5)
        sock.connect(host, 53)
        until(lambda: sock.ask(0.3) == "w2", "it is not served", 5)


@pytest.mark.parametrize("version", SERVICE)
def test_a_connected_socket_of_a_backend_elsewhere_goes_on(world: World, version: str) -> None:
    """Its packets pass the bridge on their way, whoever answers there."""
    host = SERVICE[version]
    world.write(world.w2)
    until(lambda: world.client.call(clients.ask_udp, host, 53)["name"] == "w2")
    with Remote(world.client, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w2"
        world.write(world.w1)
        until(lambda: sock.ask(0.3) == "w1", "it is not redirected", 5)


@pytest.mark.parametrize("version", SERVICE)
@pytest.mark.parametrize("end", [*same_ports.ENDS, "udp"])
@pytest.mark.parametrize("backend", ["neighbour", "elsewhere"])
def test_a_pod_that_asks_a_service_and_its_backend_from_one_port(
    world: World, backend: str, end: str, version: str
) -> None:
    """No socket hook sees the client. Its direct flow gets a port of its own once, and the Service's keeps its own."""
    pod = world.w1 if backend == "neighbour" else world.w2
    world.write(pod)
    until(lambda: world.client.call(clients.ask_udp, SERVICE[version], 53)["name"] == pod.name)
    asked = same_ports.asked(SERVICE[version], pod, "udp" if end == "udp" else "tcp")
    assert same_ports.ask_unhooked(world.client, asked, end) == pod.name
