"""Pods on a bridge of their node (flannel, the CNI plugin ``bridge``), with traffic that is bridged.

Their packets pass the programs at the bridge port, and routed ones at the bridge as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import PORTS, SLICE_PORTS
from tests.field import test_same_ports as same_ports
from tests.field.remote import Remote
from tests.lab import Lab, LabNode, Pod, clients, manifests, servers
from tests.lab.spaces import Space
from tests.lab.waiting import AT_ONCE, until

pytestmark = pytest.mark.root

SERVICE = {"v4": "10.96.0.10", "v6": "fd00:10:96::10"}


class BridgedPodsCluster:
    """``client`` and ``w1`` on a bridge of node-a, ``w2`` on node-b; w1 or w2 is the endpoint of shop/web."""

    def __init__(self, lab: Lab) -> None:
        self.a, b = lab.node("node-a"), lab.node("node-b")
        self.a.run(["ip", "link", "add", "cni0", "type", "bridge"])
        for address in ("10.244.1.1/24", "fd00:10:244:1::1/64"):
            self.a.run(["ip", "addr", "add", address, "dev", "cni0", *_nodad(address)])
        self.a.run(["ip", "link", "set", "cni0", "up"])
        self.client, self.w1 = (_bridged(self.a, name) for name in ("client", "w1"))
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


def _bridged(node: LabNode, name: str) -> Pod:
    pod = node.bare_pod(name)
    port = f"v{len(node.pods)}"
    node.run(["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pod.netns])
    node.run(["ip", "link", "set", port, "master", "cni0", "up"])
    pod.run(["ip", "link", "set", "eth0", "up"])
    for address, gateway in (
        (f"{pod.address}/24", "10.244.1.1"),
        (f"{pod.address6}/64", "fd00:10:244:1::1"),
    ):
        pod.run(["ip", "addr", "add", address, "dev", "eth0", *_nodad(address)])
        pod.run(["ip", "route", "add", "default", "via", gateway])
    return pod


def _nodad(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[BridgedPodsCluster]:
    with Lab() as lab:
        yield BridgedPodsCluster(lab)


@pytest.mark.parametrize("version", SERVICE)
@pytest.mark.parametrize("where", ["pod", "host"])
def test_connected_udp_socket_of_a_removed_backend_on_the_bridge_gets_an_error(
    cluster: BridgedPodsCluster, where: str, version: str
) -> None:
    """Its packets are bridged to the MAC address of the old backend and cannot be redirected. The socket gets
    an error, and reaches the new backend after it connects again."""
    space: Space = cluster.client if where == "pod" else cluster.a
    host = SERVICE[version]
    cluster.write(cluster.w1)
    until(lambda: set(space.call(clients.spread_udp, host, 53, clients.ENOUGH)) == {"w1"})
    with Remote(space, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w1"
        cluster.write(cluster.w2)
        until(lambda: sock.ask(0.3) in ("ECONNABORTED", "EDESTADDRREQ"), "the socket gets no error", AT_ONCE)
        sock.connect(host, 53)
        until(lambda: sock.ask(0.3) == "w2", "the socket is not served after connect()", AT_ONCE)


@pytest.mark.parametrize("version", SERVICE)
def test_connected_udp_socket_of_a_remote_backend_is_redirected(
    cluster: BridgedPodsCluster, version: str
) -> None:
    """Its packets are routed through the bridge device, so that they can be sent to the new backend."""
    host = SERVICE[version]
    cluster.write(cluster.w2)
    until(lambda: set(cluster.client.call(clients.spread_udp, host, 53, clients.ENOUGH)) == {"w2"})
    with Remote(cluster.client, host) as sock:
        sock.connect(host, 53)
        assert sock.ask() == "w2"
        cluster.write(cluster.w1)
        until(lambda: sock.ask(0.3) == "w1", "the socket is not redirected", AT_ONCE)


@pytest.mark.parametrize("version", SERVICE)
@pytest.mark.parametrize("end", [*same_ports.ENDS, "udp"])
@pytest.mark.parametrize("backend", ["local", "remote"])
def test_bridged_pod_uses_one_source_port_for_a_service_and_its_backend(
    cluster: BridgedPodsCluster, backend: str, end: str, version: str
) -> None:
    """The client passes no socket hook. Its direct flow gets another source port; the Service's keeps it."""
    pod = cluster.w1 if backend == "local" else cluster.w2
    cluster.write(pod)
    until(
        lambda: (
            set(cluster.client.call(clients.spread_udp, SERVICE[version], 53, clients.ENOUGH)) == {pod.name}
        )
    )
    targets = same_ports.targets(SERVICE[version], pod, "udp" if end == "udp" else "tcp")
    assert same_ports.ask_unhooked(cluster.client, targets, end) == pod.name
