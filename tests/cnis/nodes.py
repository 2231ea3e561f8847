"""Nodes whose devices, addresses and routes are unusual; their pods are connected as the lab does by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tests.cnis.network import CLUSTER_CIDRS, Network, ip, pod_cidr, sysctl
from tests.lab import LabNode
from tests.lab.lab import OUTSIDE, OUTSIDE6

#: The client outside where it is not on the nodes' LAN, but behind their gateway.
_FAR, _FAR6 = "198.18.0.1", "2001:db8:18::1"
_TABLE, _MARK = 100, 0x64


#: The main table, by which the kernel looks up where a client without a hook sends to.
_NO_ROUTE: Mapping[str, str] = {
    "ClusterIP, from the node, in packets": "the node has no route for such a client, with kube-proxy neither"
}


def _no_default_route(node: LabNode) -> None:
    ip(node, "-4 route del default", "-6 route del default")


class TwoNics(Network):
    """The pods of other nodes are behind a second device, on a network of its own."""

    routes_pods = False

    def join(self, node: LabNode, other: LabNode) -> None:
        if node.number < other.number:
            ip(node, f"link add eth1 type veth peer name eth1 netns {other.netns}")
            for each in (node, other):
                ip(
                    each,
                    "link set eth1 up",
                    f"address add 172.19.0.{each.number}/24 dev eth1",
                    f"address add fd00:172:19::{each.number}/64 dev eth1 nodad",
                )
        ip(
            node,
            f"route add {pod_cidr(other, 'IPv4')} via 172.19.0.{other.number} dev eth1 onlink",
            f"route add {pod_cidr(other, 'IPv6')} via fd00:172:19::{other.number} dev eth1 onlink",
        )


class NoDefaultRoute(Network):
    """Nodes reach their own networks only."""

    lacks = _NO_ROUTE

    def prepare(self, node: LabNode) -> None:
        _no_default_route(node)


class TwoDefaultRoutes(Network):
    """A second default route, with another metric, leads to a second network where nobody forwards."""

    def prepare(self, node: LabNode) -> None:
        ip(
            node,
            "link add eth1 type veth peer name behind1",
            "link set eth1 up",
            "link set behind1 up",
            f"address add 172.20.0.{node.number}/24 dev eth1",
            f"address add fd00:172:20::{node.number}/64 dev eth1 nodad",
            "-4 route add default via 172.20.0.254 dev eth1 metric 4000",
            "-6 route add default via fd00:172:20::fe dev eth1 metric 4000",
        )


class AddressOnLoopback(Network):
    """The Node's InternalIPs are on lo, as with BGP to the host."""

    device = "lo"

    def prepare(self, node: LabNode) -> None:
        gateways = node.address, node.address6
        node.address, node.address6 = f"198.51.100.{node.number}", f"2001:db8:51::{node.number}"
        ip(
            node,
            f"address add {node.address}/32 dev {self.device}",
            f"address add {node.address6}/128 dev {self.device} nodad",
        )
        outside = node.lab.outside
        for address, gateway in zip((node.address, node.address6), gateways, strict=True):
            ip(outside, f"route add {address} via {gateway}")


class PolicyRouting(Network):
    """The default route is in a table of its own, for marked connections and for the node's own address.

    The client is behind the gateway. A connection's mark is restored for its replies, as operators do with several
    uplinks.
    """

    lacks = _NO_ROUTE

    def prepare(self, node: LabNode) -> None:
        outside = node.lab.outside
        if outside.address != _FAR:
            ip(outside, f"address add {_FAR}/32 dev lo", f"address add {_FAR6}/128 dev lo")
            ip(outside, "route del 172.18.0.0/24 dev eth0", f"route add 172.18.0.0/24 dev eth0 src {_FAR}")
            ip(outside, "-6 route del fd00:172:18::/64 dev eth0")
            ip(outside, f"-6 route add fd00:172:18::/64 dev eth0 src {_FAR6}")
            outside.address, outside.address6 = _FAR, _FAR6
        _no_default_route(node)
        for option, gateway, address, command in (
            ("-4", OUTSIDE, node.address, "iptables"),
            ("-6", OUTSIDE6, node.address6, "ip6tables"),
        ):
            ip(
                node,
                f"{option} route add default via {gateway} dev eth0 table {_TABLE}",
                f"{option} rule add from {address} lookup {_TABLE}",
                f"{option} rule add fwmark {_MARK} lookup {_TABLE}",
            )
            for rule in (
                f"-i eth0 -m conntrack --ctstate NEW -j CONNMARK --set-mark {_MARK}",
                "-m conntrack --ctdir REPLY -j CONNMARK --restore-mark",
            ):
                node.run([command, "-t", "mangle", "-A", "PREROUTING", *rule.split()])


class TableOfDevice(Network):
    """What comes from the uplink or goes to it has a table of its own, as with a VRF; this kernel has none."""

    lacks = _NO_ROUTE

    def prepare(self, node: LabNode) -> None:
        _no_default_route(node)
        for option, lan, gateway, family in (
            ("-4", "172.18.0.0/24", OUTSIDE, "IPv4"),
            ("-6", "fd00:172:18::/64", OUTSIDE6, "IPv6"),
        ):
            ip(
                node,
                f"{option} route add {lan} dev eth0 table {_TABLE}",
                f"{option} route add throw {CLUSTER_CIDRS[family]} table {_TABLE}",
                f"{option} route add default via {gateway} dev eth0 table {_TABLE}",
                f"{option} rule add iif eth0 lookup {_TABLE}",
                f"{option} rule add oif eth0 lookup {_TABLE}",
            )


class StrictReversePath(Network):
    """rp_filter is strict on all devices."""

    def finish(self, node: LabNode) -> None:
        sysctl(node, **{"ipv4__conf__*__rp_filter": 1})


class OneFamily(Network):
    """Neither nodes nor pods have IPv4."""

    families: ClassVar[tuple[str, ...]] = ("IPv6",)

    def finish(self, node: LabNode) -> None:
        for space in (node, *node.pods):
            ip(space, "-4 address flush scope global")
            sysctl(space, ipv4__ip_forward=0)


NETWORKS: list[Network] = [
    TwoNics("two NICs, pods by the second"),
    NoDefaultRoute("no default route"),
    TwoDefaultRoutes("two default routes"),
    AddressOnLoopback("the node's address on lo"),
    PolicyRouting("rules by mark and source"),
    TableOfDevice("a table for the uplink"),
    StrictReversePath("strict rp_filter"),
    OneFamily("IPv6 only"),
]
