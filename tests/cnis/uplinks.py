"""Nodes whose uplink is a VLAN or a bond; their pods are connected as the lab does by itself."""

from __future__ import annotations

from tests.cnis.network import Network, ip, pod_cidr
from tests.lab import LabNode
from tests.lab.lab import OUTSIDE, OUTSIDE6
from tests.lab.spaces import Space

_VLAN = 5


class Devices(Network):
    """``needs``: kinds of devices that the kernel has to have."""

    needs: tuple[str, ...] = ()


class Uplink(Devices):
    """The node's addresses and routes are on a device that :meth:`build` makes of eth0."""

    routes_pods = False
    #: What the nodes' addresses and routes are on.
    device = ""

    def build(self, node: LabNode, port: str) -> None:
        """``port``: the switch's device for this node, which is one of the bridge br0."""
        raise NotImplementedError

    def prepare(self, node: LabNode) -> None:
        ip(node, "link set eth0 down", "-4 address flush dev eth0", "-6 address flush dev eth0")
        self.build(node, f"n{node.number}")
        ip(
            node,
            f"link set {self.device} up",
            f"address add {node.address}/24 dev {self.device}",
            f"address add {node.address6}/64 dev {self.device} nodad",
            f"-4 route add default via {OUTSIDE}",
            f"-6 route add default via {OUTSIDE6} dev {self.device}",
        )

    def join(self, node: LabNode, other: LabNode) -> None:
        ip(
            node,
            f"route add {pod_cidr(other, 'IPv4')} via {other.address}",
            f"route add {pod_cidr(other, 'IPv6')} via {other.address6} dev {self.device}",
        )


def _tag(space: Space, lower: str) -> str:
    """Adds a VLAN to a device, and returns its name."""
    upper = f"{lower}.{_VLAN}"
    ip(space, f"link add link {lower} name {upper} type vlan id {_VLAN}", f"link set {upper} up")
    return upper


def _bond(node: LabNode, port: str, mode: str) -> str:
    """Makes a bond of eth0 and a second cable to the switch, at both ends; returns that of the switch."""
    switch, second, other_end = node.lab.switch, f"m{node.number}", f"bond{node.number}"
    ip(
        switch,
        f"link set {port} down nomaster",
        f"link add {second} type veth peer name eth1 netns {node.netns}",
    )
    for space, bond, members in ((node, "bond0", ("eth0", "eth1")), (switch, other_end, (port, second))):
        ip(space, f"link add {bond} type bond mode {mode} miimon 100")
        for member in members:
            ip(space, f"link set {member} down", f"link set {member} master {bond}", f"link set {member} up")
        ip(space, f"link set {bond} up")
    ip(switch, f"link set {other_end} master br0")
    return other_end


class Vlan(Uplink):
    """The switch removes the tag."""

    needs = ("vlan",)
    device = f"eth0.{_VLAN}"

    def build(self, node: LabNode, port: str) -> None:
        ip(node, "link set eth0 up")
        _tag(node, "eth0")
        ip(node.lab.switch, f"link set {port} nomaster")
        ip(node.lab.switch, f"link set {_tag(node.lab.switch, port)} master br0")


class Bond(Uplink):
    needs = ("bond",)
    device = "bond0"

    def __init__(self, title: str, mode: str) -> None:
        super().__init__(title)
        self._mode = mode

    def build(self, node: LabNode, port: str) -> None:
        _bond(node, port, self._mode)


NETWORKS: list[Devices] = [Vlan("VLAN"), Bond("bond, balance-rr", "balance-rr")]
