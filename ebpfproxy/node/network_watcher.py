"""The kernel's tables of devices, addresses and routes in this network namespace, read and followed."""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
from ebpfproxy.node.facts import Address, DefaultRoute, Facts, Link
from ebpfproxy.node.roles import asks_for_routes

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
#: The pause between two readings: a routing daemon may change thousands of routes a second.
_REST_SECONDS = 0.05
_FAMILIES: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)

_SCOPE_GLOBAL = 0  # RT_SCOPE_UNIVERSE
_UNFIT = 0x01 | 0x08 | 0x20 | 0x40  # IFA_F_SECONDARY or TEMPORARY, DADFAILED, DEPRECATED, TENTATIVE
_MAIN_TABLE = 254
_MACVLANS = frozenset(("macvlan", "macvtap"))

# linux/netlink.h, linux/rtnetlink.h: in the host's byte order; messages begin at multiples of 4.
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_NLM_F_REQUEST, _NLM_F_DUMP = 0x001, 0x300
_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_SO_ATTACH_FILTER = 26
_NLATTR = 0xFFFFF00C  # SKF_AD_OFF + SKF_AD_NLATTR, linux/filter.h
_HEADER = struct.Struct("=IH")  # nlmsghdr: length in bytes, type
_CODE = struct.Struct("=i")  # after the header, in an error or at the end: a negative errno
_DUMP_ROUTES = struct.Struct("=IHHIIBBBBBBBBI")  # nlmsghdr and rtmsg
_DEVICE = struct.Struct("=HHI")  # an rtattr
_RTA_OIF = 4
_HEADER_SIZE, _FAMILY_AT, _PREFIX_AT, _TABLE_AT = 16, 16, 17, 20
#: No such table; no such family; no such device any more.
_NO_ROUTES = frozenset((errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENODEV))


def read_facts(netlink: Any) -> Facts:
    """The current state, from dumps of links, addresses and routes."""
    found = Facts(tuple(_links(netlink)), tuple(_addresses(netlink)), tuple(_default_routes()))
    own = {each.address for each in found.addresses}
    gateways = frozenset(index for index in asks_for_routes(found) if _has_gateway(index, own))
    return Facts(found.links, found.addresses, found.defaults, gateways)


def _links(netlink: Any) -> list[Link]:
    found = []
    for message in netlink.get_links():
        info = message.get_attr("IFLA_LINKINFO")
        kind = info.get_attr("IFLA_INFO_KIND") if info is not None else None
        data = info.get_attr("IFLA_INFO_DATA") if info is not None and kind in _MACVLANS else None
        master = message.get_attr("IFLA_MASTER") or 0
        # IFLA_LINK of a veth names the peer, which is in another namespace.
        is_here = message.get_attr("IFLA_LINK_NETNSID") is None
        found.append(
            Link(
                message["index"],
                message.get_attr("IFLA_IFNAME"),
                kind,
                message["ifi_type"],
                master,
                message.get_attr("IFLA_MTU") or 0,
                (message.get_attr("IFLA_LINK") or 0) if is_here else 0,
                data is not None and data.get_attr("IFLA_MACVLAN_MODE") == "passthru",
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
        found.append(Address(message["index"], socket.inet_pton(family, text), message["prefixlen"], fit))
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


def _has_gateway(ifindex: int, own: set[bytes]) -> bool:
    """Whether a device has a route through a gateway that is none of our ``own`` addresses.

    A CNI's device may have routes through its own address (cilium_host), which the CNI's programs handle.
    """
    for family in _FAMILIES:
        for route in _dump_routes(family, ifindex):
            hops = [(ifindex, route)]
            hops += [(hop["oif"], hop) for hop in route.get_attr("RTA_MULTIPATH") or ()]
            for index, hop in hops:
                if index == ifindex and (gateway := _gateway_of(hop)) is not None and gateway not in own:
                    return True
    return False


def _gateway_of(hop: Any) -> bytes | None:
    text = hop.get_attr("RTA_GATEWAY")
    if text is None and (via := hop.get_attr("RTA_VIA")) is not None:
        text = via["addr"]
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) if text else None


def _dump_default_routes(family: int) -> Iterator[Any]:
    """The default routes of the main table.

    pyroute2's get_default_routes (0.9.7) reads every table and stops at the first datagram without a default
    route, so that it misses IPv6's, which are the last, on a node with some hundred routes.
    """
    return _dump_routes(family)


def _dump_routes(family: int, ifindex: int = 0) -> Iterator[Any]:
    """Decoded routes of the main table: those of a device, or the default routes of all.

    The kernel filters by device. It cannot filter by prefix, so that other routes are skipped by their
    header.
    """
    by_device = _DEVICE.pack(_DEVICE.size, _RTA_OIF, ifindex) if ifindex else b""
    request = _DUMP_ROUTES.pack(
        *(_DUMP_ROUTES.size + len(by_device), _RTM_GETROUTE, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0),
        *(family, 0, 0, 0, _MAIN_TABLE, 0, 0, 0, 0),
    )
    # A dump that is not read to its end makes the next one on the same socket fail with EBUSY.
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as routes:
        # The kernel then applies all filters of the request, such as the table.
        routes.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
        routes.send(request + by_device)
        while True:
            data = routes.recv(65536)
            at = 0
            while at < len(data):
                length, kind = _HEADER.unpack_from(data, at)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    (code,) = _CODE.unpack_from(data, at + _HEADER_SIZE)
                    if code and -code not in _NO_ROUTES:
                        raise OSError(-code, "cannot read routes")
                    return
                # A kernel without IPv6 returns the routes of IPv4.
                if (
                    (ifindex or data[at + _PREFIX_AT] == 0)
                    and data[at + _FAMILY_AT] == family
                    and data[at + _TABLE_AT] == _MAIN_TABLE
                ):
                    message = rtmsg(data, offset=at)
                    message.decode()
                    yield message
                at += (length + 3) & ~3


class NetworkWatcher:
    """Calls ``sink`` with the whole state at the start and at every change, from its own thread."""

    def __init__(self, sink: Callable[[Facts], None]) -> None:
        self._sink = sink
        self._known: Facts | None = None

    def start(self) -> None:
        """The first state is delivered before this returns."""
        with IPRoute() as netlink:
            self._deliver(netlink)
        threading.Thread(target=self._run, name="network", daemon=True).start()

    def _deliver(self, netlink: Any) -> frozenset[int]:
        """Returns the devices whose routes were read."""
        facts = read_facts(netlink)
        if facts != self._known:
            self._sink(facts)
            self._known = facts
        return asks_for_routes(facts)

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except Exception as error:
                log.warning("lost netlink, reading all devices and addresses again", error=repr(error))
                time.sleep(_RETRY_SECONDS)

    def _follow(self) -> None:
        """An event only signals a change: its content is discarded, and everything is read again."""
        groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as events, IPRoute() as netlink:
            filtered: frozenset[int] = frozenset()
            _filter_route_events(events)
            events.bind((0, groups))
            while True:
                asked = self._deliver(netlink)
                if asked != filtered:
                    # The next reading has every change that the filter dropped before.
                    _filter_route_events(events, asked)
                    filtered = asked
                    continue
                select.select([events], [], [])
                time.sleep(_REST_SECONDS)
                _discard(events)


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_route_events(events: socket.socket, devices: Iterable[int] = ()) -> None:
    """Drops events of routes in the kernel, except of default routes and those of ``devices``.

    A classic BPF filter does it. A node that speaks BGP has thousands of these events a second, and none
    changes the state that is read here.
    """
    # Jumps reach no further; the routes of more devices would be read with other events.
    named = sorted(devices)[:200]
    count = len(named)
    program = [
        (0x28, 0, 0, 4),  # ldh: the type, which the instruction takes for big-endian
        (0x15, 1, 0, socket.htons(_RTM_NEWROUTE)),  # jeq
        (0x15, 0, count + 9, socket.htons(_RTM_DELROUTE)),
        (0x30, 0, 0, _PREFIX_AT),  # ldb
        (0x15, count + 7, 0, 0),
        (0x01, 0, 0, _RTA_OIF),  # ldx
        (0x00, 0, 0, _DUMP_ROUTES.size),  # ld: where the attributes begin
        (0x20, 0, 0, _NLATTR),  # ld: where that of X is
        (0x15, count + 2, 0, 0),  # none: a route by several ways
        (0x07, 0, 0, 0),  # tax
        (0x40, 0, 0, 4),  # ld: its value
        *((0x15, count - n, 0, socket.htonl(index)) for n, index in enumerate(named)),
        (0x06, 0, 0, 0),  # ret: nothing
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: all of it
    ]
    instructions = b"".join(struct.pack("=HBBI", *each) for each in program)
    filled = _Program(len(program), instructions)
    events.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(filled))


def _discard(events: socket.socket) -> None:
    while True:
        try:
            events.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            # The socket's buffer overflowed, but everything is read again anyway.
            if error.errno != errno.ENOBUFS:
                raise
