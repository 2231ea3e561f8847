"""The node, pods and Services of the packet tests. A Service has one backend, so that results are certain."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import SCTP
from scapy.packet import Packet

from tests.lab import Agent, Lab, manifests
from tests.packets.wire import Wire

TRANSPORTS = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
#: The service port, the NodePort and the target port by protocol.
PORTS = {"TCP": (80, 30080, 8080), "UDP": (53, 30053, 8053), "SCTP": (3868, 30868, 3869)}


class FamilyAddresses(NamedTuple):
    """The addresses of one family: clients, the node, frontends of Services, and pods."""

    version: int
    client: str
    other_client: str
    node: str
    node_on_pods: str
    web: str
    web_external: str
    web_balancer: str
    local_balancer: str
    elsewhere_balancer: str
    ranged_balancer: str
    empty: str
    own: str
    remote_pod: str
    local_pod: str
    client_pod: str
    node_b: str

    @property
    def number(self) -> int:
        """The number of the family for system calls."""
        return socket.AF_INET if self.version == 4 else socket.AF_INET6

    def ip(self, source: str, destination: str, **fields: Any) -> Packet:
        kind = IP if self.version == 4 else IPv6
        return kind(src=source, dst=destination, **fields)


V4 = FamilyAddresses(
    4,
    "198.51.100.7",
    "198.51.100.200",
    "172.18.0.1",
    "10.244.1.1",
    "10.96.0.10",
    "192.0.2.80",
    "203.0.113.10",
    "203.0.113.20",
    "203.0.113.30",
    "203.0.113.40",
    "10.96.0.50",
    "10.96.0.60",
    "10.244.2.2",
    "10.244.1.2",
    "10.244.1.3",
    "172.18.0.2",
)
V6 = FamilyAddresses(
    6,
    "2001:db8:51::7",
    "2001:db8:51::200",
    "fd00:172:18::1",
    "fd00:10:244:1::1",
    "fd00:10:96::10",
    "2001:db8:2::80",
    "2001:db8:113::10",
    "2001:db8:113::20",
    "2001:db8:113::30",
    "2001:db8:113::40",
    "fd00:10:96::50",
    "fd00:10:96::60",
    "fd00:10:244:2::2",
    "fd00:10:244:1::2",
    "fd00:10:244:1::3",
    "fd00:172:18::2",
)
FAMILIES = (V4, V6)

_SERVICE_PORTS = [
    {"name": name.lower(), "port": port, "protocol": name, "nodePort": node_port}
    for name, (port, node_port, _) in PORTS.items()
]
_SLICE_PORTS = [
    {"name": name.lower(), "port": target, "protocol": name} for name, (_, _, target) in PORTS.items()
]


def _ports(node_ports_from: int) -> list[dict[str, Any]]:
    return [{**port, "nodePort": node_ports_from + i} for i, port in enumerate(_SERVICE_PORTS)]


def _documents() -> list[manifests.Document]:
    made = []

    def add(
        name: str, backends: tuple[str, str] | None, node: str, balancers: list[str], **spec: Any
    ) -> None:
        service = manifests.service(name, **{"ports": _SERVICE_PORTS, **spec})
        service["status"] = {"loadBalancer": {"ingress": [{"ip": ip} for ip in balancers]}}
        made.append(service)
        for address in backends or ():
            made.append(manifests.slice_of(name, [manifests.endpoint(address, node)], ports=_SLICE_PORTS))

    def both(field: str) -> list[str]:
        return [getattr(family, field) for family in FAMILIES]

    remote, local = (V4.remote_pod, V6.remote_pod), (V4.local_pod, V6.local_pod)
    add(
        "web",
        remote,
        "node-b",
        both("web_balancer"),
        type="LoadBalancer",
        clusterIPs=both("web"),
        externalIPs=both("web_external"),
    )
    add(
        "local",
        local,
        "node-a",
        both("local_balancer"),
        type="LoadBalancer",
        clusterIPs=["10.96.0.20", "fd00:10:96::20"],
        externalTrafficPolicy="Local",
        ports=_ports(30200),
    )
    add(
        "elsewhere",
        remote,
        "node-b",
        both("elsewhere_balancer"),
        type="LoadBalancer",
        clusterIPs=["10.96.0.30", "fd00:10:96::30"],
        externalTrafficPolicy="Local",
        ports=_ports(30300),
    )
    add(
        "ranged",
        remote,
        "node-b",
        both("ranged_balancer"),
        type="LoadBalancer",
        clusterIPs=["10.96.0.40", "fd00:10:96::40"],
        loadBalancerSourceRanges=["198.51.100.0/25", "2001:db8:51::/121"],
        ports=_ports(30400),
    )
    add("empty", None, "", [], type="NodePort", clusterIPs=both("empty"), ports=_ports(30500))
    add(
        "own",
        local,
        "node-a",
        [],
        clusterIPs=both("own"),
        ports=_ports(0)[:0] + [{**port, "nodePort": 0} for port in _SERVICE_PORTS],
    )
    return made


class PacketCluster:
    """node-a with an agent, its pods on devices p1 (a backend) and p2 (a client), and the route to node-b."""

    def __init__(self, lab: Lab, *arguments: str, more: Sequence[manifests.Document] = ()) -> None:
        self.node = lab.node("node-a")
        lab.node("node-b")
        self.backend = self.node.pod("backend")
        self.client = self.node.pod("client")
        folder = lab.folder / "manifests"
        manifests.write(folder / "all.yaml", *_documents(), *more)
        self.agent: Agent = self.node.agent(*arguments, manifests=folder).start()
        self.wire = Wire(self.node)
