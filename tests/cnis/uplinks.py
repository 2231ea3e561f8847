"""Nodes whose uplink is a VLAN, a bond, a tunnel, or has its addresses elsewhere; pods are connected as the lab does."""

from __future__ import annotations

from tests.cnis import kinds
from tests.cnis.network import FAMILIES, Network, ip, pod_cidr
from tests.cnis.nodes import AddressOnLoopback
from tests.lab import LabNode
from tests.lab.lab import OUTSIDE, OUTSIDE6
from tests.lab.spaces import Space

_VLAN = 5
#: Addresses in WireGuard's network: of nodes by their number, and of the client outside.
_WG, _WG6, _CLIENT = "10.9.0.{}", "fd00:10:9::{:x}", 254


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


class VlanOnBond(Uplink):
    needs = ("bond", "vlan")
    device = f"bond0.{_VLAN}"

    def build(self, node: LabNode, port: str) -> None:
        other_end = _bond(node, port, "balance-xor xmit_hash_policy layer3+4")
        _tag(node, "bond0")
        ip(node.lab.switch, f"link set {other_end} nomaster")
        ip(node.lab.switch, f"link set {_tag(node.lab.switch, other_end)} master br0")


class AddressOnDummy(Devices, AddressOnLoopback):
    """The Node's InternalIPs are on a dummy device, as where BGP leads to them."""

    needs = ("dummy",)
    device = "dummy0"

    def prepare(self, node: LabNode) -> None:
        ip(node, "link add dummy0 type dummy", "link set dummy0 up")
        super().prepare(node)


class OnWireguard(Devices):
    """The nodes, their pods and the client outside reach each other through WireGuard alone."""

    needs = ("wireguard",)
    routes_pods = False

    def __init__(self, title: str, *options: str) -> None:
        super().__init__(title)
        self.options = options
        #: Public keys, and addresses outside WireGuard, by network namespace.
        self._keys: dict[str, str] = {}
        self._underlay: dict[str, str] = {}

    def prepare(self, node: LabNode) -> None:
        outside = node.lab.outside
        underlay = self._underlay[node.netns] = node.address
        self._add(node, node.number)
        if outside.netns not in self._keys:
            self._add(outside, _CLIENT)
            outside.address, outside.address6 = _WG.format(_CLIENT), _WG6.format(_CLIENT)
        node.address, node.address6 = _WG.format(node.number), _WG6.format(node.number)
        ip(node, "-4 route del default", "-6 route del default")
        ip(node, "-4 route add default dev wg0", "-6 route add default dev wg0")
        own = (f"{node.address}/32", f"{node.address6}/128")
        kinds.add_wireguard_peer(outside, "wg0", self._keys[node.netns], underlay, *own)
        kinds.add_wireguard_peer(node, "wg0", self._keys[outside.netns], OUTSIDE, "0.0.0.0/0", "::/0")

    def _add(self, space: Space, number: int) -> None:
        self._keys[space.netns] = kinds.add_wireguard(space, "wg0", number)
        ip(
            space,
            f"address add {_WG.format(number)}/24 dev wg0",
            f"address add {_WG6.format(number)}/64 dev wg0 nodad",
            "link set wg0 mtu 1420 up",
        )

    def join(self, node: LabNode, other: LabNode) -> None:
        pods = [pod_cidr(other, family) for family in FAMILIES]
        own = (f"{other.address}/32", f"{other.address6}/128")
        underlay = self._underlay[other.netns]
        kinds.add_wireguard_peer(node, "wg0", self._keys[other.netns], underlay, *own, *pods)
        ip(node, *(f"route add {each} dev wg0" for each in pods))


NETWORKS: list[Devices] = [
    Vlan("VLAN"),
    Bond("bond, balance-rr", "balance-rr"),
    VlanOnBond("VLAN on a bond"),
    AddressOnDummy("the node's address on a dummy"),
    OnWireguard("WireGuard"),
]
