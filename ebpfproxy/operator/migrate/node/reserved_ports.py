"""Ports that stand for clients of kube-proxy's connections: none of ours may have them while those live.

MASQUERADE --random-fully takes any port from 1024 on: one of ours to the same backend would meet it, its SYN
would go to the old connection, whose answers would come to us. An entry of answers that changes nothing keeps
each such port from being taken; it is followed, and ends as any other. The other way round, when kube-proxy
takes over, entries of netfilter's conntrack do the same for our ports.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable

from ebpfproxy.datapath.abi.flow_layout import Entry, Nat, NatFlags, Seen, pack_flow, pack_nat
from ebpfproxy.datapath.abi.flow_layout import Flow as Tuple
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.netlink.ctnetlink import Flow
from ebpfproxy.services.values import parse_address

_OLDER = 60 * 1_000_000_000


def reserve(maps: MapSet, flows: Iterable[Flow], ports: tuple[int, int]) -> int:
    """Reserves the ports between these two that masqueraded flows have; returns their number."""
    now = time.monotonic_ns()
    # An older entry has the time-out of an established flow.
    created = max(0, now - _OLDER)
    entries = {}
    for each in flows:
        if each.seen_as == each.client or not ports[0] <= each.seen_as[1] <= ports[1]:
            continue
        backend, node = parse_address(each.answering[0]), parse_address(each.seen_as[0])
        if backend is None or node is None:
            continue
        ends = (backend, node, each.answering[1], each.seen_as[1])
        key = pack_flow(Tuple(*ends, each.protocol, egress=False))
        flags = NatFlags.REPLY | NatFlags.SOURCE
        entries[key] = pack_nat(key, Nat(*ends, 0, 0, flags, Seen.REPLY, now, created))
    maps["conntrack"].update_many(entries)
    return len(entries)


class HeldPorts:
    """Keeps netfilter from choosing the ports that our flows have towards backends, as long as they drain."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._held: set[bytes] = set()

    def hold(self, entries: Iterable[tuple[bytes, bytes]]) -> None:
        """Holds those of flows that have begun since the last call. ``entries``: all of the map conntrack."""
        fresh = {
            entry.key
            for entry in map(Entry._make, entries)
            if entry.flags & NatFlags.REPLY and not (entry.flags & NatFlags.OWN or entry.flow.egress)
        }
        replies = [Entry(key, b"").flow for key in fresh - self._held]
        self._held |= fresh
        ctnetlink.hold(
            (
                (
                    reply.protocol,
                    (_text(reply.destination), reply.destination_port),
                    (_text(reply.source), reply.source_port),
                )
                for reply in replies
            ),
            self._seconds,
        )


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
