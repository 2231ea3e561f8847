"""Two nodes with agents, pods in a network, and Services; a client outside that has no route to pods."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.cnis.network import Network, pod_cidr
from tests.lab import Agent, Lab, LabNode, Pod, manifests, servers
from tests.lab.spaces import Space

_SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "udp", "port": 8053, "protocol": "UDP"},
]
#: The Services by number, each with its endpoints and what its spec adds.
_SERVICES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "web": (("w1", "w2"), {}),
    "self": (("w1",), {}),
    "local": (("w1", "w2"), {"externalTrafficPolicy": "Local"}),
    "sticky": (("w1", "w2"), {"sessionAffinity": "ClientIP"}),
    "far": (("w2",), {}),
}


class Cluster:
    """``client`` and ``w1`` are pods of the node ``a``, ``w2`` is one of ``b``; then those of ``more_pods``."""

    more_pods: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, lab: Lab, network: Network) -> None:
        self.lab = lab
        self.network = network
        self.a, self.b = nodes = [lab.node("node-a"), lab.node("node-b")]
        self.outside = lab.outside
        for node in nodes:
            network.prepare(node)
        self.client, self.w1, self.w2 = (
            network.connect(node, name) for node, name in ((self.a, "client"), (self.a, "w1"), (self.b, "w2"))
        )
        for node_name, name in self.more_pods:
            network.connect(getattr(self, node_name), name)
        for node, other in ((self.a, self.b), (self.b, self.a)):
            network.join(node, other)
            network.finish(node)
        for pod in (self.w1, self.w2):
            servers.start(pod, pod.name, 8080, 8053, 9000)
        self.manifests = lab.folder / "manifests"
        self._write()
        self.agents: list[Agent] = [
            node.agent(*network.options, manifests=self.manifests).start(wait=False) for node in nodes
        ]
        for agent in self.agents:
            agent.wait_ready()
        for node, agent in zip(nodes, self.agents, strict=True):
            network.attach_late(node)
            network.settle(agent)

    # -- addresses

    def address(self, of: LabNode | Pod, family: str) -> str:
        return of.address if family == "IPv4" else of.address6

    def outside_address(self, family: str) -> str:
        return self.outside.address if family == "IPv4" else self.outside.address6

    def cluster_ip(self, name: str, family: str) -> str:
        number = [*_SERVICES].index(name) + 10
        return f"10.96.0.{number}" if family == "IPv4" else f"fd00:10:96::{number:x}"

    def node_port(self, name: str, protocol: str = "TCP") -> int:
        return [*_SERVICES].index(name) + (30080 if protocol == "TCP" else 30053)

    # -- manifests

    def _write(self) -> None:
        pods = {pod.name: pod for pod in (self.w1, self.w2)}
        documents = [self._node_object(node) for node in (self.a, self.b)]
        for name, (endpoints, more) in _SERVICES.items():
            ports = [
                {"name": "http", "port": 80, "protocol": "TCP", "nodePort": self.node_port(name)},
                {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": self.node_port(name, "UDP")},
            ]
            ips = [self.cluster_ip(name, family) for family in self.network.families]
            documents.append(manifests.service(name, type="NodePort", clusterIPs=ips, ports=ports, **more))
            for family in self.network.families:
                found = [
                    manifests.endpoint(self.address(pods[each], family), pods[each].node.name)
                    for each in endpoints
                ]
                documents.append(manifests.slice_of(name, found, ports=_SLICE_PORTS))
        manifests.write(self.manifests / "all.yaml", *documents)

    def _node_object(self, node: LabNode) -> manifests.Document:
        families = self.network.families
        addresses = [{"type": "InternalIP", "address": self.address(node, family)} for family in families]
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name},
            "spec": {"podCIDRs": [pod_cidr(node, family) for family in families]},
            "status": {"addresses": addresses},
        }


def unhooked(space: Space) -> Space:
    """The same namespace for processes that no socket hook sees: packet programs translate for them."""
    return Space(space.netns, None)
