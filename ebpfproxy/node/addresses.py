"""The addresses of this network namespace, followed as they come and go."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from pyroute2 import IPRoute
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def read_addresses() -> frozenset[bytes]:
    """Every address of every interface, packed; without the loopback ranges 127/8 and ::1."""
    with IPRoute() as netlink:
        return _read(netlink)


def _read(netlink: IPRoute) -> frozenset[bytes]:
    found = set()
    for family in _FAMILIES:
        for message in netlink.get_addr(family=family):
            # IFA_LOCAL is this end of a point-to-point address; IPv6 has only IFA_ADDRESS.
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if text:
                found.add(socket.inet_pton(family, text))
    loopback6 = bytes(15) + b"\x01"
    return frozenset(a for a in found if a != loopback6 and not (len(a) == 4 and a[0] == 127))


class AddressWatcher:
    """Calls ``sink`` with the whole set at the start and at every change, from a thread of its own."""

    def __init__(self, sink: Callable[[frozenset[bytes]], None]) -> None:
        self._sink = sink
        self._known: frozenset[bytes] | None = None

    def start(self) -> None:
        """The first set is delivered before this returns."""
        self._deliver(read_addresses())
        threading.Thread(target=self._run, name="addresses", daemon=True).start()

    def _deliver(self, addresses: frozenset[bytes]) -> None:
        if addresses != self._known:
            self._known = addresses
            self._sink(addresses)

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except Exception as error:
                log.warning("lost netlink, reading all addresses again", error=repr(error))
                time.sleep(_RETRY_SECONDS)

    def _follow(self) -> None:
        with IPRoute() as events, IPRoute() as netlink:
            events.bind(RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR)
            self._deliver(_read(netlink))
            while True:
                for _ in events.get():
                    pass
                self._deliver(_read(netlink))
