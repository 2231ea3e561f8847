"""Maps addresses to network namespaces: a client is an address in packets, a namespace at the socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.netlink import codec
from ebpfproxy.netlink.namespace_ids import id_in
from ebpfproxy.netlink.namespaces import OWN, cookie_of, namespaces, netlink_in
from ebpfproxy.netlink.rtnetlink import GETADDR, IFADDRMSG

_NETLINK_ROUTE = 0
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
#: Only addresses of this scope (rtm_scope) are unique: link-local ones and the loopback's are not.
_SCOPE_UNIVERSE = 0


class Namespace(NamedTuple):
    """A network namespace, by one of its paths, with its packed addresses.

    ``is_linked``: a device links it with this process's own, as a pod's does.
    """

    path: Path
    cookie: int
    addresses: tuple[bytes, ...]
    is_linked: bool = False

    @property
    def is_own(self) -> bool:
        return self.path == OWN


def visible_namespaces() -> Iterator[Namespace]:
    """All that this process can see, its own first."""
    with OWN.open("rb") as own:
        for path in namespaces():
            # The namespace may have been deleted meanwhile.
            with suppress(OSError), netlink_in(path, _NETLINK_ROUTE) as netlink:
                netlink.settimeout(2.0)
                cookie, addresses = cookie_of(netlink), tuple(_addresses(netlink))
                is_linked = path != OWN and id_in(netlink, own.fileno()) is not None
                yield Namespace(path, cookie, addresses, is_linked)


def namespace_cookies() -> dict[bytes, int]:
    """The cookie of the namespace that has an address, for all namespaces that this process can see.

    If several have one address, the host comes first, then the only one that a device links with the host, as
    a pod is. Containers of another engine, or of a node within this one, may use the same addresses.
    """
    linked: dict[bytes, set[int]] = {}
    others: dict[bytes, set[int]] = {}
    host: dict[bytes, int] = {}
    for each in visible_namespaces():
        if each.is_own:
            host = dict.fromkeys(each.addresses, each.cookie)
            continue
        found = linked if each.is_linked else others
        for address in each.addresses:
            found.setdefault(address, set()).add(each.cookie)
    only = {address: cookies.pop() for address, cookies in (others | linked).items() if len(cookies) == 1}
    return only | host


def _addresses(netlink: socket.socket) -> Iterator[bytes]:
    body = IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    netlink.send(codec.pack(GETADDR, codec.REQUEST | codec.DUMP, body))
    for each in codec.replies(netlink):
        if address := _address(each.payload):
            yield address


@codec.reading
def _address(message: memoryview) -> bytes:
    """Empty where the address is that of a link, or of the host alone."""
    _, _, _, scope, _ = IFADDRMSG.unpack_from(message)
    if scope != _SCOPE_UNIVERSE:
        return b""
    found = codec.attributes(message[IFADDRMSG.size :])
    return bytes(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS) or b"")
