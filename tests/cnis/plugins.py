"""The CNI plugins of Debian's package containernetworking-plugins, executed as a container runtime does."""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cnis.network import FAMILIES, Network, ip, pod_cidr, sysctl
from tests.lab import LabNode, Pod

FOLDER = Path("/usr/lib/cni")
#: This is what :attr:`Network.host_port` says of them.
HOST_PORT = 8088
_VERSION = "1.0.0"
DEFAULT_ROUTES = ("0.0.0.0/0", "::/0")

Plugin = dict[str, Any]

PORTMAP: Plugin = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
FIREWALL: Plugin = {"type": "firewall", "backend": "iptables"}
#: 1 Gbit/s: the qdiscs are there, but do not determine how long the tests take.
BANDWIDTH: Plugin = {
    "type": "bandwidth",
    **dict.fromkeys(("ingressRate", "egressRate"), 10**9),
    **dict.fromkeys(("ingressBurst", "egressBurst"), 10**8),
}
TUNING: Plugin = {"type": "tuning", "sysctl": {"net.ipv4.conf.all.log_martians": "1"}, "mtu": 1400}


def host_local(node: LabNode, *ranges: Plugin, routes: tuple[str, ...] = DEFAULT_ROUTES) -> Plugin:
    """The configuration of the IPAM plugin, by default with the node's podCIDRs."""
    found = ranges or tuple({"subnet": pod_cidr(node, family)} for family in FAMILIES)
    return {
        "type": "host-local",
        "dataDir": str(node.lab.folder / f"ipam-{node.name}"),
        "ranges": [[each] for each in found],
        "routes": [{"dst": each} for each in routes],
    }


def add(pod: Pod, *chain: Plugin) -> None:
    """Connects the pod by a chain of plugins, and notes the addresses that it gets.

    The folder of the binaries is the only thing that a runtime would have to configure.
    """
    result: Any = None
    for plugin in chain:
        config = {"cniVersion": _VERSION, "name": "lab", **plugin}
        if "portMappings" in plugin.get("capabilities", {}):
            ports = [{"hostPort": HOST_PORT, "containerPort": 8080, "protocol": "tcp"}]
            config["runtimeConfig"] = {"portMappings": ports if pod.name == "w1" else []}
        if result is not None:
            config["prevResult"] = result
        result = _execute(pod, config)
    addresses = [ipaddress.ip_interface(each["address"]).ip for each in result["ips"]]
    first, second = sorted(addresses, key=lambda address: address.version)
    pod.set_addresses(str(first), str(second))


def _execute(pod: Pod, config: Plugin) -> Any:
    environment = {
        **os.environ,
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": pod.netns,
        "CNI_NETNS": f"/run/netns/{pod.netns}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(FOLDER),
    }
    command = [str(FOLDER / config["type"])]
    process = pod.node.popen(command, join_cgroup=False, stdin=-1, stdout=-1, stderr=-1, env=environment)
    output, errors = process.communicate(json.dumps(config).encode())
    if process.returncode:
        raise RuntimeError(f"{config['type']} {pod.name}: {output.decode()}{errors.decode()}")
    return json.loads(output)


class Plugins(Network):
    """A main plugin, and those that are chained after it."""

    def __init__(self, title: str, main: Plugin, *chained: Plugin, bridge_netfilter: bool = False) -> None:
        super().__init__(title)
        self._main = main
        self._chained = chained
        self.host_port = HOST_PORT if PORTMAP in chained else 0
        self._bridge_netfilter = bridge_netfilter
        # Its rule exempts the node's own pods alone.
        self.masks_pods = bool(main.get("ipMasq"))

    def prepare(self, node: LabNode) -> None:
        sysctl(node, **{"bridge__bridge-nf-call-ip*tables": int(self._bridge_netfilter)})

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        # The plugin adds default routes itself where it is told to.
        routes = () if self._main.get("isDefaultGateway") else DEFAULT_ROUTES
        add(pod, {**self._main, "ipam": host_local(node, routes=routes)}, *self._chained)
        return pod


class Macvlan(Network):
    """Pods on the nodes' LAN, and a macvlan of the node, without which it does not reach its own pods."""

    routes_pods = False
    lacks: Mapping[str, str] = {
        "ClusterIP, in packets": "pods' packets to other networks do not pass their node",
        "hairpin, in packets": "pods' packets to other networks do not pass their node",
        "externalTrafficPolicy: Local": "the pod answers a client on its own LAN without its node",
    }

    def prepare(self, node: LabNode) -> None:
        ip(
            node,
            "link add link eth0 shim0 type macvlan mode bridge",
            f"address add 172.18.0.{100 + node.number}/32 dev shim0",
            f"address add fd00:172:18::{100 + node.number}/128 dev shim0 nodad",
            "link set shim0 up",
        )

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        first = 16 * node.number
        ranges = [
            {
                "subnet": subnet,
                "rangeStart": f"{prefix}{mark.format(first)}",
                "rangeEnd": f"{prefix}{mark.format(first + 15)}",
                "gateway": gateway,
            }
            for subnet, prefix, mark, gateway in (
                ("172.18.0.0/24", "172.18.0.", "{}", "172.18.0.254"),
                ("fd00:172:18::/64", "fd00:172:18::", "{:x}", "fd00:172:18::fe"),
            )
        ]
        add(pod, {"type": "macvlan", "master": "eth0", "mode": "bridge", "ipam": host_local(node, *ranges)})
        for address in (pod.address, pod.address6):
            ip(node, f"route add {address} dev shim0")
        return pod


BRIDGE: Plugin = {"type": "bridge", "bridge": "cni0", "isDefaultGateway": True, "ipMasq": True}
NETWORKS: list[Network] = [
    Plugins("ptp", {"type": "ptp", "ipMasq": True}),
    Plugins(
        "ptp, portmap, firewall, bandwidth, tuning", {"type": "ptp"}, PORTMAP, FIREWALL, BANDWIDTH, TUNING
    ),
    Plugins("bridge", BRIDGE),
    Plugins("bridge, hairpinMode, portmap, firewall", {**BRIDGE, "hairpinMode": True}, PORTMAP, FIREWALL),
    Plugins("bridge, br_netfilter, portmap", {**BRIDGE, "hairpinMode": True}, PORTMAP, bridge_netfilter=True),
    Plugins("bridge, br_netfilter, promiscMode", {**BRIDGE, "promiscMode": True}, bridge_netfilter=True),
    Macvlan("macvlan, with one of the node"),
]
