"""Which address is which network namespace's: a client's two names, in packets and at the socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.namespaces import cookie_of, namespaces, netlink_in

_NETLINK_ROUTE = 0
_RTM_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
#: rtm_scope: a link-local address is one of many alike, loopback's everybody's.
_SCOPE_UNIVERSE = 0
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg


def namespace_cookies() -> dict[bytes, int]:
    """The cookie of the namespace that has an address, for all that this process can see.

    An address that several have is the host's, or nobody's.
    """
    found: dict[bytes, int] = {}
    several: set[bytes] = set()
    host: set[bytes] = set()
    for i, path in enumerate(namespaces()):
        # It may have gone meanwhile.
        with suppress(OSError), netlink_in(path, _NETLINK_ROUTE) as netlink:
            netlink.settimeout(2.0)
            cookie = cookie_of(netlink)
            addresses = set(_addresses(netlink))
            if not i:
                host = addresses
            several |= (addresses & found.keys()) - host
            found.update(dict.fromkeys(addresses - found.keys(), cookie))
    return {address: cookie for address, cookie in found.items() if address not in several}


def _addresses(netlink: socket.socket) -> Iterator[bytes]:
    body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    netlink.send(codec.pack(_RTM_GETADDR, codec.REQUEST | codec.DUMP, body))
    for each in codec.answers(netlink):
        _, _, _, scope, _ = _ADDRESS.unpack_from(each.payload)
        if scope == _SCOPE_UNIVERSE:
            found = codec.attributes(each.payload[_ADDRESS.size :])
            address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
            if address:
                yield bytes(address)
