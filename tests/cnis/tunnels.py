"""Pods of other nodes behind tunnels, and pods on ipvlan and netkit.

WireGuard's device and routes are those of flannel 0.28.9 (pkg/backend/wireguard/{wireguard_network,device}.go), IPIP's
those of Calico's main branch (felix/dataplane/linux/ipip_mgr.go).
"""

from __future__ import annotations

from tests.cnis import kinds
from tests.cnis.network import CLUSTER_CIDRS, FAMILIES, ip, pod_cidr
from tests.cnis.uplinks import Devices
from tests.lab import LabNode, Pod


def _first(node: LabNode, family: str) -> str:
    """The first address of the node's podCIDR, which flannel gives to its device."""
    return pod_cidr(node, family).split("/", maxsplit=1)[0]


class Geneve(Devices):
    """A routed tunnel for each family of pods."""

    needs = ("geneve",)
    routes_pods = False

    def join(self, node: LabNode, other: LabNode) -> None:
        for family, remote, length in (("IPv4", other.address, "32"), ("IPv6", other.address6, "128")):
            device = f"geneve{family[-1]}"
            ip(
                node,
                f"link add {device} type geneve id {family[-1]} remote {remote} dstport 6081",
                f"link set {device} mtu 1400 up",
                f"address add {_first(node, family)}/{length} dev {device} {'nodad' if length == '128' else ''}",
                f"-{family[-1]} route add {pod_cidr(other, family)} via {_first(other, family)} onlink dev {device}",
            )


class CalicoIpip(Devices):
    """The device for tunnels to any node, and a route through each; IPv6 is routed."""

    needs = ("ipip",)
    routes_pods = False

    def prepare(self, node: LabNode) -> None:
        # The module makes it in every network namespace.
        ip(node, f"address add {_first(node, 'IPv4')}/32 dev tunl0", "link set tunl0 mtu 1480 up")

    def join(self, node: LabNode, other: LabNode) -> None:
        ip(
            node,
            f"route add {pod_cidr(other, 'IPv4')} via {other.address} dev tunl0 onlink mtu 1480",
            f"route add {pod_cidr(other, 'IPv6')} via {other.address6}",
        )


class FlannelWireguard(Devices):
    """One device for both families, with a route to the whole network."""

    needs = ("wireguard",)
    routes_pods = False

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._keys: dict[str, str] = {}

    def prepare(self, node: LabNode) -> None:
        self._keys[node.netns] = kinds.add_wireguard(node, "flannel-wg", node.number)
        ip(
            node,
            f"address add {_first(node, 'IPv4')}/32 dev flannel-wg",
            f"address add {_first(node, 'IPv6')}/128 dev flannel-wg nodad",
            "link set flannel-wg mtu 1420 up",
            *(f"route add {cidr} dev flannel-wg" for cidr in CLUSTER_CIDRS.values()),
        )

    def join(self, node: LabNode, other: LabNode) -> None:
        pods = [pod_cidr(other, family) for family in FAMILIES]
        kinds.add_wireguard_peer(node, "flannel-wg", self._keys[other.netns], other.address, *pods)


class Ipvlan(Devices):
    """Pods share the uplink's link address, and their node has an ipvlan of its own to reach them.

    What comes in for a pod is handed to it by the uplink, whatever address that has been translated from; pods of a
    node reach each other past it. Mode l3: pods' packets take the routes of the node.
    """

    needs = ("ipvlan",)
    routes_pods = False
    shows_clients = True
    # They leave as the node's own do: endpoints on this node would answer the pod itself, past all programs.
    masks_packets = True

    def __init__(self, title: str, mode: str) -> None:
        super().__init__(title)
        self._mode = mode

    def prepare(self, node: LabNode) -> None:
        # In mode l2 it is on the LAN, too, where pods ask for its link address.
        own = (
            (f"172.18.0.{100 + node.number}", f"fd00:172:18::{100 + node.number}")
            if self._mode == "l2"
            else (f"10.244.{node.number}.1", f"fd00:10:244:{node.number}::1")
        )
        ip(
            node,
            f"link add link eth0 shim0 type ipvlan mode {self._mode}",
            "link set shim0 up",
            f"address add {own[0]}/32 dev shim0",
            f"address add {own[1]}/128 dev shim0 nodad",
        )

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        ip(
            node,
            f"link add link eth0 ipvlan-{name} type ipvlan mode {self._mode}",
            f"link set ipvlan-{name} netns {pod.netns} name eth0",
        )
        if self._mode == "l2":
            number = 16 * node.number + len(node.pods)
            pod.set_addresses(f"172.18.0.{number}", f"fd00:172:18::{number:x}")
        lengths = (24, 64) if self._mode == "l2" else (32, 128)
        gateways = ("via 172.18.0.254", "via fd00:172:18::fe") if self._mode == "l2" else ("", "")
        ip(
            pod,
            "link set eth0 up",
            f"address add {pod.address}/{lengths[0]} dev eth0",
            f"address add {pod.address6}/{lengths[1]} dev eth0 nodad",
            f"-4 route add default {gateways[0]} dev eth0",
            f"-6 route add default {gateways[1]} dev eth0",
        )
        ip(node, f"route add {pod.address} dev shim0", f"route add {pod.address6} dev shim0")
        return pod

    def join(self, node: LabNode, other: LabNode) -> None:
        if self._mode != "l2":
            ip(
                node,
                f"route add {pod_cidr(other, 'IPv4')} via {other.address}",
                f"route add {pod_cidr(other, 'IPv6')} via {other.address6}",
            )


class Netkit(Devices):
    """Pods have a netkit, as Cilium's with bpf.datapathMode=netkit (mode L3) or netkit-l2."""

    needs = ("netkit",)

    def __init__(self, title: str, mode: int) -> None:
        super().__init__(title)
        self._mode = mode

    def connect(self, node: LabNode, name: str) -> Pod:
        pod = node.bare_pod(name)
        device, gateway, gateway6 = f"lxc{name}", f"10.244.{node.number}.1", f"fd00:10:244:{node.number}::1"
        kinds.add_netkit(node, device, f"to-{name}", self._mode)
        ip(
            node,
            f"link set to-{name} netns {pod.netns} name eth0",
            f"link set {device} up",
            f"address add {gateway}/32 dev {device}",
            f"address add {gateway6}/128 dev {device} nodad",
            f"route add {pod.address} dev {device}",
            f"route add {pod.address6} dev {device}",
        )
        ip(
            pod,
            "link set eth0 up",
            f"address add {pod.address}/32 dev eth0",
            f"address add {pod.address6}/128 dev eth0 nodad",
            f"route add {gateway} dev eth0",
            f"route add {gateway6} dev eth0",
            f"route add default via {gateway}",
            f"route add default via {gateway6} dev eth0",
        )
        return pod


NETWORKS: list[Devices] = [
    Geneve("Geneve"),
    CalicoIpip("IPIP as Calico's"),
    FlannelWireguard("WireGuard as flannel's"),
    Ipvlan("ipvlan, L2, with one of the node", "l2"),
    Ipvlan("ipvlan, L3", "l3"),
    Netkit("netkit, L3", kinds.NETKIT_L3),
    Netkit("netkit, L2", kinds.NETKIT_L2),
]
