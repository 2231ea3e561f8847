"""Drift of maps: what differs is found and repaired, and what the agent itself writes is none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import U32, U64
from ebpfproxy.datapath.drift.checker import Checker
from ebpfproxy.datapath.drift.compare import Difference, Kind, differences, differing_elements, digest
from ebpfproxy.datapath.drift.repair import ORDER, repair
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.node.client_namespaces import ClientNamespaces
from ebpfproxy.datapath.node.packets import PacketPath
from ebpfproxy.services.model import Algorithm, Prefix
from tests.datapath.writing import FEW_IDS, Bench, port

ENTRIES = [(bytes([n]), bytes([n, n])) for n in range(200)]


def test_digest_is_the_same_in_any_order_and_of_no_other_entries() -> None:
    shuffled = random.Random(1).sample(ENTRIES, len(ENTRIES))
    assert digest(shuffled) == digest(ENTRIES)
    assert digest(ENTRIES[1:]) != digest(ENTRIES)
    assert digest([*ENTRIES[1:], (b"\0", b"\0\1")]) != digest(ENTRIES)
    for n in range(100):
        a, b, one, two = (bytes([n, each]) for each in range(4))
        assert digest([(a, one), (b, two)]) != digest([(a, two), (b, one)])


def test_each_kind_of_difference_is_told() -> None:
    wanted = {b"a": b"1", b"b": b"2", b"c": b"3"}
    found = [(b"a", b"1"), (b"b", b"9"), (b"d", b"4"), (b"b", b"9"), (b"a", b"1")]
    assert list(differences("m", wanted, found)) == [
        Difference("m", Kind.CHANGED, b"b", b"2", b"9"),
        Difference("m", Kind.FOREIGN, b"d", None, b"4"),
        Difference("m", Kind.MISSING, b"c", b"3", None),
    ]
    assert list(differences("m", wanted, wanted.items())) == []


def test_elements_of_an_array_differ_by_their_offset() -> None:
    wanted, found = b"\1\1\0\0\3\3\4\4", b"\1\1\2\2\0\0\4\5"
    at = [(10 + n).to_bytes(8, "big") for n in range(0, 8, 2)]
    assert list(differing_elements("m", 10, 2, wanted, found)) == [
        Difference("m", Kind.FOREIGN, at[1], b"\0\0", b"\2\2"),
        Difference("m", Kind.MISSING, at[2], b"\3\3", b"\0\0"),
        Difference("m", Kind.CHANGED, at[3], b"\4\4", b"\4\5"),
    ]


# -- on real maps


class Drifting:
    """A writer's maps, all that others write of them, and a checker."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        bench.empty(FEW_IDS)
        assert bench.maps is not None
        self.maps: MapSet = bench.maps
        self.packets = PacketPath(self.maps, bench.pins, tcx=True, loopback=False)
        self.packets.set_devices([], b"\x0a\0\0\1", b"")
        self.packets.cidrs.set_services([Prefix(b"\x0a\x60\0\0", 16)], [b"\x0a\x60\0\7"])
        self.clients = ClientNamespaces(self.maps)
        self.clients.set({b"\x0a\xf4\1\2": 4711})
        owned = [*bench.writer.owned(), *self.packets.owned(), self.clients.owned()]
        self.checker = Checker(self.maps, owned)

    def check(self) -> list[Difference]:
        checker = self.checker
        return checker.confirm(checker.read(checker.begin(), lambda: None))

    def filled(self) -> None:
        prefix = Prefix(bytes([192, 0, 2, 0]), 24)
        writer = self.bench.writer
        ports = [
            msgspec.structs.replace(port("a", [1, 2], [1], affinity=60), source_ranges=(prefix,)),
            port("b", [2, 3], weights={2: 2}),
            port("c", [1, 2, 3], algorithm=Algorithm.MAGLEV),
        ]
        writer.apply(ports, complete=True)
        writer.set_node_addresses(frozenset({bytes([10, 0, 0, 1])}))
        writer.set_own_addresses(frozenset({bytes([10, 0, 0, 1])}), frozenset())
        writer.apply([port("b", [2])])


@pytest.fixture
def drifting(bench: Bench) -> Iterator[Drifting]:
    made = Drifting(bench)
    made.filled()
    yield made
    # They refer to the arrays' memory.
    del made.maps, made.packets, made.clients, made.checker
    bench.empty()


@pytest.mark.root
def test_maps_as_the_agent_has_written_them_have_no_drift(drifting: Drifting) -> None:
    assert drifting.check() == []
    assert set(drifting.checker.names) == set(ORDER)
    assert drifting.check() == []


TABLES = (
    "services4",
    "service_names",
    "members",
    "source_ranges",
    "departures",
    "node_addresses",
    "devices",
    "client_namespaces",
    "cidrs",
)
_FOREIGN_KEYS = {
    "services4": layout.pack_service_key(bytes([10, 96, 9, 9]), 80, 6, 0),
    "source_ranges": layout.pack_source_range(0, Prefix(bytes([198, 51, 100, 0]), 24)),
    "cidrs": U32.pack(128) + b"\xfd" + bytes(15),
}


@pytest.mark.root
@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("name", TABLES)
def test_an_entry_of_a_table_is_found_and_repaired(drifting: Drifting, name: str, kind: Kind) -> None:
    table = drifting.maps[name]
    before = dict(table.items())
    if kind is Kind.FOREIGN:
        key = _FOREIGN_KEYS.get(name, b"\x77" * table.spec.key_size)
        value = b"\1" * table.spec.value_size
        bpf.map_update(table.fd, key, value)
        wanted = None
    else:
        key, wanted = next(iter(before.items()))
        value = bytes([wanted[0] ^ 1]) + wanted[1:]
        if kind is Kind.MISSING:
            assert bpf.map_delete(table.fd, key)
        else:
            bpf.map_update(table.fd, key, value)
    found = drifting.check()
    seen = None if kind is Kind.MISSING else value
    assert found == [Difference(name, kind, key, wanted, seen)]
    assert drifting.check() == found, "nothing is repaired by looking"
    assert repair(drifting.maps, found) == found
    assert dict(table.items()) == before
    assert drifting.check() == []


@pytest.mark.root
def test_the_writer_goes_on_from_what_it_knows(drifting: Drifting) -> None:
    """Deleting what somebody has deleted already, and replacing what somebody has changed, is no drift."""
    for key, _ in list(drifting.maps["services4"].items()):
        bpf.map_delete(drifting.maps["services4"].fd, key)
    drifting.bench.writer.apply([], complete=True)
    assert drifting.check() == []
    assert drifting.bench.rows == []


ARRAYS = ("selections", "slots", "backends", "epochs", "address_filter", "port_filter", "backend_ports")


@pytest.mark.root
@pytest.mark.parametrize("name", ARRAYS)
def test_elements_of_an_array_are_found_and_repaired(drifting: Drifting, name: str) -> None:
    array = drifting.maps.shared(name)
    before = bytes(array.bytes)
    size, step = array.kept_size, array.stride if array.spec.max_entries > 1 else 8
    used = next(at for at in range(0, len(before), step) if any(before[at : at + size])) // step
    free = next(at for at in range(0, len(before), step) if not any(before[at : at + size])) // step
    for at, value in ((used, bytes(size)), (free, b"\x55" * size)):
        array.bytes[at * step :][:size] = value
    found = drifting.check()
    assert {(each.map, each.kind, int.from_bytes(each.key, "big") // size) for each in found} == {
        (name, Kind.MISSING, used),
        (name, Kind.FOREIGN, free),
    }
    assert repair(drifting.maps, found) == found
    assert bytes(array.bytes) == before
    assert drifting.check() == []


@pytest.mark.root
def test_a_rewritten_selection_does_not_confuse_the_writer(drifting: Drifting) -> None:
    """What it frees and keeps follows from what it has written, not from what somebody else has."""
    words = drifting.maps.shared("selections").words()
    free = drifting.bench.writer.free_slots
    for at in range(6):
        words[at] = U64.unpack(U32.pack(7) + U32.pack(40))[0]
    assert drifting.bench.writer.apply([port("a", [1, 2], [1], affinity=60)]) == []
    assert drifting.bench.writer.free_slots == free
    assert repair(drifting.maps, drifting.check())
    assert drifting.check() == []


@pytest.mark.root
def test_a_table_that_changes_while_it_is_read_is_read_again(drifting: Drifting) -> None:
    checker, writer = drifting.checker, drifting.bench.writer
    for n in range(4):
        reading = checker.begin()
        writer.apply([port("a", [1], number=81 + n)])
        assert checker.confirm(checker.read(reading, lambda: None)) == []
        assert checker.is_unsettled == (n % 3 != 2)


@pytest.mark.root
def test_an_entry_without_room_stays_missing(pins: Path) -> None:
    opened = maps.open_or_create(pins, FEW_IDS)
    table = opened["node_addresses"]
    for n in range(table.spec.max_entries):
        table.update(n.to_bytes(16, "big"), U32.pack(1))
    missing = Difference("node_addresses", Kind.MISSING, b"\xff" * 16, U32.pack(1), None)
    assert repair(opened, [missing]) == []
    opened.close()


@pytest.mark.root
def test_what_programs_count_of_a_backend_is_no_drift_and_stays(drifting: Drifting) -> None:
    drifting.bench.count_open(0, 1, flow=True)
    array = drifting.maps.shared("backends")
    counted = bytes(array.bytes[layout.BACKEND.size : array.stride])
    assert any(counted)
    assert drifting.check() == []
    array.bytes[: layout.BACKEND.size] = bytes(layout.BACKEND.size)
    assert repair(drifting.maps, drifting.check())
    assert bytes(array.bytes[layout.BACKEND.size : array.stride]) == counted
    assert drifting.check() == []
