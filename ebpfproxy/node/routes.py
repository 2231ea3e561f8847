"""Which device leads where, as this node's routes have it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

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
            family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
            try:
                found = netlink.route("get", family=family, dst=socket.inet_ntop(family, address))
            except NetlinkError:
                return None
            for route in found:
                if route["type"] == _RTN_UNICAST:
                    ifindex: int | None = route.get_attr("RTA_OIF")
                    return ifindex
            return None

        yield way_to
