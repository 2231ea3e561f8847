"""Which entries a sweep ends: real maps, real batches, a clock of the test's own."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import flow_layout, layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, Entry, Flow, Nat, NatFlags, RemovalReason, Seen
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.flows.conntrack_table import UDPLITE, Timeouts, flows_of, state_of
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.flows.sweeper import Sweeper, pairs
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Family, Protocol

pytestmark = pytest.mark.root

S = 1_000_000_000
CLIENT, FRONTEND, BACKEND, NODE = (bytes(a) for a in ((1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3), (4, 4, 4, 4)))
NOTHING = Seen(0)
BOTH_FIN = Seen.FIN | Seen.REPLY_FIN


class Bench:
    def __init__(self, opened: MapSet) -> None:
        self.maps = opened
        self.now = 1_000_000 * S
        self.sweeper = Sweeper(opened, Timeouts(), clock=lambda: self.now)

    def add(self, flow: Flow, nat: Nat) -> tuple[bytes, bytes]:
        """Inserts one entry."""
        key, value = flow_layout.pack_flow(flow), pack_nat(nat)
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
    ) -> None:
        """Client to frontend and back, each half silent for so many seconds."""
        times = [self.now - int(i * S) for i in (idle, idle if reply_idle is None else reply_idle)]
        original = Flow(CLIENT, FRONTEND, port, 80, protocol, False)
        began = [each - int(lasted * S) for each in times]
        self.add(original, Nat(CLIENT, BACKEND, port, 8080, *ids, NatFlags(0), seen, times[0], began[0]))
        reply = Flow(BACKEND, CLIENT, 8080, port, protocol, True)
        back = Nat(FRONTEND, CLIENT, 80, port, *ids, NatFlags.REPLY, seen, times[1], began[1])
        self.add(reply, back._replace(seen=seen if reply_seen is None else reply_seen))

    @property
    def left(self) -> int:
        return self.maps["conntrack"].count()


def pack_nat(nat: Nat) -> bytes:
    """Packs it as programs do."""
    return struct.pack(
        "=16s16s2s2sIIBBHQQII",
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
    )


@pytest.fixture
def bench(pins: Path) -> Iterator[Bench]:
    opened = maps.open_or_create(pins, Capacity(conntrack=8192))
    yield Bench(opened)
    opened.close()


@pytest.mark.parametrize(
    ("protocol", "seen", "limit"),
    [
        (Protocol.TCP, Seen(0), 60),
        (Protocol.TCP, Seen.REPLY, 86400),
        (Protocol.TCP, Seen.REPLY | Seen.FIN, 3600),
        (Protocol.TCP, Seen.REPLY | Seen.REPLY_FIN, 3600),
        (Protocol.TCP, Seen.REPLY | BOTH_FIN, 30),
        (Protocol.TCP, Seen.REPLY | Seen.RST, 30),
        (Protocol.UDP, Seen(0), 30),
        (Protocol.UDP, Seen.REPLY, 120),
        (Protocol.SCTP, Seen.REPLY, 300),
    ],
)
def test_a_flow_lives_as_long_as_its_state_allows(
    bench: Bench, protocol: Protocol, seen: Seen, limit: float
) -> None:
    bench.pair(1, protocol=protocol, seen=seen, idle=limit - 1)
    bench.pair(2, protocol=protocol, seen=seen, idle=limit + 1)
    assert bench.sweeper.sweep().expired == 2
    assert bench.left == 2


def test_one_half_in_use_keeps_both(bench: Bench) -> None:
    """A stream of datagrams in one direction: the other half never sees a packet."""
    bench.pair(1, protocol=Protocol.UDP, idle=0, reply_idle=1000)
    bench.pair(2, protocol=Protocol.UDP, seen=Seen(0), idle=100, reply_seen=Seen.REPLY, reply_idle=100)
    assert bench.sweeper.sweep().expired == 0, "a reply in either half makes it a stream"
    bench.now += 60 * S
    assert bench.sweeper.sweep().expired == 4


def test_the_end_that_one_half_saw_ends_both(bench: Bench) -> None:
    bench.pair(1, seen=Seen.REPLY | Seen.RST, idle=40, reply_seen=Seen.REPLY, reply_idle=40)
    assert bench.sweeper.sweep().expired == 2


def test_a_half_without_its_other_ends_by_itself(bench: Bench) -> None:
    bench.add(
        Flow(CLIENT, FRONTEND, 9, 80, 6, False),
        Nat(CLIENT, BACKEND, 9, 8080, 1, 1, NatFlags(0), Seen(0), bench.now - 61 * S, 0),
    )
    assert bench.sweeper.sweep().expired == 1


def test_thousands_in_one_sweep(bench: Bench) -> None:
    for port in range(1, 2001):
        bench.pair(port, idle=61 if port % 2 else 0)
    found = bench.sweeper.sweep()
    assert (found.expired, found.entries, bench.left) == (2000, 2000, 2000)


def test_flows_of_a_removed_backend_end_at_once(bench: Bench) -> None:
    """Flows of one that is not ready end only if they have no connection."""
    for port, protocol in ((1, Protocol.TCP), (2, Protocol.UDP)):
        bench.pair(port, protocol=protocol, ids=(7, 1))
        bench.pair(port + 2, protocol=protocol, ids=(7, 2))
        bench.pair(port + 4, protocol=protocol, ids=(8, 1))
    removed = {
        BackendUse(7, 1): Removal(RemovalReason.GONE, 0),
        BackendUse(7, 2): Removal(RemovalReason.IDLE, 1),
    }
    swept = bench.sweeper.sweep(removed)
    assert (swept.expired, swept.removed) == (6, {Family.IPV4: 3})
    left = {flow_layout.unpack_flow(key).source_port for key, _ in bench.maps["conntrack"].items()} - {8080}
    assert left == {3, 5, 6}


def test_what_is_used_again_while_the_map_is_read_stays_whole(bench: Bench) -> None:
    """A port that is used again within the sweep: the same flow, or another one in its entries."""
    bench.pair(1, protocol=Protocol.UDP, idle=31)
    bench.pair(2, protocol=Protocol.UDP, idle=31)
    bench.pair(3, protocol=Protocol.UDP, ids=(7, 1))
    bench.pair(4, protocol=Protocol.UDP, ids=(7, 1))
    table = bench.maps["conntrack"]
    again = {2: NOTHING}

    def meanwhile() -> None:
        if again.pop(2, None) is not None:
            bench.pair(2, protocol=Protocol.UDP, idle=0, reply_idle=31)
            bench.pair(4, protocol=Protocol.UDP, ids=(7, 2))

    sweeper = Sweeper(bench.maps, Timeouts(), clock=lambda: bench.now, rest=meanwhile)
    swept = sweeper.sweep({BackendUse(7, 1): Removal(RemovalReason.GONE, 0)})
    assert swept.expired == 4
    left = {flow_layout.unpack_flow(key) for key, _ in table.items()}
    assert {flow.source_port for flow in left} - {8080} == {2, 4}
    assert len(left) == 4, "both halves"


def test_masquerades_go_after_their_flows() -> None:
    flow = Nat(CLIENT, BACKEND, 1, 8080, 1, 1, NatFlags(0), NOTHING, 0, 0)
    entries = []
    for flags in (NatFlags.SOURCE, NatFlags(0)):
        for port in (1, 2):
            key = flow_layout.pack_flow(Flow(CLIENT, FRONTEND, port, 80, 17, bool(flags)))
            original = Entry(key, pack_nat(flow._replace(source_port=port, flags=flags)))
            back = Nat(FRONTEND, CLIENT, 80, port, 1, 1, flags | NatFlags.REPLY, NOTHING, 0, 0)
            entries += [original, Entry(original.partner, pack_nat(back))]
    found = list(pairs(entries))
    assert [len(pair) for pair in found] == [2, 2, 2, 2]
    assert [bool(pair[0].flags & NatFlags.SOURCE) for pair in found] == [False, False, True, True]


def load(bench: Bench, number: int) -> layout.Load:
    words = bench.maps.shared("loads").bytes.cast("I")
    return layout.load_of(words[number * layout.LOAD_WORDS : (number + 1) * layout.LOAD_WORDS])


def test_flows_that_are_over_are_no_load(bench: Bench) -> None:
    """Programs count each when it begins; only the sweep knows of one that ends without a packet."""
    words = bench.maps.shared("loads").bytes.cast("I")
    for port in range(10):
        bench.pair(port + 1, protocol=Protocol.UDP, idle=1000 if port < 4 else 0, ids=(7, 3))
    words[3 * layout.LOAD_WORDS + layout.LOAD_BEGUN] = 10
    bench.sweeper._busy = {3}
    assert load(bench, 3).open_flows == 10
    bench.sweeper.sweep(backends=8)
    assert load(bench, 3).open_flows == 6
    bench.sweeper.sweep({BackendUse(7, 3): Removal(RemovalReason.GONE, 0)}, backends=8)
    assert load(bench, 3).open_flows == 0


def test_a_count_that_cannot_be_right_is_put_right(bench: Bench) -> None:
    """Flows may be evicted, counted twice, or copied from other maps."""
    words = bench.maps.shared("loads").bytes.cast("I")
    bench.pair(1, ids=(7, 2))
    bench.pair(2, ids=(7, 4))
    bench.pair(3, ids=(7, 4), seen=Seen.REPLY | Seen.RST)
    words[1 * layout.LOAD_WORDS + layout.LOAD_BEGUN] = 5
    words[2 * layout.LOAD_WORDS + layout.LOAD_ENDED] = 1
    words[4 * layout.LOAD_WORDS + layout.LOAD_ENDED] = 7
    words[1 * layout.LOAD_WORDS + layout.LOAD_CORRECTED] = 0
    bench.pair(5, ids=(7, 1), seen=Seen(0), idle=1000)
    for _ in range(2):
        bench.sweeper.sweep(backends=8)
    assert [load(bench, number).open_flows for number in (1, 2, 4)] == [0, 1, 1]


def test_what_vanishes_without_being_deleted_was_evicted(bench: Bench) -> None:
    bench.sweeper.sweep()
    cpus = len(bench.maps["packet_events"].zero) // 8
    made = struct.pack("=Q", 10) + bytes(8 * (cpus - 1))
    bench.maps["packet_events"].update(layout.U32.pack(PacketEvent.FLOWS_MADE), made)
    bench.pair(1)
    assert bench.sweeper.sweep().evicted == 8
    assert bench.sweeper.sweep().evicted == 0


@pytest.mark.parametrize("protocol", [Protocol.UDP, UDPLITE])
def test_one_datagram_and_its_answer_are_no_stream(bench: Bench, protocol: int) -> None:
    """Netfilter does the same: flows of resolvers would take all ports if they had the longer time-out."""
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


def test_a_masquerade_stays_as_long_as_its_flow(bench: Bench) -> None:
    """Its entries may have missed, by a moment, the packet that made the flow a stream."""
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


def test_partners_find_each_other_in_every_kind_of_pair() -> None:
    for flags, other_stage in ((NatFlags(0), True), (NatFlags.BYPASS, False), (NatFlags.HOST, True)):
        flow = Flow(CLIENT, FRONTEND, 1, 2, 6, False)
        key = flow_layout.pack_flow(flow)
        value = pack_nat(Nat(NODE, BACKEND, 3, 4, 1, 1, flags, Seen(0), 0, 0))
        partner = flow_layout.unpack_flow(Entry(key, value).partner)
        assert partner == Flow(BACKEND, NODE, 4, 3, 6, other_stage)


def test_the_four_entries_of_a_masqueraded_flow_are_one_row(bench: Bench) -> None:
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


def test_states_have_netfilters_names() -> None:
    names = [state_of(Protocol.TCP, seen) for seen in (0, Seen.REPLY, Seen.FIN, BOTH_FIN, Seen.RST)]
    assert names == ["SYN_SENT", "ESTABLISHED", "CLOSE_WAIT", "TIME_WAIT", "CLOSE"]
    assert [state_of(Protocol.UDP, seen) for seen in (0, Seen.REPLY)] == ["UNREPLIED", "REPLIED"]
