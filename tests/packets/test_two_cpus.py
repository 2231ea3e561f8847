"""The first packets of a flow may come in on two CPUs at once: both create it, and each has to find its way."""

from __future__ import annotations

import ipaddress
import mmap
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import starmap

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet, Raw

from ebpfproxy.datapath.abi.flow_layout import Entry, Seen
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Protocol
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


def _sends(
    wire: Wire, family: FamilyAddresses, first: Packet, turns: Turns, own: int, cpu: int
) -> Callable[[], None]:
    run = wire.prepared("from_device", "eth0", family.ip(family.client, family.node) / first)
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


def _send_on_two_cpus(wire: Wire, family: FamilyAddresses, first: Packet) -> None:
    """Has the first packet of each flow come in on both, at the same time as far as possible."""
    turns = Turns()
    cpus = sorted(os.sched_getaffinity(0))[:2]
    sends = [_sends(wire, family, first, turns, own, cpu) for own, cpu in enumerate(cpus)]
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


def _originals(tables: MapSet, family: FamilyAddresses, protocol: Protocol) -> list[Entry]:
    client = ipaddress.ip_address(family.client).packed
    ports = range(FIRST_PORT, FIRST_PORT + FLOWS)
    found = (each for each in starmap(Entry, tables["conntrack"].items()) if each.protocol == protocol)
    return [
        entry
        for entry in found
        if entry.flow.source.endswith(client) and entry.flow.source_port in ports and not entry.flow.egress
    ]


def test_first_datagrams_on_two_cpus_are_translated_and_leave_whole_pairs(
    wire: Wire, family: FamilyAddresses, tables: MapSet
) -> None:
    """Neither is dropped, no entry is deleted that the other one has made, and they are one flow of the backend."""
    before = _counted(tables)
    _send_on_two_cpus(wire, family, UDP(dport=PORTS["UDP"][1]) / Raw(b"x"))
    assert _counted(tables) == before + FLOWS
    entries = dict(tables["conntrack"].items())
    originals = _originals(tables, family, Protocol.UDP)
    assert len(originals) == FLOWS
    for entry in originals:
        assert Entry(entry.partner, entries[entry.partner]).partner == entry.key


def test_connections_that_begin_anew_on_two_cpus_are_counted_once(
    wire: Wire, family: FamilyAddresses, tables: MapSet
) -> None:
    """Both have found the entry of the connection before, whose end has been counted."""
    syn = TCP(dport=PORTS["TCP"][1], flags="S", seq=1000)
    _send_on_two_cpus(wire, family, syn)
    before = _counted(tables)
    for entry in _originals(tables, family, Protocol.TCP):
        tables["conntrack"].update(entry.key, entry.with_seen(Seen.RST))
    _send_on_two_cpus(wire, family, syn)
    assert len(_originals(tables, family, Protocol.TCP)) == FLOWS
    assert _counted(tables) == before + FLOWS
