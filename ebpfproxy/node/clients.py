"""Which address is which network namespace's: a client's two names, in packets and at the socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from ebpfproxy.netlink.namespaces import cookie_of, namespaces, netlink_in

_NETLINK_ROUTE = 0
_RTM_GETADDR = 22
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
#: rtm_scope: a link-local address is one of many alike, loopback's everybody's.
_SCOPE_UNIVERSE = 0
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg
_ATTRIBUTE = struct.Struct("=HH")
_RECEIVE = 1 << 16


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
    request = _HEADER.pack(_HEADER.size + _ADDRESS.size, _RTM_GETADDR, _REQUEST_DUMP, 0, 0)
    netlink.send(request + _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    while True:
        data = netlink.recv(_RECEIVE)
        at = 0
        while at < len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                return
            message = data[at + _HEADER.size : at + length]
            _, _, _, scope, _ = _ADDRESS.unpack_from(message)
            if scope == _SCOPE_UNIVERSE:
                attributes = dict(_attributes(message[_ADDRESS.size :]))
                address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
                if address:
                    yield address
            at += length + 3 & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += max(length + 3 & ~3, _ATTRIBUTE.size)
