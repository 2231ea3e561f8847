"""The cluster of the end-to-end tests: two nodes, a server pod on each, Services of every type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.lab import Agent, Lab, LabNode, Pod, manifests, servers

SERVICE_IPS = {"v4": "10.96.0.10", "v6": "fd00:10:96::10", "mapped": "::ffff:10.96.0.10"}
EXTERNAL = "192.0.2.80"
BALANCER = "203.0.113.10"
NODE_PORT = 30080
PORTS = [
    {"name": "http", "port": 80, "protocol": "TCP", "nodePort": NODE_PORT},
    {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": 30053},
]
SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "udp", "port": 8053, "protocol": "UDP"},
]


class TwoNodeCluster:
    """``a`` and ``b`` are nodes, ``w1`` and ``w2`` are server pods on them, ``client`` is a pod on ``a``."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        #: The error of connect() where a Service has no endpoint, and no local one with traffic policy Local.
        self.refused = "ECONNREFUSED"
        self.dropped = "EHOSTUNREACH"
        self.a: LabNode = lab.node("node-a")
        self.b: LabNode = lab.node("node-b")
        self.client: Pod = self.a.pod("client")
        self.w1: Pod = self.a.pod("w1")
        self.w2: Pod = self.b.pod("w2")
        for pod in (self.w1, self.w2):
            servers.start(pod, pod.name, 8080, 8053, 9000)
        self.manifests: Path = lab.folder / "manifests"
        self.write_web(self.w1, self.w2)
        self.write_others()

    def agent(self, *arguments: str) -> Agent:
        """Its conntrack map is an eighth of the usual: the kernel fills all of it when it is made."""
        return self.a.agent("--max-conntrack", "65536", *arguments, manifests=self.manifests)

    def write_web(self, *pods: Pod, **endpoint: Any) -> None:
        """Writes the Service shop/web with these pods as endpoints."""
        spec: dict[str, Any] = {
            "type": "LoadBalancer",
            "clusterIPs": [SERVICE_IPS["v4"], SERVICE_IPS["v6"]],
            "externalIPs": [EXTERNAL],
            "ports": PORTS,
        }
        web = manifests.service("web", **spec)
        web["status"] = {"loadBalancer": {"ingress": [{"ip": BALANCER, "ipMode": "VIP"}]}}
        documents = [web]
        for addresses in ([p.address for p in pods], [p.address6 for p in pods]):
            endpoints = [
                manifests.endpoint(address, pod.node.name, **endpoint)
                for address, pod in zip(addresses, pods, strict=True)
            ]
            if endpoints:
                documents.append(manifests.slice_of("web", endpoints, ports=SLICE_PORTS))
        manifests.write(self.manifests / "web.yaml", *documents)

    def write_others(self) -> None:
        """Writes Services without endpoints, with remote endpoints only, and with endpoint w1 only."""
        ports = [{**port, "nodePort": 0} for port in PORTS]
        manifests.write(
            self.manifests / "others.yaml",
            manifests.service("empty", clusterIPs=["10.96.0.20", "fd00:10:96::20"], ports=ports),
            manifests.service(
                "elsewhere",
                clusterIPs=["10.96.0.30", "fd00:10:96::30"],
                ports=ports,
                internalTrafficPolicy="Local",
            ),
            manifests.slice_of(
                "elsewhere",
                [manifests.endpoint(self.w2.address, "node-b")],
                ports=SLICE_PORTS,
            ),
            manifests.slice_of(
                "elsewhere",
                [manifests.endpoint(self.w2.address6, "node-b")],
                ports=SLICE_PORTS,
            ),
            manifests.service("second", clusterIPs=["10.96.0.40"], ports=ports),
            manifests.slice_of("second", [manifests.endpoint(self.w1.address, "node-a")], ports=SLICE_PORTS),
        )
