"""The state of this network namespace from netlink, and of this node from its Node object."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ebpfproxy.kube.objects import Node
from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import parse_address, parse_prefix

#: kube-proxy looks for a node's primary address in this order (GetNodeHostIPs).
_ADDRESS_TYPES = ("InternalIP", "ExternalIP")


class Link(NamedTuple):
    """A device in netlink. ``kind`` is None for hardware; the MTU is in bytes.

    ``master`` and ``lower``, the device of this namespace that it sends through, are 0 without one.
    ``passthru``: a macvlan or macvtap that has the link address of ``lower``. ``link_address`` is its own.
    """

    ifindex: int
    name: str
    kind: str | None
    type: int
    master: int
    mtu: int = 1500
    lower: int = 0
    passthru: bool = False
    link_address: bytes = b""


class Address(NamedTuple):
    """``length`` of its prefix in bits. ``fit``: scope global, neither secondary, temporary, tentative nor
    deprecated."""

    ifindex: int
    address: bytes
    length: int
    fit: bool

    @property
    def is_host(self) -> bool:
        """Whether its prefix has no other address: a /32 or /128."""
        return self.length == 8 * len(self.address)


class DefaultRoute(NamedTuple):
    """One next hop of it. ``source`` is the preferred source address, empty if none is set."""

    ifindex: int
    family: int
    metric: int
    source: bytes


class Facts(msgspec.Struct, frozen=True):
    """One reading of the kernel's tables.

    ``gateways``: devices with a route through a gateway that is not this node; only those that
    :func:`ebpfproxy.node.roles.asks_for_routes` returns are examined. ``routes_by_source``: a routing rule
    tells sources apart.
    """

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    defaults: tuple[DefaultRoute, ...] = ()
    gateways: frozenset[int] = frozenset()
    routes_by_source: bool = False


class NodeAddress(NamedTuple):
    """``type``: InternalIP or ExternalIP."""

    type: str
    address: bytes


class NodeFacts(msgspec.Struct, frozen=True):
    """The first address of each family is the node's primary one."""

    addresses: tuple[NodeAddress, ...] = ()
    pod_cidrs: tuple[Prefix, ...] = ()


def node_facts(node: Node | None) -> NodeFacts:
    """Skips anything that is not an IP address or CIDR: host names are listed among addresses."""
    if node is None:
        return NodeFacts()
    listed = (node.status.addresses if node.status is not None else None) or ()
    found = [
        NodeAddress(kind, packed)
        for kind in _ADDRESS_TYPES
        for each in listed
        if each.type == kind and (packed := parse_address(each.address)) is not None
    ]
    texts = (node.spec.pod_cidrs if node.spec is not None else None) or ()
    ranges = tuple(prefix for text in texts if (prefix := parse_prefix(text)) is not None)
    return NodeFacts(tuple(found), ranges)


def is_loopback(address: bytes) -> bool:
    return address == bytes(15) + b"\x01" or (len(address) == 4 and address[0] == 127)


def is_link_local6(address: bytes) -> bool:
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
