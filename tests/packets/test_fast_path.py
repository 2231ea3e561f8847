"""Packets of established flows: the fast path translates them as the rest of the program does.

One packet a second of each flow takes the way of all others, so each is sent with an entry that was used now, with
one that was used long ago, and with one that the flow cache has.
"""

from __future__ import annotations

import ipaddress
import os
import time
from collections.abc import Callable, Iterator
from itertools import starmap
from typing import NamedTuple

import pytest
from scapy.compat import raw
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ebpfproxy.datapath.abi.flow_layout import Entry, Flow, Nat, NatFlags, Seen
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.packets.flow_slots import FlowSlots, changed
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import PAYLOAD, ends_of, segment
from tests.packets.wire import PASS, Result, Wire, ip_of, with_right_checksums

pytestmark = pytest.mark.root


class Hop(NamedTuple):
    """Where a packet of the flow passes a program: its ends, and what they become."""

    send: Callable[[Packet], Result]
    ends: tuple[str, int, str, int]
    becomes: tuple[str, int, str, int]

    def is_of(self, flow: Flow) -> bool:
        source, source_port, destination, destination_port = self.ends
        addresses = [ipaddress.ip_address(each).packed for each in (source, destination)]
        ports = [source_port, destination_port]
        return [flow.source, flow.destination, flow.source_port, flow.destination_port] == addresses + ports


@pytest.fixture(params=["TCP", "UDP"])
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def hops(wire: Wire, family: FamilyAddresses, protocol: str, port: int) -> list[Hop]:
    """An established flow of a client outside to a NodePort, which is masqueraded, with its four hops."""
    _, node_port, target = PORTS[protocol]

    def ingress(packet: Packet) -> Result:
        return wire.ingress(packet)

    def egress(packet: Packet) -> Result:
        return wire.egress(packet, iif="eth0")

    client, node, backend = (family.client, port), (family.node, node_port), (family.remote_pod, target)
    made: list[Hop] = []
    for send, source, destination, flags in (
        (ingress, client, node, "S"),
        (egress, client, backend, "S"),
        (ingress, backend, None, "SA"),
        (egress, backend, client, "SA"),
    ):
        # The third hop goes to the address and port that the second one has given to the client.
        ends = (*source, *(destination or made[1].becomes[:2]))
        out = send(family.ip(ends[0], ends[2]) / segment(protocol, ends[1], ends[3], flags))
        assert out.verdict == PASS
        made.append(Hop(send, ends, ends_of(out.packet)))
    assert (made[0].becomes, made[3].becomes) == ((*client, *backend), (*node, *client))
    return made


class Table(NamedTuple):
    """The entries of the client's flow."""

    tables: MapSet
    client: tuple[bytes, int]

    def entries(self) -> list[Entry]:
        found = [
            entry
            for entry in starmap(Entry, self.tables["conntrack"].items())
            if self.client
            in (
                (entry.flow.source, entry.flow.source_port),
                (entry.flow.destination, entry.flow.destination_port),
                (entry.nat.destination, entry.nat.destination_port),
            )
        ]
        assert len(found) == 4
        return found

    def without_times(self) -> dict[Flow, Nat]:
        return {entry.flow: entry.nat._replace(last=0) for entry in self.entries()}

    def age(self) -> None:
        for entry in self.entries():
            aged = changed(entry.value, last=time.monotonic_ns() - 5 * 10**9)
            self.tables["conntrack"].update(entry.key, aged)

    def send_cached(self, hop: Hop, packet: Packet) -> Result:
        """Sends a packet whose entry only the flow cache has, and puts the entry back."""
        slots, conntrack = FlowSlots(self.tables), self.tables["conntrack"]
        # A datagram that is shorter than TCP's header is none for the fast path.
        is_cached = len(ip_of(packet).payload) >= 20
        entries = self.entries()
        keys = [entry.key for entry in entries if is_cached and hop.is_of(entry.flow)]
        slots.admit_by(keys, lambda: hop.send(packet))
        assert len(keys) == is_cached
        for key in keys:
            slots.keep(key)
            conntrack.delete(key)
        sent = hop.send(packet)
        for key in keys:
            assert slots.value(key) is not None
            slots.clear(key)
        for entry in entries:
            conntrack.update(entry.key, entry.value)
        return sent


@pytest.fixture
def table(tables: MapSet, family: FamilyAddresses, port: int) -> Table:
    return Table(tables, (ipaddress.ip_address(family.client).packed, port))


def each_way(hop: Hop, packet: Packet, table: Table) -> Result:
    """Sends a packet by each way; asserts that they make the same of it, and of the flow's entries."""
    fast = hop.send(packet)
    known = table.without_times()
    table.age()
    slow = hop.send(packet)
    assert fast == slow == table.send_cached(hop, packet)
    assert table.without_times() == known
    assert fast.verdict == PASS
    assert ends_of(fast.packet) == hop.becomes
    return fast


@pytest.mark.parametrize("payload", [b"", b"x", PAYLOAD, PAYLOAD * 80], ids=len)
@pytest.mark.parametrize("flags", ["A", "PA"])
def test_packets_become_the_same(
    hops: list[Hop],
    family: FamilyAddresses,
    protocol: str,
    table: Table,
    payload: bytes,
    flags: str,
) -> None:
    for hop in hops:
        transport = segment(protocol, hop.ends[1], hop.ends[3], flags, payload)
        out = each_way(hop, family.ip(hop.ends[0], hop.ends[2]) / transport, table)
        assert with_right_checksums(out.packet) == out.bytes


@pytest.fixture
def without_writer(wire: Wire) -> Iterator[None]:
    """As after another start of the agent, while a device still has the programs of the former one."""
    writer, array = (bpf.get_pinned(wire.programs / name) for name in ("write_packet", "writers"))
    bpf.map_delete(array, U32.pack(0))
    yield
    bpf.map_update(array, U32.pack(0), U32.pack(writer))
    os.close(array)
    os.close(writer)


@pytest.mark.usefixtures("without_writer")
def test_packets_become_the_same_without_the_program_that_writes_in_place(
    hops: list[Hop], family: FamilyAddresses, protocol: str, table: Table
) -> None:
    for hop in hops:
        transport = segment(protocol, hop.ends[1], hop.ends[3], "PA", PAYLOAD)
        out = each_way(hop, family.ip(hop.ends[0], hop.ends[2]) / transport, table)
        assert with_right_checksums(out.packet) == out.bytes


def test_padding_and_a_datagram_without_checksum_stay(
    hops: list[Hop], wire: Wire, family: FamilyAddresses, protocol: str, table: Table
) -> None:
    padding = b"\xa5" * 20
    for hop in hops:
        transport = segment(protocol, hop.ends[1], hop.ends[3], "A", b"")
        if protocol == "UDP":
            transport.chksum = 0
        packet = family.ip(hop.ends[0], hop.ends[2]) / transport
        frame = Ether(dst=wire.mac("eth0"), src="02:00:00:00:00:99") / packet
        out = each_way(hop, Ether(raw(frame) + padding), table)
        assert out.bytes.endswith(padding)
        if protocol == "UDP":
            assert out.packet[type(transport)].chksum == 0


@pytest.mark.parametrize("hop_limit", [1, 255])
def test_rest_of_the_header_stays(
    hops: list[Hop], family: FamilyAddresses, protocol: str, table: Table, hop_limit: int
) -> None:
    fields = {"ttl": hop_limit, "tos": 0xB8} if family.version == 4 else {"hlim": hop_limit, "tc": 0xB8}
    for hop in hops:
        transport = segment(protocol, hop.ends[1], hop.ends[3], "A")
        out = each_way(hop, family.ip(hop.ends[0], hop.ends[2], **fields) / transport, table)
        assert with_right_checksums(out.packet) == out.bytes
        assert {name: getattr(out.packet.payload, name) for name in fields} == fields


@pytest.mark.usefixtures("hops")
def test_first_replies_are_noted(table: Table) -> None:
    """Timeouts depend on it: until then no packet of the reply direction takes the fast path."""
    replies = [each.nat for each in table.entries() if each.nat.flags & NatFlags.REPLY]
    assert len(replies) == 2
    assert all(nat.seen & Seen.REPLY for nat in replies)
