"""Which device leads to an address, and with which source, as the routes have it (RTM_GETROUTE).

Frontends with source ranges are all asked for whenever devices or addresses change.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import NamedTuple

from ebpfproxy.netlink import codec

_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_RTN_UNICAST = 1
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, length of the destination, …, type, flags
_LENGTH_AT, _TYPE_AT = 1, 7  # in rtmsg
_FIB_MATCH = 0x2000  # RTM_F_FIB_MATCH: the reply is the route itself
_INDEX = struct.Struct("=I")
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
#: A gateway, several ways, a gateway of the other family, a nexthop object.
_BY_GATEWAY = frozenset((5, 9, 18, 30))
_TIMEOUT_SECONDS = 1.0


class Way(NamedTuple):
    """How packets of this network namespace get to an address.

    ``ifindex`` is 0 for this namespace's own addresses, and where no route leads. ``source`` is packed, empty
    where the kernel names none. ``by_gateway``: the next hop is another than the address. ``length`` of the
    route's prefix in bits, where the route itself was asked for.
    """

    ifindex: int = 0
    source: bytes = b""
    by_gateway: bool = False
    length: int = 0


class Routes:
    """Looks up routes in the namespace of its socket, by default this process's. Close it."""

    def __init__(self, netlink: socket.socket | None = None) -> None:
        """``netlink``: a NETLINK_ROUTE socket, which is closed with this."""
        self._netlink = netlink or socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._netlink.settimeout(_TIMEOUT_SECONDS)
        self._sequence = 0

    def __enter__(self) -> Routes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._netlink.close()

    def to(self, address: bytes, flags: int = 0) -> Way:
        """``address``: packed. Raises OSError if netlink does not reply."""
        self._sequence += 1
        size = len(address)
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        body = _ROUTE.pack(family, 8 * size, 0, 0, 0, 0, 0, 0, flags)
        body += codec.attribute(_RTA_DST, address)
        self._netlink.send(codec.pack(_RTM_GETROUTE, codec.REQUEST, body, self._sequence))
        while True:
            for each in codec.receive(self._netlink):
                # A late reply to an earlier request is ignored.
                if each.sequence == self._sequence:
                    return _way(each.payload) if each.kind == _RTM_NEWROUTE else Way()

    def is_on_network(self, address: bytes) -> bool:
        """True if the address is a neighbour's on a network of several, which alone gets packets to it.

        Where its link address is not known any more, packets do not even leave.
        """
        way = self.to(address, _FIB_MATCH)
        return bool(way.ifindex) and not way.by_gateway and way.length < 8 * len(address)

    def device_to(self, address: bytes) -> int | None:
        """The ifindex of the device that leads there, None where :class:`Way` has none."""
        return self.to(address).ifindex or None

    def source_towards(self, address: bytes) -> bytes:
        """The source of this host's packets to a packed address, as the kernel chooses it; empty without one.

        A connect() would tell as well, but goes through our own hooks.
        """
        return self.to(address).source


@codec.reading
def _way(message: memoryview) -> Way:
    """Reads an rtmsg with its attributes."""
    found = codec.attributes(message[_ROUTE.size :])
    source = bytes(found.get(_RTA_PREFSRC, b""))
    if message[_TYPE_AT] != _RTN_UNICAST or _RTA_OIF not in found:
        return Way(source=source)
    (ifindex,) = _INDEX.unpack(found[_RTA_OIF])
    return Way(ifindex, source, not _BY_GATEWAY.isdisjoint(found), message[_LENGTH_AT])
