"""The role of each device, and the reason: pure rules over netlink's state and the Node object.

A device is a pod's only on evidence: a client that is taken for a pod is not masqueraded, and if it is none
its replies are lost. The addresses of other Nodes are not watched, as in kube-proxy: in a cluster of
thousands every node would receive the status updates of all. A route through a gateway is as good: it leads
to other machines.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Container, Iterable, Iterator
from fnmatch import fnmatchcase

from ebpfproxy.node.facts import Address, Facts, Link, NodeFacts
from ebpfproxy.services.model import Prefix

ETHERNET, LOOPBACK = 1, 772  # ARPHRD_*

_TUNNELS = frozenset(
    (
        *("vxlan", "geneve", "gre", "gretap", "erspan", "ip6gre", "ip6gretap", "ip6erspan"),
        *("ipip", "ip6tnl", "sit", "vti", "vti6", "xfrm", "wireguard"),
    )
)
#: No client of a Service uses these devices.
_IGNORED = frozenset(["dummy", "ifb", "nlmon", "openvswitch", "vrf", "vcan", "can"])
_IGNORED_NAMES = frozenset(("kube-ipvs0", "kube-dummy-if", "ovs-system"))
#: Packets of these masters' members are seen on the master.
_BUNDLES = frozenset(["bond", "team"])
#: These kinds have an end in a pod, or in a process that runs a VM ("tun" with a link layer is a tap).
_POD_PORTS = frozenset(["veth", "netkit", "tun"])
#: These kinds are on a network with other machines.
_NETWORK_PORTS = frozenset((None, "bond", "team", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"))
#: These kinds are stacked on another device and have their own address on its network.
_STACKED = frozenset(("vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"))
_MACVLANS = frozenset(("macvlan", "macvtap"))


class Role(enum.IntEnum):
    """Where a device leads."""

    UPLINK = 0  # outside, and to other nodes
    TUNNEL = 1  # to other nodes' pods
    LOCAL = 2  # to pods and VMs of this node
    OUTSIDE = 3  # unknown: its clients are treated as those of an uplink

    def __str__(self) -> str:
        return ("uplink", "tunnel", "pods", "outside")[self]


def asks_for_routes(facts: Facts) -> frozenset[int]:
    """The devices whose role depends on a route through a gateway.

    They are few: bridges, taps and veths with an address of a network, and no default route.
    """
    routed = {route.ifindex for route in facts.defaults}
    wide = {a.ifindex for a in facts.addresses if a.fit and not a.is_host}
    return frozenset(
        link.ifindex
        for link in facts.links
        if link.ifindex in wide - routed and link.kind in _POD_PORTS | {"bridge"} and link.type == ETHERNET
    )


def devices_below(links: Iterable[Link], used: Container[int]) -> dict[int, tuple[bool, bool]]:
    """Of ``used`` (indexes), those whose packets pass another of ``used`` with the same headers: at ingress,
    before this one, and at egress, after it.

    A VLAN's packets are skipped there while they have a tag, and a tunnel's have other headers. What comes in
    for a macvlan has its link address, and is skipped at the device below; in mode passthru both share one.
    """
    by_index = {link.ifindex: link for link in links}
    attached = [link for link in by_index.values() if link.ifindex in used]
    masters = {link.master for link in attached}
    has_switch = any(by_index[index].kind == "openvswitch" for index in masters if index in by_index)
    found = {}
    for link in attached:
        is_stacked = link.lower in used and link.kind != "vlan" and not _is_tunnel(link)
        if is_stacked or link.ifindex in masters or (link.kind == "openvswitch" and has_switch):
            found[link.ifindex] = link.kind not in _MACVLANS or link.passthru, True
    return found


class Roles:
    """The roles of one state of the node."""

    def __init__(self, facts: Facts, node: NodeFacts, patterns: tuple[str, ...]) -> None:
        self._links = {link.ifindex: link for link in facts.links}
        self._patterns = patterns
        self._pod_cidrs = node.pod_cidrs
        self._routed = {route.ifindex for route in facts.defaults}
        self._gateways = facts.gateways
        self._uppers = {link.lower: link for link in facts.links if link.kind in _STACKED}
        self._ports: dict[int, list[Link]] = {}
        for link in facts.links:
            if link.master:
                self._ports.setdefault(link.master, []).append(link)
        self._fit: dict[int, list[Address]] = {}
        for each in facts.addresses:
            if each.fit:
                self._fit.setdefault(each.ifindex, []).append(each)
        types = {address: kind for kind, address in reversed(node.addresses)}
        self._of_node: dict[int, tuple[str, Address]] = {}
        taken: set[bytes] = set()
        for each in sorted(facts.addresses, key=self._is_borrowed):
            if each.address in types and not (each.address in taken and self._is_borrowed(each)):
                taken.add(each.address)
                self._of_node.setdefault(each.ifindex, (types[each.address], each))

    def _is_borrowed(self, address: Address) -> bool:
        """Whether it may be another device's: CNIs give one address of the node to all pods' devices."""
        link = self._links.get(address.ifindex)
        return link is not None and link.kind in _POD_PORTS and address.is_host

    # -- which devices

    def used(self) -> Iterator[tuple[Link, Role, str]]:
        """Devices to attach to, by index, each with its role and why it has it.

        Left out: members of a bond (their packets are seen on it), ports of a bridge unless a pod or VM is
        behind them (the bridge switches those among themselves), all ports of a bridge that leads out
        (what it switches is the outside's), and what carries no traffic.
        """
        found = {
            link.ifindex: (link, *self._role(link)) for link in self._links.values() if self._is_used(link)
        }
        for index in sorted(found):
            link, role, why = found[index]
            master = self._links.get(link.master)
            if master is not None and master.kind == "bridge":
                above = found.get(master.ifindex)
                if above is not None and (above[1] is Role.UPLINK or self._leads_out(master)):
                    continue
            yield link, role, why

    def _is_used(self, link: Link) -> bool:
        if link.type == LOOPBACK or link.name in _IGNORED_NAMES:
            return False
        if link.kind in _IGNORED:
            # This is the Open vSwitch port by which the host itself is on the network.
            is_way_out = link.ifindex in self._of_node or link.ifindex in self._routed
            return link.kind == "openvswitch" and is_way_out
        master = self._links.get(link.master)
        if master is None or master.kind == "vrf":
            return True
        return master.kind not in _BUNDLES and link.kind in _POD_PORTS

    # -- roles

    def _role(self, link: Link) -> tuple[Role, str]:
        for pattern in self._patterns:
            if fnmatchcase(link.name, pattern):
                return Role.UPLINK, f"named by devices: {pattern}"
        if why := self._leads_out(link):
            return (Role.OUTSIDE, f"{why}, but not among devices") if self._patterns else (Role.UPLINK, why)
        if _is_tunnel(link):
            return Role.TUNNEL, link.kind or "no link layer"
        if link.kind == "bridge":
            return self._role_of_bridge(link)
        if link.kind in _POD_PORTS:
            return self._role_of_pod_port(link)
        if link.kind in _NETWORK_PORTS:
            return Role.OUTSIDE, f"{_kind(link)} without an address"
        return Role.OUTSIDE, f"{_kind(link)}, which tells nothing"

    def _leads_out(self, link: Link) -> str:
        """The evidence that the device leads out of the node; empty without any."""
        if own := self._of_node.get(link.ifindex):
            return f"has the Node's {own[0]} {_text(own[1].address)}"
        if _is_tunnel(link):
            return ""
        if link.ifindex in self._routed:
            return "has a default route"
        if self._in_pod_cidrs(link):
            return ""
        if link.ifindex in self._gateways:
            return "has routes by a gateway"
        addresses = self._fit.get(link.ifindex)
        if not addresses:
            return ""
        if link.kind in _NETWORK_PORTS:
            return f"{_kind(link)} with the address {_text(addresses[0].address)}"
        if link.kind == "bridge":
            out, pods = self._ports_of(link)
            return f"a bridge to {out[0].name}, with an address" if out and not pods else ""
        return ""

    def _ports_of(self, bridge: Link) -> tuple[list[Link], list[Link]]:
        """The ports to networks, and the ports to pods."""
        ports = self._ports.get(bridge.ifindex, ())
        return [p for p in ports if p.kind in _NETWORK_PORTS], [p for p in ports if p.kind in _POD_PORTS]

    def _role_of_bridge(self, bridge: Link) -> tuple[Role, str]:
        if found := self._in_pod_cidrs(bridge):
            return Role.LOCAL, f"a bridge with {_text(found.address)}, of the Node's podCIDRs"
        out, pods = self._ports_of(bridge)
        if out:
            return Role.OUTSIDE, f"a bridge to {out[0].name}"
        if not pods and (others := self._ports.get(bridge.ifindex)):
            return Role.OUTSIDE, f"a bridge to {others[0].name} alone"
        return Role.LOCAL, "a bridge of pods" if pods else "a bridge without ports"

    def _role_of_pod_port(self, link: Link) -> tuple[Role, str]:
        master = self._links.get(link.master)
        if master is not None and master.kind != "vrf":
            return Role.LOCAL, f"a port of {master.name}"
        if upper := self._uppers.get(link.ifindex):
            return Role.OUTSIDE, f"a {link.kind} that carries {upper.name}"
        if link.kind == "tun":
            return Role.LOCAL, "a tap"
        wide = next((a for a in self._fit.get(link.ifindex, ()) if not a.is_host), None)
        if wide is not None and not self._in_pod_cidrs(link):
            return Role.OUTSIDE, f"a {link.kind} on a network, {_text(wide.address)}/{wide.length}"
        return Role.LOCAL, f"a {link.kind} to a pod"

    def _in_pod_cidrs(self, link: Link) -> Address | None:
        """The device's address in the Node's podCIDRs, which CNIs assign to the pods' gateway."""
        if link.kind in _NETWORK_PORTS:
            return None
        found = self._fit.get(link.ifindex, ())
        return next((a for a in found for cidr in self._pod_cidrs if _contains(cidr, a.address)), None)


def _is_tunnel(link: Link) -> bool:
    return link.kind in _TUNNELS or link.type != ETHERNET


def _kind(link: Link) -> str:
    if link.kind is None:
        return "hardware"
    return f"{'an' if link.kind[0] in 'aeiou' else 'a'} {link.kind}"


def _contains(prefix: Prefix, address: bytes) -> bool:
    if len(prefix.address) != len(address):
        return False
    shift = 8 * len(address) - prefix.length
    return int.from_bytes(address, "big") >> shift == int.from_bytes(prefix.address, "big") >> shift


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
