"""The kernel's tables of devices, addresses and routes in this network namespace, as they are now."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.rtnetlink import (
    GETADDR,
    GETROUTE,
    GETRULE,
    IFADDRMSG,
    IFINFOMSG,
    RTMSG,
    RULEMSG,
    Rtnetlink,
    links,
)
from ebpfproxy.node.facts import Address, DefaultRoute, Facts, Link
from ebpfproxy.node.roles import asks_for_routes

_FAMILIES: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)
# Attributes: linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h.
_LINK_ADDRESS, _IFNAME, _MTU, _LINK, _MASTER, _LINKINFO, _LINK_NETNSID = 1, 3, 4, 5, 10, 18, 37
_INFO_KIND, _INFO_DATA, _MACVLAN_MODE = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_OIF, _GATEWAY, _PRIORITY, _PREFSRC, _MULTIPATH, _VIA = 4, 5, 6, 7, 9, 18
_NUMBER = struct.Struct("=I")
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: its length with attributes, flags, hops, ifindex
_VIA_FAMILY_SIZE = 2

_SCOPE_GLOBAL = 0  # RT_SCOPE_UNIVERSE
_UNFIT = 0x01 | 0x08 | 0x20 | 0x40  # IFA_F_SECONDARY or TEMPORARY, DADFAILED, DEPRECATED, TENTATIVE
_MAIN_TABLE = 254
_TO_TABLE = 1  # FR_ACT_TO_TBL
_MACVLANS = frozenset(("macvlan", "macvtap"))
_PASSTHRU = 8
#: No such table; no such family; no such device any more.
_NO_ROUTES = frozenset((errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENODEV))

_Attributes = dict[int, memoryview]


def read_facts(netlink: Rtnetlink) -> Facts:
    """The current state, from dumps of links, addresses, routes and rules. Raises OSError."""
    devices, addresses = tuple(_links(netlink)), tuple(_addresses(netlink))
    found = Facts(devices, addresses, tuple(_default_routes()))
    own = {each.address for each in found.addresses}
    gateways = frozenset(index for index in asks_for_routes(found) if _has_gateway(index, own))
    return Facts(found.links, found.addresses, found.defaults, gateways, _routes_by_source(netlink))


def _links(netlink: Rtnetlink) -> Iterator[Link]:
    return map(_link, links(netlink))


@codec.reading
def _link(message: memoryview) -> Link:
    _, type_, index, _, _ = IFINFOMSG.unpack_from(message)
    found = codec.attributes(message[IFINFOMSG.size :])
    info = codec.attributes(found.get(_LINKINFO, memoryview(b"")))
    kind = _text(info[_INFO_KIND]) if _INFO_KIND in info else None
    data = codec.attributes(info[_INFO_DATA]) if kind in _MACVLANS and _INFO_DATA in info else {}
    return Link(
        index,
        _text(found[_IFNAME]),
        kind,
        type_,
        master=_number(found, _MASTER),
        mtu=_number(found, _MTU),
        # IFLA_LINK of a veth names the peer, which is in another namespace.
        lower=_number(found, _LINK) if _LINK_NETNSID not in found else 0,
        passthru=_number(data, _MACVLAN_MODE) == _PASSTHRU,
        link_address=bytes(found.get(_LINK_ADDRESS, b"")),
    )


def _addresses(netlink: Rtnetlink) -> Iterator[Address]:
    for message in netlink.dump(GETADDR, IFADDRMSG.pack(0, 0, 0, 0, 0)):
        if found := _address(message):
            yield found


@codec.reading
def _address(message: memoryview) -> Address | None:
    family, length, flags, scope, index = IFADDRMSG.unpack_from(message)
    found = codec.attributes(message[IFADDRMSG.size :])
    # IFA_LOCAL is this end of a point-to-point address; IPv6 has only IFA_ADDRESS.
    address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
    if family not in _FAMILIES or not address:
        return None
    fit = scope == _SCOPE_GLOBAL and not (_number(found, _IFA_FLAGS) or flags) & _UNFIT
    return Address(index, bytes(address), length, fit)


def _default_routes() -> Iterator[DefaultRoute]:
    for family in _FAMILIES:
        for route in dump_routes(family):
            yield from _ways_of(family, route)


@codec.reading
def _ways_of(family: int, route: _Attributes) -> list[DefaultRoute]:
    metric = _number(route, _PRIORITY)
    source = bytes(route.get(_PREFSRC, b""))
    indexes = (_number(route, _OIF), *(index for index, _ in _next_hops(route)))
    return [DefaultRoute(index, family, metric, source) for index in indexes if index]


def _has_gateway(ifindex: int, own: set[bytes]) -> bool:
    """Whether a device has a route through a gateway that is none of our ``own`` addresses.

    A CNI's device may have routes through its own address (cilium_host), which the CNI's programs handle.
    """
    for family in _FAMILIES:
        for route in dump_routes(family, ifindex):
            for index, hop in ((ifindex, route), *_next_hops(route)):
                if index == ifindex and (gateway := _gateway_of(hop)) and gateway not in own:
                    return True
    return False


def _routes_by_source(netlink: Rtnetlink) -> bool:
    """Whether a routing rule leads some sources to a table (``ip rule add from CIDR lookup TABLE``)."""
    try:
        rules = list(netlink.dump(GETRULE, RULEMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0)))
    except OSError as error:
        if error.errno not in _NO_ROUTES:
            raise
        # A kernel without CONFIG_IP_MULTIPLE_TABLES has no rules.
        return False
    return any(_is_by_source(rule) for rule in rules)


@codec.reading
def _is_by_source(rule: memoryview) -> bool:
    _, _, length, _, _, action, _ = RULEMSG.unpack_from(rule)
    return bool(length) and action == _TO_TABLE


def _next_hops(route: _Attributes) -> Iterator[tuple[int, _Attributes]]:
    """The ways of a route that has several: device and attributes of each."""
    hops = route.get(_MULTIPATH, memoryview(b""))
    while len(hops) >= _NEXT_HOP.size:
        length, _, _, index = _NEXT_HOP.unpack_from(hops)
        yield index, codec.attributes(hops[_NEXT_HOP.size : length])
        hops = hops[max(length, _NEXT_HOP.size) + 3 & ~3 :]


def _gateway_of(hop: _Attributes) -> bytes:
    if _VIA in hop:
        return bytes(hop[_VIA][_VIA_FAMILY_SIZE:])
    return bytes(hop.get(_GATEWAY, b""))


def dump_routes(family: int, ifindex: int = 0) -> Iterator[_Attributes]:
    """The attributes of routes of the main table: those of a device, or the default routes of all.

    The kernel filters by device. It cannot filter by prefix, so that other routes are skipped by their
    header. Raises OSError.
    """
    request = RTMSG.pack(family, 0, 0, 0, _MAIN_TABLE, 0, 0, 0, 0)
    if ifindex:
        request += codec.attribute(_OIF, _NUMBER.pack(ifindex))
    # A dump that is not read to its end makes the next one on the same socket fail with EBUSY.
    with Rtnetlink() as netlink:
        try:
            for message in netlink.dump(GETROUTE, request):
                family_, length, table = _head_of(message)
                # A kernel without IPv6 returns the routes of IPv4.
                if (ifindex or length == 0) and family_ == family and table == _MAIN_TABLE:
                    yield codec.attributes(message[RTMSG.size :])
        except OSError as error:
            if error.errno not in _NO_ROUTES:
                raise


@codec.reading
def _head_of(route: memoryview) -> tuple[int, int, int]:
    """Family, length of the prefix and table."""
    family, length, _, _, table, *_ = RTMSG.unpack_from(route)
    return family, length, table


def _number(found: _Attributes, kind: int) -> int:
    """0 without such an attribute."""
    return int(_NUMBER.unpack(found[kind])[0]) if kind in found else 0


def _text(value: memoryview) -> str:
    """Names have any bytes but spaces, slashes and colons. They are for people, and for their patterns."""
    return bytes(value).rstrip(b"\0").decode(errors="replace")
