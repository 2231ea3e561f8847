"""The kernel's tables of devices, addresses and routes in this network namespace, followed."""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

from ebpfproxy.logs import get_logger
from ebpfproxy.netlink.rtnetlink import ALL_GROUPS, DELROUTE, NEWROUTE, RTMSG, Rtnetlink
from ebpfproxy.node.facts import Facts
from ebpfproxy.node.kernel_tables import read_facts
from ebpfproxy.node.roles import asks_for_routes

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
#: The pause between two readings: a routing daemon may change thousands of routes a second.
_REST_SECONDS = 0.05

_SO_ATTACH_FILTER = 26
_NLATTR = 0xFFFFF00C  # SKF_AD_OFF + SKF_AD_NLATTR, linux/filter.h
_RTA_OIF = 4
#: Offsets in a message with its struct nlmsghdr: a route's length of the destination, and its attributes.
_PREFIX_AT, _ATTRIBUTES_AT = 17, 16 + RTMSG.size


class NetworkWatcher:
    """Calls ``sink`` with the whole state at the start and at every change, from its own thread."""

    def __init__(self, sink: Callable[[Facts], None]) -> None:
        self._sink = sink
        self._known: Facts | None = None

    def start(self) -> None:
        """The first state is delivered before this returns."""
        with Rtnetlink() as netlink:
            self._deliver(netlink)
        threading.Thread(target=self._run, name="network", daemon=True).start()

    def _deliver(self, netlink: Rtnetlink) -> frozenset[int]:
        """Returns the devices whose routes were read."""
        facts = read_facts(netlink)
        if facts != self._known:
            self._sink(facts)
            self._known = facts
        return asks_for_routes(facts)

    def _run(self) -> None:
        while True:
            try:
                self._follow()
            except Exception as error:
                log.warning("lost netlink, reading all devices and addresses again", error=repr(error))
                time.sleep(_RETRY_SECONDS)

    def _follow(self) -> None:
        """An event only signals a change: its content is discarded, and everything is read again."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as events, Rtnetlink() as netlink:
            filtered: frozenset[int] = frozenset()
            # select() has no room for descriptors above 1023, as of an agent with many health check ports.
            changes = select.poll()
            changes.register(events, select.POLLIN)
            _filter_route_events(events)
            events.bind((0, ALL_GROUPS))
            while True:
                asked = self._deliver(netlink)
                if asked != filtered:
                    # The next reading has every change that the filter dropped before.
                    _filter_route_events(events, asked)
                    filtered = asked
                    continue
                changes.poll()
                time.sleep(_REST_SECONDS)
                _discard(events)


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("count", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter_route_events(events: socket.socket, devices: Iterable[int] = ()) -> None:
    """Drops events of routes in the kernel, except of default routes and those of ``devices``.

    A classic BPF filter does it. A node that speaks BGP has thousands of these events a second, and none
    changes the state that is read here.
    """
    # Jumps reach no further; the routes of more devices would be read with other events.
    named = sorted(devices)[:200]
    count = len(named)
    program = [
        (0x28, 0, 0, 4),  # ldh: the type, which the instruction takes for big-endian
        (0x15, 1, 0, socket.htons(NEWROUTE)),  # jeq
        (0x15, 0, count + 9, socket.htons(DELROUTE)),
        (0x30, 0, 0, _PREFIX_AT),  # ldb
        (0x15, count + 7, 0, 0),
        (0x01, 0, 0, _RTA_OIF),  # ldx
        (0x00, 0, 0, _ATTRIBUTES_AT),  # ld: where the attributes begin
        (0x20, 0, 0, _NLATTR),  # ld: where that of X is
        (0x15, count + 2, 0, 0),  # none: a route by several ways
        (0x07, 0, 0, 0),  # tax
        (0x40, 0, 0, 4),  # ld: its value
        *((0x15, count - n, 0, socket.htonl(index)) for n, index in enumerate(named)),
        (0x06, 0, 0, 0),  # ret: nothing
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: all of it
    ]
    instructions = b"".join(struct.pack("=HBBI", *each) for each in program)
    filled = _Program(len(program), instructions)
    events.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(filled))


def _discard(events: socket.socket) -> None:
    while True:
        try:
            events.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # Everything is read again anyway.
            log.info("netlink has lost events, reading all devices and addresses again")
