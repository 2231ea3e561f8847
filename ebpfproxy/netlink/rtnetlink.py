"""Requests to this network namespace's devices, addresses, routes and traffic control (rtnetlink(7))."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from ebpfproxy.netlink import codec

# linux/rtnetlink.h: types of messages.
GETLINK, SETLINK, GETADDR = 18, 19, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
GETRULE = 34
NEWQDISC, DELQDISC = 36, 37
NEWTFILTER, DELTFILTER, GETTFILTER = 44, 45, 46
#: Groups of events: RTMGRP_IPV4_ROUTE and RTMGRP_IPV6_ROUTE; with RTMGRP_LINK, _IPV4_IFADDR and _IPV6_IFADDR,
#: and with those of rules, RTMGRP_IPV4_RULE and RTNLGRP_IPV6_RULE.
ROUTE_GROUPS = 0x40 | 0x400
ALL_GROUPS = 0x1 | 0x10 | 0x100 | 0x80 | 1 << 18 | ROUTE_GROUPS
#: They begin the messages of the tables, before attributes.
IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = struct.Struct("=BBBBI")  # family, length of the prefix, flags, scope, index
#: Family, lengths of destination and source, TOS, table, protocol, scope, type, flags.
RTMSG = struct.Struct("=BBBBBBBBI")
#: Family, lengths of destination and source, TOS, table, action, flags.
RULEMSG = struct.Struct("=BBBBBxxBI")

_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3
_NUMBER = struct.Struct("=I")
_SOL_NETLINK, _GET_STRICT_CHK = 270, 12
_TIMEOUT_SECONDS = 10.0


class Rtnetlink:
    """A socket. Use it as a context."""

    def __init__(self, *, explains: bool = False) -> None:
        """``explains``: errors have the kernel's, or a driver's, own text where there is one."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        if explains:
            codec.explain_errors(self._socket)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        # The kernel then applies all filters of a dump's request, such as a route's table.
        self._socket.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def change(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Sends a change and waits for its acknowledgement. Raises OSError with the kernel's number."""
        self._socket.send(codec.pack(kind, codec.REQUEST | codec.ACK | flags, body))
        for _ in codec.replies(self._socket):
            pass

    def ask(self, kind: int, body: bytes) -> list[memoryview]:
        """What a request for one thing gets, without headers. Raises OSError."""
        self._socket.send(codec.pack(kind, codec.REQUEST | codec.ACK, body))
        return [each.payload for each in codec.replies(self._socket)]

    def dump(self, kind: int, body: bytes) -> Iterator[memoryview]:
        """The messages of a table, without their headers. Raises OSError.

        It has to be read to its end before the next request. A change meanwhile may be missing, but is an
        event.
        """
        self._socket.send(codec.pack(kind, codec.REQUEST | codec.DUMP, body))
        for each in codec.replies(self._socket):
            yield each.payload


def links(netlink: Rtnetlink) -> list[memoryview]:
    """A message of each device, without statistics: an IFINFOMSG and attributes. Raises OSError."""
    request = IFINFOMSG.pack(0, 0, 0, 0, 0) + codec.attribute(_IFLA_EXT_MASK, _NUMBER.pack(_SKIP_STATS))
    return list(netlink.dump(GETLINK, request))


def device_indexes(netlink: Rtnetlink) -> list[int]:
    """The indexes of all devices. Raises OSError."""
    return [_index_of(message) for message in links(netlink)]


@codec.reading
def _index_of(message: memoryview) -> int:
    return int(IFINFOMSG.unpack_from(message)[2])
