"""Which device leads to an address, and with which source, as this node's routes have it (RTM_GETROUTE)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

_RTN_UNICAST = 1


@contextmanager
def ways() -> Iterator[Callable[[bytes], int | None]]:
    """A function from an address to the ifindex of the device that leads there.

    None for this node's own addresses, and for those that no route leads to. Answers are remembered.
    """
    with IPRoute() as netlink:

        @cache
        def way_to(address: bytes) -> int | None:
            for route in _routes(netlink, address):
                if route["type"] == _RTN_UNICAST:
                    ifindex: int | None = route.get_attr("RTA_OIF")
                    return ifindex
            return None

        yield way_to


def source_towards(address: bytes) -> bytes:
    """The source of this host's packets to a packed address, as the kernel chooses it; empty without one.

    A connect() would tell as well, but goes through our own hooks.
    """
    with IPRoute() as netlink:
        for route in _routes(netlink, address):
            text = route.get_attr("RTA_PREFSRC")
            if text:
                return socket.inet_pton(_family(address), text)
    return b""


def _routes(netlink: Any, address: bytes) -> list[Any]:
    try:
        found = netlink.route("get", family=_family(address), dst=socket.inet_ntop(_family(address), address))
    except NetlinkError:
        return []
    return list(found)


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6
