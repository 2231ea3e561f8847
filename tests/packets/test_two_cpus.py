"""The first datagrams of a flow may come in on two CPUs at once: both create it, and each has to find its way."""

from __future__ import annotations

import ipaddress
import mmap
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from scapy.layers.inet import UDP
from scapy.packet import Raw

from ebpfproxy.datapath.abi.flow_layout import Entry
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.wire import PASS, Wire

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]

FLOWS = 200
FIRST_PORT = 40000


class Turns:
    """What two processes say of themselves, in memory that they share: the turn of each, and what was not passed."""

    def __init__(self) -> None:
        self._words = mmap.mmap(-1, 16)

    def wait(self, own: int, turn: int) -> None:
        """Waits for the other one, but not for one that has ended."""
        struct.pack_into("=I", self._words, 4 * own, turn)
        end = time.monotonic() + 30
        while struct.unpack_from("=I", self._words, 4 - 4 * own)[0] < turn:
            if time.monotonic() > end:
                raise TimeoutError(turn)

    def count_lost(self, own: int) -> None:
        (lost,) = struct.unpack_from("=I", self._words, 8 + 4 * own)
        struct.pack_into("=I", self._words, 8 + 4 * own, lost + 1)

    @property
    def lost(self) -> tuple[int, int]:
        return struct.unpack_from("=2I", self._words, 8)


def _sends(wire: Wire, family: FamilyAddresses, turns: Turns, own: int, cpu: int) -> Callable[[], None]:
    datagram = family.ip(family.client, family.node) / UDP(dport=PORTS["UDP"][1]) / Raw(b"x")
    run = wire.prepared("from_device", "eth0", datagram)
    port_at = 34 if family.version == 4 else 54

    def send() -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {cpu})
        for turn in range(FLOWS):
            run.change(port_at, struct.pack("!H", FIRST_PORT + turn))
            turns.wait(own, turn + 1)
            if run() != PASS:
                turns.count_lost(own)
        os.sched_setaffinity(0, before)

    return send


def _counted(tables: MapSet) -> int:
    """The flows of all backends, as programs have counted them."""
    loads = tables.loads()
    counted = [loads[number] for number in loads.counted(len(loads))]
    return sum(each.flows_begun - each.flows_ended for each in counted)


def test_first_datagrams_on_two_cpus_are_translated_and_leave_whole_pairs(
    wire: Wire, family: FamilyAddresses, tables: MapSet
) -> None:
    """Neither is dropped, no entry is deleted that the other one has made, and they are one flow of the backend."""
    turns, before = Turns(), _counted(tables)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    sends = [_sends(wire, family, turns, own, cpu) for own, cpu in enumerate((first, second))]
    child = os.fork()
    if not child:
        with suppress(BaseException):
            wire.enter()
            sends[1]()
            os._exit(0)
        os._exit(1)
    try:
        wire.within(sends[0])
    finally:
        _, status = os.waitpid(child, 0)
    assert status == 0
    assert turns.lost == (0, 0)
    assert _counted(tables) == before + FLOWS
    entries = dict(tables["conntrack"].items())
    client = ipaddress.ip_address(family.client).packed
    ports = range(FIRST_PORT, FIRST_PORT + FLOWS)
    originals = [
        entry
        for entry in (Entry(key, value) for key, value in entries.items())
        if entry.flow.source.endswith(client) and entry.flow.source_port in ports and not entry.flow.egress
    ]
    assert len(originals) == FLOWS
    for entry in originals:
        assert Entry(entry.partner, entries[entry.partner]).partner == entry.key
