"""The devices and addresses of this network namespace, followed as they come and go (netlink).

Which devices lead where decides what packets on them can be: ``network_of`` is that rule, a pure function.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import ipaddress
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.rtnl import (
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV4_ROUTE,
    RTMGRP_IPV6_IFADDR,
    RTMGRP_IPV6_ROUTE,
    RTMGRP_LINK,
)
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
#: Between two readings: a routing daemon may change thousands of routes a second.
_REST_SECONDS = 0.05
_FAMILIES: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
_SIZES: dict[int, int] = {socket.AF_INET: 4, socket.AF_INET6: 16}

_ETHERNET, _LOOPBACK = 1, 772  # ARPHRD_*
_TUNNELS = frozenset(
    (
        *("vxlan", "geneve", "gre", "gretap", "erspan", "ip6gre", "ip6gretap", "ip6erspan"),
        *("ipip", "ip6tnl", "sit", "vti", "vti6", "xfrm", "wireguard"),
    )
)
#: Nothing of a Service's clients comes through these.
_IGNORED = frozenset(["dummy", "ifb", "nlmon", "openvswitch", "vrf", "vcan", "can"])
#: Those on which kube-proxy and kube-router put Services' addresses for IPVS.
_IPVS = frozenset(("kube-ipvs0", "kube-dummy-if"))
_IGNORED_NAMES = _IPVS | {"ovs-system"}
#: Masters whose members' packets are seen on the master.
_BUNDLES = frozenset(["bond", "team"])
_POD_PORTS = frozenset(["veth", "tun"])
_PHYSICAL = frozenset((None, "bond", "team", "vlan"))

_SCOPE_GLOBAL = 0  # RT_SCOPE_UNIVERSE
_UNFIT = 0x01 | 0x08 | 0x20 | 0x40  # IFA_F_SECONDARY or TEMPORARY, DADFAILED, DEPRECATED, TENTATIVE
_MAIN_TABLE = 254

# linux/netlink.h, linux/rtnetlink.h: in the host's byte order; messages begin at multiples of 4.
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_SO_ATTACH_FILTER = 26
_HEADER = struct.Struct("=IH")  # nlmsghdr: length in bytes, type
_CODE = struct.Struct("=i")  # after the header, in an error or at the end: a negative errno
_DUMP_ROUTES = struct.Struct("=IHHIIBBBBBBBBI")  # nlmsghdr and rtmsg
_HEADER_SIZE, _FAMILY_AT, _PREFIX_AT, _TABLE_AT = 16, 16, 17, 20
#: No such table; no such family.
_NO_ROUTES = frozenset((errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP))


class Role(enum.IntEnum):
    """Where a device leads."""

    UPLINK = 0  # outside, and to other nodes
    TUNNEL = 1  # to other nodes' pods
    LOCAL = 2  # to pods and VMs of this node


class Link(NamedTuple):
    """A device as netlink has it. ``master`` is 0 without one; ``kind`` None for hardware; MTU in bytes."""

    ifindex: int
    name: str
    kind: str | None
    type: int
    master: int
    mtu: int = 1500


class Address(NamedTuple):
    """``fit``: scope global, and neither secondary, temporary, tentative nor deprecated."""

    ifindex: int
    address: bytes
    fit: bool


class DefaultRoute(NamedTuple):
    """One of its ways. ``source`` is the preferred one, empty where none is set."""

    ifindex: int
    family: int
    metric: int
    source: bytes


class Device(NamedTuple):
    """``address4`` and ``address6`` stand for clients that are masqueraded to it, empty where none can.

    As netfilter's MASQUERADE chooses: the device's own first global address, else the node's.
    """

    ifindex: int
    name: str
    role: Role
    ethernet: bool
    address4: bytes
    address6: bytes
    mtu: int


class Network(msgspec.Struct, frozen=True):
    """Addresses are packed. ``devices`` are those to attach to, by index."""

    devices: tuple[Device, ...]
    #: Every address but 127/8 and ::1.
    addresses: frozenset[bytes]
    #: Those of them at which processes of this node may answer: not kube-proxy's for IPVS.
    answered: frozenset[bytes]
    #: Of uplinks, without link-local ones.
    uplink_addresses: frozenset[bytes]
    #: The node's own of each family that it has.
    primary: tuple[bytes, ...]


def network_of(
    links: Iterable[Link],
    addresses: Iterable[Address],
    routes: Iterable[DefaultRoute],
    patterns: tuple[str, ...] = (),
) -> Network:
    """Which devices are attached to, and what they are.

    An uplink is a device that ``patterns`` name; without patterns one that a default route goes through, or
    hardware, a bond or a VLAN with a global address. Tunnels to other nodes are told by their kind. All else
    leads to pods and VMs. Left out: members of a bond (their packets are seen on it), ports of a bridge
    unless a pod or VM is behind them (the bridge switches those among themselves), and what carries no
    traffic.
    """
    by_index = {link.ifindex: link for link in links}
    own = list(addresses)
    ways = sorted(routes, key=lambda route: route.metric)
    has_address = {a.ifindex for a in own if a.fit}
    default = {route.ifindex for route in ways}
    ipvs = {link.ifindex for link in by_index.values() if link.name in _IPVS}

    def role_of(link: Link) -> Role:
        named = any(fnmatchcase(link.name, pattern) for pattern in patterns)
        routed = link.ifindex in default and not _is_tunnel(link)
        hardware = link.kind in _PHYSICAL and link.type == _ETHERNET and link.ifindex in has_address
        if named if patterns else routed or hardware:
            return Role.UPLINK
        return Role.TUNNEL if _is_tunnel(link) else Role.LOCAL

    used = [link for link in by_index.values() if _is_used(link, by_index.get(link.master))]
    roles = {link.ifindex: role_of(link) for link in used}
    uplinks = {index for index, role in roles.items() if role is Role.UPLINK}
    # What a bridge to the outside switches is the outside's.
    used = [link for link in used if link.master not in uplinks or by_index[link.master].kind != "bridge"]
    primary = {family: _primary(family, own, ways, uplinks) for family in _FAMILIES}

    def masquerade(index: int, family: int) -> bytes:
        found = (a.address for a in own if a.ifindex == index and a.fit and len(a.address) == _SIZES[family])
        return next(found, primary[family])

    devices = tuple(
        Device(
            link.ifindex,
            link.name,
            roles[link.ifindex],
            link.type == _ETHERNET,
            masquerade(link.ifindex, socket.AF_INET),
            masquerade(link.ifindex, socket.AF_INET6),
            link.mtu,
        )
        for link in sorted(used)
    )
    return Network(
        devices,
        frozenset(a.address for a in own if not _is_loopback(a.address)),
        frozenset(a.address for a in own if not _is_loopback(a.address) and a.ifindex not in ipvs),
        frozenset(
            a.address
            for a in own
            if a.ifindex in uplinks and not _is_loopback(a.address) and not _is_link_local6(a.address)
        ),
        tuple(filter(None, primary.values())),
    )


def _is_tunnel(link: Link) -> bool:
    return link.kind in _TUNNELS or link.type != _ETHERNET


def _is_used(link: Link, master: Link | None) -> bool:
    if link.type == _LOOPBACK or link.kind in _IGNORED or link.name in _IGNORED_NAMES:
        return False
    if master is None or master.kind == "vrf":
        return True
    return master.kind not in _BUNDLES and link.kind in _POD_PORTS


def _primary(family: int, own: list[Address], ways: list[DefaultRoute], uplinks: set[int]) -> bytes:
    size = _SIZES[family]
    fit = [a for a in own if a.fit and len(a.address) == size and not _is_loopback(a.address)]
    for way in ways:
        if way.family == family:
            if way.source:
                return way.source
            found = next((a.address for a in fit if a.ifindex == way.ifindex), b"")
            if found:
                return found
    return next((a.address for a in fit if a.ifindex in uplinks), b"") or next((a.address for a in fit), b"")


def _is_loopback(address: bytes) -> bool:
    return address == bytes(15) + b"\x01" or (len(address) == 4 and address[0] == 127)


def _is_link_local6(address: bytes) -> bool:
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


# -- node port addresses


class NodePortAddressesError(Exception):
    """A value of nodePortAddresses that cannot be used; the message names it."""


def parse_node_port_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """The values, checked: nothing, ``primary`` alone, or CIDRs. Raises NodePortAddressesError."""
    found = tuple(text.strip() for text in texts)
    if "primary" in found and len(found) > 1:
        raise NodePortAddressesError("'primary' goes without any other value")
    for text in found:
        try:
            if text != "primary":
                ipaddress.ip_network(text, strict=False)
        except ValueError as error:
            raise NodePortAddressesError(f"{text!r} is neither a CIDR nor 'primary': {error}") from None
        if text != "primary" and "/" not in text:
            raise NodePortAddressesError(f"{text!r} is not a CIDR: it has no prefix length")
    return found


def select_node_port_addresses(network: Network, selection: tuple[str, ...]) -> frozenset[bytes]:
    """The addresses that NodePorts answer at: the selected ones, all of the uplinks' without a selection."""
    if not selection:
        return network.uplink_addresses
    if selection == ("primary",):
        return frozenset(network.primary)
    ranges = [ipaddress.ip_network(text, strict=False) for text in selection]
    return frozenset(
        address
        for address in network.answered
        if any(ipaddress.ip_address(address) in each for each in ranges)
    )


# -- netlink


def read_network(netlink: Any, patterns: tuple[str, ...] = ()) -> Network:
    """The present state, from a dump of each: links, addresses, routes."""
    return network_of(_links(netlink), _addresses(netlink), _default_routes(), patterns)


def _links(netlink: Any) -> list[Link]:
    found = []
    for message in netlink.get_links():
        info = message.get_attr("IFLA_LINKINFO")
        kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
        master = message.get_attr("IFLA_MASTER") or 0
        found.append(
            Link(
                message["index"],
                message.get_attr("IFLA_IFNAME"),
                kind,
                message["ifi_type"],
                master,
                message.get_attr("IFLA_MTU") or 0,
            )
        )
    return found


def _addresses(netlink: Any) -> list[Address]:
    found = []
    for message in netlink.get_addr():
        family = message["family"]
        # IFA_LOCAL is this end of a point-to-point address; IPv6 has only IFA_ADDRESS.
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if family not in _FAMILIES or not text:
            continue
        flags = message.get_attr("IFA_FLAGS") or message["flags"]
        fit = message["scope"] == _SCOPE_GLOBAL and not flags & _UNFIT
        found.append(Address(message["index"], socket.inet_pton(family, text), fit))
    return found


def _default_routes() -> Iterator[DefaultRoute]:
    for family in _FAMILIES:
        for route in _dump_default_routes(family):
            metric = route.get_attr("RTA_PRIORITY") or 0
            text = route.get_attr("RTA_PREFSRC")
            source = socket.inet_pton(family, text) if text else b""
            ways = [route.get_attr("RTA_OIF")]
            ways += [hop["oif"] for hop in route.get_attr("RTA_MULTIPATH") or ()]
            for index in ways:
                if index:
                    yield DefaultRoute(index, family, metric, source)


def _dump_default_routes(family: int) -> Iterator[Any]:
    """Default routes of the main table, decoded; others are passed over by their header.

    Not pyroute2's get_default_routes (0.9.7): it asks for every table, and ends at the first datagram without
    a default route, which loses IPv6's (the kernel's last) on a node with some hundred routes.
    """
    request = _DUMP_ROUTES.pack(
        *(_DUMP_ROUTES.size, _RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0),
        *(family, 0, 0, 0, _MAIN_TABLE, 0, 0, 0, 0),
    )
    # A socket of its own: a dump that is left half read makes the next one on it fail with EBUSY.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as routes:
        # The kernel then leaves out other tables. It can't filter by prefix.
        routes.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        routes.send(request)
        while True:
            data = routes.recv(65536)
            at = 0
            while at < len(data):
                length, kind = _HEADER.unpack_from(data, at)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    (code,) = _CODE.unpack_from(data, at + _HEADER_SIZE)
                    if code and -code not in _NO_ROUTES:
                        raise OSError(-code, "routes cannot be read")
                    return
                # A kernel without IPv6 answers with IPv4's.
                if (
                    data[at + _PREFIX_AT] == 0
                    and data[at + _FAMILY_AT] == family
                    and data[at + _TABLE_AT] == _MAIN_TABLE
                ):
                    message = rtmsg(data, offset=at)
                    message.decode()
                    yield message
                at += (length + 3) & ~3


class NetworkWatcher:
    """Calls ``sink`` with the whole state at the start and at every change, from a thread of its own."""

    def __init__(self, sink: Callable[[Network], None], patterns: tuple[str, ...] = ()) -> None:
        self._sink = sink
        self._patterns = patterns
        self._known: Network | None = None

    def start(self) -> None:
        """The first state is delivered before this returns."""
        with IPRoute() as netlink:
            self._deliver(netlink)
        threading.Thread(target=self._run, name="network", daemon=True).start()

    def _deliver(self, netlink: Any) -> None:
        network = read_network(netlink, self._patterns)
        if network != self._known:
            self._sink(network)
            self._known = network

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except Exception as error:
                log.warning("lost netlink, reading all devices and addresses again", error=repr(error))
                time.sleep(_RETRY_SECONDS)

    def _follow(self) -> None:
        """Events only say that something changed: they are thrown away unread."""
        groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as events, IPRoute() as netlink:
            _hear_no_other_routes(events)
            events.bind((0, groups))
            self._deliver(netlink)
            while True:
                select.select([events], [], [])
                time.sleep(_REST_SECONDS)
                _discard(events)
                self._deliver(netlink)


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _hear_no_other_routes(events: socket.socket) -> None:
    """Drops events of routes that are no default routes in the kernel, unheard: classic BPF.

    A node that speaks BGP has thousands of those a second, and none changes what is read here.
    """
    instructions = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x28, 0, 0, 4),  # ldh: the type, which the instruction takes for big-endian
            (0x15, 1, 0, socket.htons(_RTM_NEWROUTE)),  # jeq
            (0x15, 0, 2, socket.htons(_RTM_DELROUTE)),
            (0x30, 0, 0, _PREFIX_AT),  # ldb
            (0x15, 0, 1, 0),
            (0x06, 0, 0, 0xFFFFFFFF),  # ret: all of it
            (0x06, 0, 0, 0),  # ret: nothing
        )
    )
    program = _Program(len(instructions) // 8, instructions)
    events.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(program))


def _discard(events: socket.socket) -> None:
    while True:
        try:
            events.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            # The kernel had more to say than the socket holds; all is read again anyway.
            if error.errno != errno.ENOBUFS:
                raise
