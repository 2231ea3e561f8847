"""Overlays of VXLAN devices with static neighbours, as flannel and Calico make them: one device a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.cnis.network import FAMILIES, ip
from tests.lab import LabNode

#: MTU on a network with 1500, an option of ip, and the number of bits of a host.
_FAMILIES = {"IPv4": (1450, "-4", 32), "IPv6": (1430, "-6", 128)}


@dataclass(frozen=True)
class Vxlan:
    """The functions take a node and a family; ``address`` is the device's own, ``block`` what is behind it."""

    devices: Mapping[str, str]
    number: int
    port: int
    mac: Callable[[LabNode, str], str]
    address: Callable[[LabNode, str], str]
    block: Callable[[LabNode, str], str]
    #: The protocol of the routes; boot is what ``ip`` gives.
    protocol: str = "boot"

    def add_devices(self, node: LabNode) -> None:
        for family in FAMILIES:
            device, (mtu, _, bits) = self.devices[family], _FAMILIES[family]
            local = node.address if family == "IPv4" else node.address6
            nodad = "nodad" if family == "IPv6" else ""
            ip(
                node,
                f"link add {device} address {self.mac(node, family)} type vxlan id {self.number} dstport {self.port}"
                f" local {local} dev eth0 nolearning",
                f"address add {self.address(node, family)}/{bits} dev {device} {nodad}",
                f"link set {device} mtu {mtu} up",
            )

    def reach(self, node: LabNode, other: LabNode) -> None:
        """Routes the other node's block through its device."""
        for family in FAMILIES:
            device, option = self.devices[family], _FAMILIES[family][1]
            gateway, mac = self.address(other, family), self.mac(other, family)
            underlay = other.address if family == "IPv4" else other.address6
            node.run(["bridge", "fdb", "add", mac, "dev", device, "dst", underlay])
            ip(
                node,
                f"{option} neighbour add {gateway} lladdr {mac} dev {device} nud permanent",
                f"{option} route add {self.block(other, family)} via {gateway} dev {device} onlink proto {self.protocol}",
            )
