"""What has to work in every network: each check is a column of the table in docs/tested.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.cnis.cluster import Cluster, unhooked
from tests.lab import Pod, clients
from tests.lab.spaces import Space

Check = Callable[[Cluster, str], None]
_MANY = clients.ENOUGH


def _replies(
    space: Space, ask: Callable[..., Any], address: str, port: int, count: int = _MANY
) -> dict[str, Any]:
    """Returns the addresses of clients by the name of the server that has seen them.

    Asserts that replies come from the address and port that the client has used.
    """
    found: dict[str, set[str]] = {}
    for reply in space.call(clients.repeated, count, ask, address, port):
        assert tuple(reply.get("from") or reply["getpeername"]) == (address, port)
        found.setdefault(reply["name"], set()).add(reply["peer"])
    return found


def _of_pod(cluster: Cluster, pod: Pod, family: str) -> dict[str, set[str]]:
    """What both servers see of a pod on node-a: its own address, unless the network masquerades it."""
    own = cluster.address(pod, family)
    far = cluster.address(cluster.a, family) if cluster.network.masks_pods else own
    return {"w1": {own}, "w2": {far}}


def pods_sockets(cluster: Cluster, family: str) -> None:
    """A pod's socket reaches all endpoints of a ClusterIP, which see the pod's address."""
    service = cluster.cluster_ip("web", family)
    wanted = _of_pod(cluster, cluster.client, family)
    assert _replies(cluster.client, clients.ask_tcp, service, 80) == wanted
    for ask in (clients.ask_udp, clients.ask_udp_connected):
        assert _replies(cluster.client, ask, service, 53) == wanted


def pods_packets(cluster: Cluster, family: str) -> None:
    """A pod without a socket hook reaches all endpoints of a ClusterIP, which see the pod's address."""
    service = cluster.cluster_ip("web", family)
    wanted = _of_pod(cluster, cluster.client, family)
    for ask, port in ((clients.ask_tcp, 80), (clients.ask_udp, 53)):
        found = _replies(unhooked(cluster.client), ask, service, port)
        assert found.keys() == wanted.keys()
        assert found == wanted or cluster.network.masks_packets


def node_sockets(cluster: Cluster, family: str) -> None:
    """Processes on the node reach all endpoints of a ClusterIP."""
    _from_node(cluster, cluster.a, family)


def node_packets(cluster: Cluster, family: str) -> None:
    """Clients on the node without a socket hook reach all endpoints of a ClusterIP."""
    _from_node(cluster, unhooked(cluster.a), family)


def _from_node(cluster: Cluster, space: Space, family: str) -> None:
    service = cluster.cluster_ip("web", family)
    assert _replies(space, clients.ask_tcp, service, 80).keys() == {"w1", "w2"}
    assert _replies(space, clients.ask_udp, service, 53).keys() == {"w1", "w2"}


def node_port(cluster: Cluster, family: str) -> None:
    """A client outside reaches all endpoints of a NodePort at either node, and replies have its address."""
    for node in (cluster.a, cluster.b):
        address = cluster.address(node, family)
        found = _replies(cluster.outside, clients.ask_tcp, address, cluster.node_port("web"))
        assert found.keys() == {"w1", "w2"}
        client = cluster.outside_address(family)
        assert cluster.network.shows_clients or not any(client in peers for peers in found.values()), (
            f"{client} is not masqueraded: {found}"
        )


def node_port_udp(cluster: Cluster, family: str) -> None:
    """A client outside reaches all endpoints of a UDP NodePort, connected or not."""
    address, port = cluster.address(cluster.a, family), cluster.node_port("web", "UDP")
    for ask in (clients.ask_udp, clients.ask_udp_connected):
        assert _replies(cluster.outside, ask, address, port).keys() == {"w1", "w2"}


def hairpin_sockets(cluster: Cluster, family: str) -> None:
    """A pod reaches itself through its Service."""
    _hairpin(cluster, cluster.w1, family)


def hairpin_packets(cluster: Cluster, family: str) -> None:
    """A pod without a socket hook reaches itself through its Service."""
    _hairpin(cluster, unhooked(cluster.w1), family)


def _hairpin(cluster: Cluster, space: Space, family: str) -> None:
    service = cluster.cluster_ip("self", family)
    assert _replies(space, clients.ask_tcp, service, 80, 5).keys() == {"w1"}
    assert _replies(space, clients.ask_udp, service, 53, 5).keys() == {"w1"}


def local_policy(cluster: Cluster, family: str) -> None:
    """With externalTrafficPolicy Local endpoints of the node see the address of the client outside."""
    address, client = cluster.address(cluster.a, family), cluster.outside_address(family)
    for ask, protocol in ((clients.ask_tcp, "TCP"), (clients.ask_udp, "UDP")):
        found = _replies(cluster.outside, ask, address, cluster.node_port("local", protocol), 10)
        assert found == {"w1": {client}}


def pod_to_pod(cluster: Cluster, family: str) -> None:
    """Pods reach pods directly, on their node and on the other one, and have their own address there."""
    for space in (cluster.client, unhooked(cluster.client)):
        wanted = _of_pod(cluster, cluster.client, family)
        for pod in (cluster.w1, cluster.w2):
            address = cluster.address(pod, family)
            for ask, port in ((clients.ask_tcp, 8080), (clients.ask_udp, 8053)):
                assert _replies(space, ask, address, port, 3) == {pod.name: wanted[pod.name]}


def affinity(cluster: Cluster, family: str) -> None:
    """With session affinity a client stays with one endpoint: a pod, one without a socket hook, one outside."""
    for ask, port, protocol in ((clients.ask_tcp, 80, "TCP"), (clients.ask_udp, 53, "UDP")):
        service = cluster.cluster_ip("sticky", family)
        node = cluster.address(cluster.a, family)
        targets: list[tuple[Space, str, int]] = [
            (cluster.client, service, port),
            (cluster.outside, node, cluster.node_port("sticky", protocol)),
        ]
        if "ClusterIP, in packets" not in cluster.network.lacks:
            targets.append((unhooked(cluster.client), service, port))
        for space, address, number in targets:
            assert len(_replies(space, ask, address, number, 12)) == 1


def host_port(cluster: Cluster, family: str) -> None:
    """A port of the pod's node leads to the pod, from outside, from the node and from pods of both nodes."""
    address, port = cluster.address(cluster.a, family), cluster.network.host_port
    for space in (cluster.outside, cluster.a, cluster.client, cluster.w1, cluster.b, cluster.w2):
        assert _replies(space, clients.ask_tcp, address, port, 3).keys() == {"w1"}


CHECKS: dict[str, Check] = {
    "ClusterIP, at sockets": pods_sockets,
    "ClusterIP, in packets": pods_packets,
    "ClusterIP, from the node, at sockets": node_sockets,
    "ClusterIP, from the node, in packets": node_packets,
    "NodePort": node_port,
    "NodePort, UDP": node_port_udp,
    "hairpin, at sockets": hairpin_sockets,
    "hairpin, in packets": hairpin_packets,
    "externalTrafficPolicy: Local": local_policy,
    "pod to pod": pod_to_pod,
    "session affinity": affinity,
    "hostPort": host_port,
}
