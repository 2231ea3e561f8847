"""Expiry of conntrack entries by the sweep, on real maps with a simulated clock."""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import flow_layout, layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, Entry, Flow, Nat, NatFlags, RemovalReason, Seen
from ebpfproxy.datapath.abi.hooks import SWEEP
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import UDPLITE, Timeouts, flows_of, state_of
from ebpfproxy.datapath.flows.sweeper import Sweeper
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import ServiceBackend
from ebpfproxy.services.model import Family, Protocol
from tests.datapath.test_loading import OPTIONS
from tests.datapath.writing import set_load

pytestmark = pytest.mark.root

S = 1_000_000_000
CLIENT, FRONTEND, BACKEND, NODE = (bytes(a) for a in ((1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4)))
OTHER_FRONTEND = bytes((2, 2, 2, 9))
NOTHING = Seen(0)
BOTH_FIN = Seen.FIN | Seen.REPLY_FIN


class Bench:
    def __init__(self, opened: MapSet, options: loader.Options = OPTIONS) -> None:
        self.maps = opened
        self.now = 1_000_000 * S
        programs = loader.ensure_loaded(opened, options, (SWEEP,))
        # Without a cycle, in which maps would stay open until it is collected.
        itself = weakref.proxy(self)
        self.sweeper = Sweeper(opened, Timeouts(), programs, clock=lambda: itself.now)

    def add(self, flow: Flow, nat: Nat) -> tuple[bytes, bytes]:
        """Inserts an entry and returns its key and value."""
        key, value = flow_layout.pack_flow(flow), pack_nat(nat)
        value = flow_layout.with_check(key, value)
        self.maps["conntrack"].update(key, value)
        return key, value

    def pair(
        self,
        port: int,
        *,
        protocol: int = Protocol.TCP,
        seen: Seen = NOTHING,
        idle: float = 0,
        reply_seen: Seen | None = None,
        reply_idle: float | None = None,
        lasted: float = 3600,
        ids: tuple[int, int] = (1, 1),
        acked: int = 0,
    ) -> None:
        """Inserts the entries of both directions, which are idle for ``idle`` and ``reply_idle`` seconds."""
        times = [self.now - int(i * S) for i in (idle, idle if reply_idle is None else reply_idle)]
        original = Flow(CLIENT, FRONTEND, port, 80, protocol, False)
        began = [each - int(lasted * S) for each in times]
        nat = Nat(CLIENT, BACKEND, port, 8080, *ids, NatFlags(0), seen, times[0], began[0])
        self.add(original, nat._replace(acked=acked))
        reply = Flow(BACKEND, CLIENT, 8080, port, protocol, True)
        back = Nat(FRONTEND, CLIENT, 80, port, *ids, NatFlags.REPLY, seen, times[1], began[1])
        self.add(reply, back._replace(seen=seen if reply_seen is None else reply_seen))

    def remove(self, *uses: BackendUse, why: RemovalReason = RemovalReason.GONE) -> None:
        departures = {flow_layout.pack_departure(use): layout.U32.pack(why) for use in uses}
        self.maps["departures"].update_many(departures)

    @property
    def left(self) -> int:
        return self.maps["conntrack"].count()


def pack_nat(nat: Nat) -> bytes:
    """Packs ``struct nat`` as programs do."""
    return struct.pack(
        "=16s16s2s2sIIBBHQQIIQ",
        layout.pack_address(nat.source),
        layout.pack_address(nat.destination),
        nat.source_port.to_bytes(2, "big"),
        nat.destination_port.to_bytes(2, "big"),
        nat.service_id,
        nat.backend_id,
        nat.flags,
        nat.seen,
        0,
        nat.last,
        nat.created,
        nat.end,
        nat.acked,
        0,
    )


@pytest.fixture
def bench(pins: Path) -> Iterator[Bench]:
    opened = maps.open_or_create(pins, Capacity(conntrack=8192))
    made = Bench(opened)
    yield made
    made.sweeper.close()
    opened.close()


@pytest.mark.parametrize(
    ("protocol", "seen", "limit"),
    [
        (Protocol.TCP, Seen(0), 60),
        (Protocol.TCP, Seen.REPLY, 86400),
        (Protocol.TCP, Seen.REPLY | Seen.FIN, 3600),
        (Protocol.TCP, Seen.REPLY | Seen.REPLY_FIN, 3600),
        (Protocol.TCP, Seen.REPLY | BOTH_FIN, 70),
        (Protocol.TCP, Seen.REPLY | Seen.RST, 30),
        (Protocol.UDP, Seen(0), 30),
        (Protocol.UDP, Seen.REPLY, 120),
        (Protocol.SCTP, Seen.REPLY, 300),
    ],
)
def test_flow_expires_after_the_timeout_of_its_state(
    bench: Bench, protocol: Protocol, seen: Seen, limit: float
) -> None:
    bench.pair(1, protocol=protocol, seen=seen, idle=limit - 1)
    bench.pair(2, protocol=protocol, seen=seen, idle=limit + 1)
    assert bench.sweeper.sweep().expired == 2
    assert bench.left == 2


def half_open(
    bench: Bench, port: int, idle: float, *, replied: int = 101, acked: int = 0, seen: int = 0
) -> None:
    """A client's SYN with the number 100, and the backend's answer, which acknowledges up to ``replied``."""
    last, began = bench.now - int(idle * S), bench.now - 3600 * S
    original = Nat(CLIENT, BACKEND, port, 8080, 1, 1, NatFlags(0), Seen(seen), last, began, 101, acked)
    bench.add(Flow(CLIENT, FRONTEND, port, 80, 6, False), original)
    reply = Nat(FRONTEND, CLIENT, 80, port, 1, 1, NatFlags.REPLY, Seen.REPLY, last, began, 501, replied)
    bench.add(Flow(BACKEND, CLIENT, 8080, port, 6, True), reply)


def test_connection_that_its_client_never_confirmed_expires_like_one_without_a_reply(bench: Bench) -> None:
    """A flood from forged addresses would keep its ports for a day: netfilter's SYN_RECV has 60 s as well."""
    half_open(bench, 1, 59)
    half_open(bench, 2, 61)
    half_open(bench, 3, 61, acked=501)
    entries = list(bench.maps["conntrack"].items())
    rows = flows_of(entries, Timeouts(), bench.now, {})
    found = {row.client: (row.state, row.expires) for row, _ in rows}
    assert found == {
        "1.1.1.1:1": ("SYN_RECV", 1.0),
        "1.1.1.1:2": ("SYN_RECV", 0.0),
        "1.1.1.1:3": ("ESTABLISHED", 86339.0),
    }
    assert bench.sweeper.sweep().expired == 2
    assert bench.left == 4


def test_forged_or_late_syn_does_not_shorten_the_life_of_a_connection(bench: Bench) -> None:
    """It begins the numbers of its direction anew. Two SYNs with different ones are still no connection."""
    half_open(bench, 1, 3600, replied=7000, seen=Seen.REPLY)
    half_open(bench, 2, 3600, replied=7000)
    assert bench.sweeper.sweep().expired == 2
    assert bench.left == 2


def test_masquerade_of_a_connection_that_was_never_confirmed_expires_with_it(bench: Bench) -> None:
    """Its port is what a flood would use up."""
    half_open(bench, 1, 61)
    last, began = bench.now - 61 * S, bench.now - 3600 * S
    out = Nat(NODE, BACKEND, 999, 8080, 1, 1, NatFlags.SOURCE, Seen(0), last, began, 101, 0)
    bench.add(Flow(CLIENT, BACKEND, 1, 8080, 6, True), out)
    flags = NatFlags.SOURCE | NatFlags.REPLY
    back = Nat(BACKEND, CLIENT, 8080, 1, 1, 1, flags, Seen.REPLY, last, began, 501, 101)
    bench.add(Flow(BACKEND, NODE, 8080, 999, 6, False), back)
    assert bench.sweeper.sweep().expired == 4
    assert bench.left == 0


def test_one_active_direction_keeps_both_entries(bench: Bench) -> None:
    """A stream of datagrams in one direction has no packet in the other."""
    bench.pair(1, protocol=Protocol.UDP, idle=0, reply_idle=1000)
    bench.pair(2, protocol=Protocol.UDP, seen=Seen(0), idle=100, reply_seen=Seen.REPLY, reply_idle=100)
    assert bench.sweeper.sweep().expired == 0, "a reply in either entry makes the flow a stream"
    bench.now += 60 * S
    assert bench.sweeper.sweep().expired == 4


def test_close_seen_in_one_direction_expires_both_entries(bench: Bench) -> None:
    bench.pair(1, seen=Seen.REPLY | Seen.RST, idle=40, reply_seen=Seen.REPLY, reply_idle=40)
    assert bench.sweeper.sweep().expired == 2


def test_entry_without_its_reply_expires_alone(bench: Bench) -> None:
    bench.add(
        Flow(CLIENT, FRONTEND, 9, 80, 6, False),
        Nat(CLIENT, BACKEND, 9, 8080, 1, 1, NatFlags(0), Seen(0), bench.now - 61 * S, 0),
    )
    assert bench.sweeper.sweep().expired == 1


def test_thousands_of_entries_in_one_sweep(bench: Bench) -> None:
    for port in range(1, 2001):
        bench.pair(port, idle=61 if port % 2 else 0)
    found = bench.sweeper.sweep()
    assert (found.expired, found.entries, bench.left) == (2000, 2000, 2000)


def test_flows_of_a_removed_backend_are_deleted_at_once(bench: Bench) -> None:
    """Flows of a backend that is not ready are deleted only if their protocol has no connections."""
    for port, protocol in ((1, Protocol.TCP), (2, Protocol.UDP)):
        bench.pair(port, protocol=protocol, ids=(7, 1))
        bench.pair(port + 2, protocol=protocol, ids=(7, 2))
        bench.pair(port + 4, protocol=protocol, ids=(8, 1))
    bench.remove(BackendUse(7, 1))
    bench.remove(BackendUse(7, 2), why=RemovalReason.IDLE)
    swept = bench.sweeper.sweep()
    assert (swept.expired, swept.removed) == (6, {Family.IPV4: 3})
    left = {flow_layout.unpack_flow(key).source_port for key, _ in bench.maps["conntrack"].items()} - {8080}
    assert left == {3, 5, 6}


def test_flow_reused_during_a_sweep_keeps_both_entries(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the sweep a port is reused, by the same flow or by another one with the same entries."""
    bench.pair(1, protocol=Protocol.UDP, idle=31)
    bench.pair(2, protocol=Protocol.UDP, idle=31)
    bench.pair(3, protocol=Protocol.UDP, ids=(7, 1))
    bench.pair(4, protocol=Protocol.UDP, ids=(7, 1))
    table = bench.maps["conntrack"]
    again = {2: NOTHING}

    def reuse_ports() -> None:
        if again.pop(2, None) is not None:
            bench.pair(2, protocol=Protocol.UDP, idle=0, reply_idle=31)
            bench.pair(4, protocol=Protocol.UDP, ids=(7, 2))

    read = bpf.map_lookup_batches_into

    def read_and_reuse(*arguments: Any) -> Iterator[int]:
        for count in read(*arguments):
            reuse_ports()
            yield count

    monkeypatch.setattr(bpf, "map_lookup_batches_into", read_and_reuse)
    bench.remove(BackendUse(7, 1))
    swept = bench.sweeper.sweep()
    assert swept.expired == 4
    left = {flow_layout.unpack_flow(key) for key, _ in table.items()}
    assert {flow.source_port for flow in left} - {8080} == {2, 4}
    assert len(left) == 4, "both directions"


def load(bench: Bench, number: int) -> layout.Load:
    return bench.maps.loads()[number]


def test_expired_flows_do_not_count_as_load(bench: Bench) -> None:
    """Programs count flows that begin; only the sweep can count those that expire."""
    for port in range(10):
        bench.pair(port + 1, protocol=Protocol.UDP, idle=1000 if port < 4 else 0, ids=(7, 3))
    set_load(bench.maps, 3, flows_begun=10)
    bench.sweeper._busy = {3}
    assert load(bench, 3).open_flows == 10
    bench.sweeper.sweep(backends=8)
    assert load(bench, 3).open_flows == 6
    bench.remove(BackendUse(7, 3))
    bench.sweeper.sweep(backends=8)
    assert load(bench, 3).open_flows == 0


def test_inconsistent_counts_are_corrected(bench: Bench) -> None:
    """Counts may be wrong because flows are evicted, counted twice, or copied from other maps."""
    bench.pair(1, ids=(7, 2))
    bench.pair(2, ids=(7, 4))
    bench.pair(3, ids=(7, 4), seen=Seen.REPLY | Seen.RST)
    set_load(bench.maps, 1, flows_begun=5, flows_corrected=0)
    set_load(bench.maps, 2, flows_ended=1)
    set_load(bench.maps, 4, flows_ended=7)
    bench.pair(5, ids=(7, 1), seen=Seen(0), idle=1000)
    for _ in range(2):
        bench.sweeper.sweep(backends=8)
    assert [load(bench, number).open_flows for number in (1, 2, 4)] == [0, 1, 1]


def test_entries_missing_without_a_deletion_count_as_evicted(bench: Bench) -> None:
    bench.sweeper.sweep()
    made = struct.pack("=Q", 10) + bytes(8 * (bpf.possible_cpus() - 1))
    bench.maps["packet_events"].update(layout.U32.pack(PacketEvent.FLOWS_MADE), made)
    bench.pair(1)
    assert bench.sweeper.sweep().evicted == 8
    assert bench.sweeper.sweep().evicted == 0


@pytest.mark.parametrize("protocol", [Protocol.UDP, UDPLITE])
def test_one_datagram_and_its_reply_are_no_stream(bench: Bench, protocol: int) -> None:
    """As in netfilter; with the longer timeout, flows of DNS clients would use all ports."""
    bench.pair(1, protocol=protocol, seen=Seen.REPLY, idle=29, lasted=0.9)
    bench.pair(2, protocol=protocol, seen=Seen.REPLY, idle=31, lasted=0.9)
    bench.pair(3, protocol=protocol, seen=Seen.REPLY, idle=119, lasted=1.1)
    bench.pair(4, protocol=protocol, seen=Seen.REPLY, idle=121, lasted=1.1)
    rows = flows_of(list(bench.maps["conntrack"].items()), Timeouts(), bench.now, {})
    assert sorted((row.client, row.expires) for row, _ in rows) == [
        ("1.1.1.1:1", 1.0),
        ("1.1.1.1:2", 0.0),
        ("1.1.1.1:3", 1.0),
        ("1.1.1.1:4", 0.0),
    ]
    assert bench.sweeper.sweep().expired == 4
    assert bench.left == 4


def test_masquerade_entries_live_as_long_as_their_flow(bench: Bench) -> None:
    """Masquerade entries may lack the last packet of the flow, which made it a stream."""
    bench.pair(5, protocol=Protocol.UDP, seen=Seen.REPLY, idle=60, lasted=1.0)
    began = bench.now - 61 * S
    original = Flow(CLIENT, BACKEND, 5, 8080, Protocol.UDP, True)
    bench.add(original, Nat(NODE, BACKEND, 999, 8080, 1, 1, NatFlags.SOURCE, Seen.REPLY, began, began))
    reply = Flow(BACKEND, NODE, 8080, 999, Protocol.UDP, False)
    flags = NatFlags.SOURCE | NatFlags.REPLY
    bench.add(reply, Nat(BACKEND, CLIENT, 8080, 5, 1, 1, flags, Seen.REPLY, began, began))
    assert bench.sweeper.sweep().expired == 0
    bench.now += 61 * S
    assert bench.sweeper.sweep().expired == 4


def test_partner_key_of_every_kind_of_entry() -> None:
    for flags, other_stage in ((NatFlags(0), True), (NatFlags.BYPASS, False), (NatFlags.HOST, True)):
        flow = Flow(CLIENT, FRONTEND, 1, 2, 6, False)
        key = flow_layout.pack_flow(flow)
        value = pack_nat(Nat(NODE, BACKEND, 3, 4, 1, 1, flags, Seen(0), 0, 0))
        partner = flow_layout.unpack_flow(Entry(key, value).partner)
        assert partner == Flow(BACKEND, NODE, 4, 3, 6, other_stage)


def test_four_entries_of_a_masqueraded_flow_are_one_row(bench: Bench) -> None:
    bench.pair(5, seen=Seen.REPLY)
    original = Flow(CLIENT, BACKEND, 5, 8080, 6, True)
    bench.add(original, Nat(NODE, BACKEND, 999, 8080, 1, 1, NatFlags.SOURCE, Seen(0), bench.now, 0))
    reply = Flow(BACKEND, NODE, 8080, 999, 6, False)
    flags = NatFlags.SOURCE | NatFlags.REPLY
    bench.add(reply, Nat(BACKEND, CLIENT, 8080, 5, 1, 1, flags, Seen(0), bench.now, 0))
    rows = flows_of(list(bench.maps["conntrack"].items()), Timeouts(), bench.now + 5 * S, {1: "shop/web"})
    assert len(rows) == 1
    row, keys = rows[0]
    assert len(set(keys)) == 4
    assert (row.client, row.frontend, row.backend, row.masquerade) == (
        "1.1.1.1:5",
        "2.2.2.2:80",
        "3.3.3.3:8080",
        "4.4.4.4:999",
    )
    assert (row.state, row.idle, row.expires) == ("ESTABLISHED", 5.0, 86395.0)


def test_reused_masquerade_port_is_not_of_the_closed_flow(bench: Bench) -> None:
    """take_port() overwrites the reply entry, which the original direction of the closed flow still refers to."""
    flags = NatFlags.SOURCE | NatFlags.REPLY
    reply = Flow(BACKEND, NODE, 8080, 999, 6, False)
    for port, seen in ((5, Seen.REPLY | BOTH_FIN), (6, Seen.REPLY)):
        bench.pair(port, seen=seen)
        original = Flow(CLIENT, BACKEND, port, 8080, 6, True)
        bench.add(original, Nat(NODE, BACKEND, 999, 8080, 1, 1, NatFlags.SOURCE, seen, bench.now, 0))
        bench.add(reply, Nat(BACKEND, CLIENT, 8080, port, 1, 1, flags, seen, bench.now, 0))
    rows = flows_of(list(bench.maps["conntrack"].items()), Timeouts(), bench.now, {})
    keys = {row.client: set(found) for row, found in rows}
    assert len(keys["1.1.1.1:6"]) == 4
    assert len(keys["1.1.1.1:5"]) == 3
    assert not keys["1.1.1.1:5"] & keys["1.1.1.1:6"]


def test_replaced_reply_entry_is_not_of_the_closed_flow(bench: Bench) -> None:
    """A later flow of the same client port and backend through another frontend replaces reply and masquerade entries."""
    bench.pair(5, seen=Seen.REPLY | BOTH_FIN)
    other = Flow(CLIENT, OTHER_FRONTEND, 5, 80, 6, False)
    bench.add(other, Nat(CLIENT, BACKEND, 5, 8080, 2, 1, NatFlags(0), Seen.REPLY, bench.now, 0))
    reply = Flow(BACKEND, CLIENT, 8080, 5, 6, True)
    bench.add(reply, Nat(OTHER_FRONTEND, CLIENT, 80, 5, 2, 1, NatFlags.REPLY, Seen.REPLY, bench.now, 0))
    source = Flow(CLIENT, BACKEND, 5, 8080, 6, True)
    bench.add(source, Nat(NODE, BACKEND, 999, 8080, 2, 1, NatFlags.SOURCE, Seen.REPLY, bench.now, 0))
    rows = flows_of(list(bench.maps["conntrack"].items()), Timeouts(), bench.now, {})
    found = {row.frontend: (row.state, row.masquerade, len(keys)) for row, keys in rows}
    assert found == {
        "2.2.2.2:80": ("TIME_WAIT", "", 1),
        "2.2.2.9:80": ("ESTABLISHED", "4.4.4.4:999", 3),
    }


def test_states_have_the_names_of_netfilter() -> None:
    names = [state_of(Protocol.TCP, seen) for seen in (0, Seen.REPLY, Seen.FIN, BOTH_FIN, Seen.RST)]
    assert names == ["SYN_SENT", "ESTABLISHED", "CLOSE_WAIT", "TIME_WAIT", "CLOSE"]
    assert [state_of(Protocol.UDP, seen) for seen in (0, Seen.REPLY)] == ["UNREPLIED", "REPLIED"]


@pytest.mark.parametrize(
    ("protocol", "seen", "acked", "removed", "timeouts"),
    [
        (Protocol.TCP, NOTHING, 0, False, 1),
        (Protocol.TCP, Seen.REPLY, 0, False, 0),
        # The entry of the reply was lost, and made again: the client has acknowledged something.
        (Protocol.TCP, NOTHING, 9, False, 0),
        (Protocol.TCP, Seen.RST, 0, False, 0),
        (Protocol.TCP, NOTHING, 0, True, 0),
        (Protocol.UDP, NOTHING, 0, False, 0),
    ],
)
def test_connections_that_expire_without_a_reply_are_measured(
    pins: Path, protocol: int, seen: Seen, acked: int, removed: bool, timeouts: int
) -> None:
    opened = maps.open_or_create(pins, Capacity(conntrack=1024))
    made = Bench(opened, msgspec.structs.replace(OPTIONS, measure_connections=True))
    made.pair(1000, protocol=protocol, seen=seen, idle=90000, ids=(4, 7), acked=acked)
    if removed:
        made.remove(BackendUse(4, 7))
    assert made.sweeper.sweep().entries == 0
    assert measures.failures(opened) == ({ServiceBackend(4, 7): (0, timeouts, 0)} if timeouts else {})
    assert {number: each.failures for number, each in measures.connects(opened).items()} == (
        {4: (0, timeouts, 0)} if timeouts else {}
    )
    made.sweeper.close()
    opened.close()
