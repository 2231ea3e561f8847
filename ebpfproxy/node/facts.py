"""What netlink says of this network namespace, and what the Node object says of this node: no conclusions."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ebpfproxy.kube.objects import Node
from ebpfproxy.services.model import Prefix
from ebpfproxy.services.values import parse_address, parse_prefix

#: In the order in which kube-proxy looks for a node's primary address (GetNodeHostIPs).
_ADDRESS_TYPES = ("InternalIP", "ExternalIP")


class Link(NamedTuple):
    """A device as netlink has it. ``kind`` is None for hardware; MTU in bytes.

    ``master`` and ``lower``, the device of this namespace that it sends through, are 0 without one.
    ``passthru``: a macvlan or macvtap that has the link address of ``lower``.
    """

    ifindex: int
    name: str
    kind: str | None
    type: int
    master: int
    mtu: int = 1500
    lower: int = 0
    passthru: bool = False


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
    """One of its ways. ``source`` is the preferred one, empty where none is set."""

    ifindex: int
    family: int
    metric: int
    source: bytes


class Facts(msgspec.Struct, frozen=True):
    """One reading of the kernel's tables.

    ``gateways``: devices with a route by a gateway that is another's; only those that
    :func:`ebpfproxy.node.roles.asks_for_routes` names were looked at.
    """

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    defaults: tuple[DefaultRoute, ...] = ()
    gateways: frozenset[int] = frozenset()


class NodeAddress(NamedTuple):
    """``type``: InternalIP or ExternalIP."""

    type: str
    address: bytes


class NodeFacts(msgspec.Struct, frozen=True):
    """Addresses are in the order in which they are the node's primary ones."""

    addresses: tuple[NodeAddress, ...] = ()
    pod_cidrs: tuple[Prefix, ...] = ()


def node_facts(node: Node | None) -> NodeFacts:
    """What is no IP address or no CIDR is passed over: host names stand beside addresses."""
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
