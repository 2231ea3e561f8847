"""The network of this node: devices with their roles, and addresses. ``network_of`` is pure.

It combines the state of netlink (``network_watcher``) with the Node object; the reconciler calls it at every
change.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

import msgspec

from ebpfproxy.node.facts import Address, Facts, Link, NodeFacts, is_loopback
from ebpfproxy.node.roles import ETHERNET, Role, Roles, devices_below

_FAMILIES: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
_SIZES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}
#: kube-proxy and kube-router assign Services' addresses to these devices for IPVS.
_IPVS = frozenset(("kube-ipvs0", "kube-dummy-if"))


class Device(NamedTuple):
    """``address4`` and ``address6`` stand for clients that are masqueraded to it, empty where none can.

    As netfilter's MASQUERADE chooses: a global address of the device, the Node's if that is one of them, else
    the node's. ``bridge``: the name of the one that it is a port of, empty for none. ``why`` it has its role.
    ``ingress_below``: what comes in by it has come in by another of the devices before; ``egress_below``:
    what leaves by it leaves by another one after that; ``egress_above``: some of what leaves by it has left
    by another one before.
    ``kind`` is netlink's. ``xdp_obstacle``: why it cannot have an XDP program, empty where nothing is known
    to be in the way.
    """

    ifindex: int
    name: str
    role: Role
    ethernet: bool
    address4: bytes
    address6: bytes
    mtu: int
    bridge: str = ""
    why: str = ""
    ingress_below: bool = False
    egress_below: bool = False
    egress_above: bool = False
    kind: str | None = None
    link_address: bytes = b""
    xdp_obstacle: str = ""


class Network(msgspec.Struct, frozen=True):
    """Addresses are packed. ``devices`` are those to attach to, by index."""

    devices: tuple[Device, ...]
    #: Every address but 127/8 and ::1.
    addresses: frozenset[bytes]
    #: Those of them at which processes of this node may answer: not kube-proxy's for IPVS.
    answered: frozenset[bytes]
    #: The node's own of each family that it has.
    primary: tuple[bytes, ...]


def network_of(facts: Facts, node: NodeFacts, patterns: tuple[str, ...] = ()) -> Network:
    """The devices to attach to, their roles with reasons, and the node's addresses.

    ``patterns`` name uplinks; without patterns :class:`ebpfproxy.node.roles.Roles` decides.
    """
    used = list(Roles(facts, node, patterns).used())
    names = {link.ifindex: link.name for link in facts.links}
    kinds = {link.ifindex: link.kind for link in facts.links}
    uplinks = {link.ifindex for link, role, _ in used if role is Role.UPLINK}
    below = devices_below(facts.links, {link.ifindex for link, _, _ in used})
    above = {link.lower for link in facts.links if link.ifindex in below}
    above |= {
        link.ifindex
        for link in facts.links
        if link.master in below or kinds.get(link.master) == "openvswitch"
    }
    with_vlans = {link.lower for link in facts.links if link.kind == "vlan"}
    own = [a for a in facts.addresses if not is_loopback(a.address)]
    present = frozenset(a.address for a in own)
    primary = {family: _primary(family, facts, node, present, uplinks) for family in _FAMILIES}
    first: dict[tuple[int, int], bytes] = {}
    for each in facts.addresses:
        if each.fit:
            first.setdefault((each.ifindex, len(each.address)), each.address)
    # The kernel lists the latest IPv6 address first, and a lease may end: the Node's own stays.
    for each in facts.addresses:
        if each.fit and each.address in primary.values():
            first[each.ifindex, len(each.address)] = each.address

    def device_of(link: Link, role: Role, why: str) -> Device:
        return Device(
            link.ifindex,
            link.name,
            role,
            link.type == ETHERNET,
            first.get((link.ifindex, 4), primary[socket.AF_INET]),
            first.get((link.ifindex, 16), primary[socket.AF_INET6]),
            link.mtu,
            names[link.master] if kinds.get(link.master) == "bridge" else "",
            why,
            *below.get(link.ifindex, (False, False)),
            link.ifindex in above,
            link.kind,
            link.link_address,
            _xdp_obstacle(link, role, with_vlans),
        )

    return Network(
        tuple(device_of(*each) for each in used),
        present,
        frozenset(a.address for a in own if names.get(a.ifindex) not in _IPVS)
        | (present & {each.address for each in node.addresses}),
        tuple(filter(None, primary.values())),
    )


def _xdp_obstacle(link: Link, role: Role, with_vlans: set[int]) -> str:
    """A driver may take a VLAN's tag away before its XDP program sees the frame."""
    if role is not Role.UPLINK:
        return "not an uplink"
    if link.type != ETHERNET:
        return "no Ethernet device"
    return "it carries VLANs" if link.ifindex in with_vlans else ""


def _primary(
    family: int, facts: Facts, node: NodeFacts, present: frozenset[bytes], uplinks: set[int]
) -> bytes:
    """The first address of the Node that a device has, as in kube-proxy; else the default route's.

    An address of the Node that no device has belongs to a router that translates it.
    """
    size = _SIZES[family]
    for each in node.addresses:
        if len(each.address) == size and each.address in present:
            return each.address
    fit: list[Address] = [
        a for a in facts.addresses if a.fit and len(a.address) == size and not is_loopback(a.address)
    ]
    for way in sorted(facts.defaults, key=lambda route: route.metric):
        if way.family == family:
            if way.source:
                return way.source
            found = next((a.address for a in fit if a.ifindex == way.ifindex), b"")
            if found:
                return found
    return next((a.address for a in fit if a.ifindex in uplinks), b"") or next((a.address for a in fit), b"")
