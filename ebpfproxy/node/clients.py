"""Maps addresses to network namespaces: a client is an address in packets, a namespace at the socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.namespace_ids import id_in
from ebpfproxy.netlink.namespaces import OWN, cookie_of, namespaces, netlink_in

_NETLINK_ROUTE = 0
_RTM_GETADDR = 22
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
#: Only addresses of this scope (rtm_scope) are unique: link-local ones and the loopback's are not.
_SCOPE_UNIVERSE = 0
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg


def namespace_cookies() -> dict[bytes, int]:
    """The cookie of the namespace that has an address, for all namespaces that this process can see.

    If several have one address, the host comes first, then the only one that a device links with the host, as
    a pod is. Containers of another engine, or of a node within this one, may use the same addresses.
    """
    linked: dict[bytes, set[int]] = {}
    others: dict[bytes, set[int]] = {}
    host: dict[bytes, int] = {}
    with OWN.open("rb") as own:
        for path in namespaces():
            # The namespace may have been deleted meanwhile.
            with suppress(OSError), netlink_in(path, _NETLINK_ROUTE) as netlink:
                netlink.settimeout(2.0)
                cookie, addresses = cookie_of(netlink), list(_addresses(netlink))
                if path == OWN:
                    host = dict.fromkeys(addresses, cookie)
                    continue
                found = others if id_in(netlink, own.fileno()) is None else linked
                for address in addresses:
                    found.setdefault(address, set()).add(cookie)
    only = {address: cookies.pop() for address, cookies in (others | linked).items() if len(cookies) == 1}
    return only | host


def _addresses(netlink: socket.socket) -> Iterator[bytes]:
    body = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    netlink.send(codec.pack(_RTM_GETADDR, codec.REQUEST | codec.DUMP, body))
    for each in codec.replies(netlink):
        _, _, _, scope, _ = _ADDRESS.unpack_from(each.payload)
        if scope == _SCOPE_UNIVERSE:
            found = codec.attributes(each.payload[_ADDRESS.size :])
            address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
            if address:
                yield bytes(address)
