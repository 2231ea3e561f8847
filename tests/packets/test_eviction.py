"""The LRU map evicts an entry of a pair: the flow goes on by the other one, which restores it."""

from __future__ import annotations

import ipaddress
import struct
import time
from itertools import starmap

import pytest

from ebpfproxy.datapath.abi.flow_layout import Entry, Flow, Nat, NatFlags
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.packet_cluster import FamilyAddresses
from tests.packets.test_flows import PAYLOAD
from tests.packets.test_tcp_close import BACKEND_NEXT, CLIENT_NEXT, Connection
from tests.packets.wire import Wire

pytestmark = pytest.mark.root

_LAST_AT = 48


def entries_of(connection: Connection) -> dict[Flow, Entry]:
    client = ipaddress.ip_address(connection.family.client).packed
    found = starmap(Entry, connection.tables["conntrack"].items())
    return {
        entry.flow: entry
        for entry in found
        if (client, connection.port)
        in (
            (entry.flow.source, entry.flow.source_port),
            (entry.flow.destination, entry.flow.destination_port),
            (entry.nat.destination, entry.nat.destination_port),
        )
    }


def without_times(entry: Entry) -> Nat:
    """The translation of the entry, without times, sequence numbers and whether there was a reply."""
    return entry.nat._replace(last=0, end=0, acked=0, seen=entry.nat.seen & ~1)


@pytest.mark.parametrize("evicted", [NatFlags(0), NatFlags.REPLY])
# On a slow machine a packet is sent more than a second after the entry was aged: that one was used in the future.
@pytest.mark.parametrize("idle", [-60.0, 2.0], ids=["in-use", "idle"])
def test_evicted_partner_entry_is_restored(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet, evicted: NatFlags, idle: float
) -> None:
    """Entries of the Service's and of the masquerade's pair. A packet looks for them at most once a second."""
    connection = Connection(wire, family, port, tables).establish()
    before = entries_of(connection)
    assert len(before) == 4
    last = time.monotonic_ns() - int(idle * 1e9)
    for entry in before.values():
        if entry.nat.flags & NatFlags.REPLY == evicted:
            tables["conntrack"].delete(entry.key)
        else:
            aged = bytearray(entry.value)
            struct.pack_into("=Q", aged, _LAST_AT, last)
            tables["conntrack"].update(entry.key, bytes(aged))
    if evicted:
        connection.original("PA", CLIENT_NEXT, BACKEND_NEXT, PAYLOAD)
    else:
        connection.reply("PA", BACKEND_NEXT, CLIENT_NEXT, PAYLOAD)
    after = entries_of(connection)
    if idle < 0:
        assert len(after) == 2
        return
    assert {flow: without_times(entry) for flow, entry in after.items()} == {
        flow: without_times(entry) for flow, entry in before.items()
    }
    connection.original("A", CLIENT_NEXT, BACKEND_NEXT)
    connection.reply("R", BACKEND_NEXT)
    assert connection.states == ("CLOSE", 4)


def test_evicted_partner_entry_of_a_closed_connection_is_not_restored(
    wire: Wire, family: FamilyAddresses, port: int, tables: MapSet
) -> None:
    connection = Connection(wire, family, port, tables).establish()
    connection.reply("R", BACKEND_NEXT)
    for entry in entries_of(connection).values():
        aged = bytearray(entry.value)
        struct.pack_into("=Q", aged, _LAST_AT, time.monotonic_ns() - int(2e9))
        tables["conntrack"].update(entry.key, bytes(aged))
        if entry.nat.flags & NatFlags.REPLY:
            tables["conntrack"].delete(entry.key)
    connection.original("A", CLIENT_NEXT, BACKEND_NEXT)
    assert len(entries_of(connection)) == 2
