"""Sweeps of the flow filter, by which programs skip conntrack lookups."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi.flow_layout import Flow, Nat, NatFlags, Seen, pack_flow, pack_nat
from ebpfproxy.datapath.abi.schema import FLOW_FILTER_BITS, FLOW_MARKS
from ebpfproxy.datapath.flows.map_migration import _merge_filters
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.datapath.test_conntrack import Bench, S
from tests.datapath.test_pressure import OnOtherCpu

pytestmark = pytest.mark.root

SIZE = 1 << FLOW_FILTER_BITS


@pytest.fixture
def bench(pins: Path) -> Iterator[Bench]:
    opened = maps.open_or_create(pins, Capacity(conntrack=8192))
    made = Bench(opened)
    yield made
    made.sweeper.close()
    opened.close()


def filter_of(opened: MapSet) -> memoryview:
    return opened.shared("flow_filter").bytes[:SIZE]


def used(opened: MapSet) -> set[int]:
    return {place for place, marks in enumerate(filter_of(opened)) if marks}


def add_flows(bench: Bench, clients: range, idle: int = 0) -> None:
    for number in clients:
        client = struct.pack(">I", 0x64000000 + number)
        flow = Flow(client, bytes((2, 2, 2, 2)), 1024, 80, 17, egress=False)
        last = bench.now - idle * S
        bench.add(flow, Nat(client, bytes((3, 3, 3, 3)), 1024, 8080, 1, 1, NatFlags(0), Seen(0), last, last))


def test_marks_without_an_entry_are_cleared_after_two_sweeps(bench: Bench) -> None:
    add_flows(bench, range(1000))
    filter_of(bench.maps)[:] = bytes((FLOW_MARKS,)) * SIZE
    bench.sweeper.sweep()
    assert len(used(bench.maps)) == SIZE
    bench.sweeper.sweep()
    needed = used(bench.maps)
    assert 980 < len(needed) <= 1000
    # Each entry has its own byte, so that half of the entries need half of the bytes.
    for key in list(dict(bench.maps["conntrack"].items()))[500:]:
        bench.maps["conntrack"].delete(key)
    for _ in range(2):
        bench.sweeper.sweep()
    rest = used(bench.maps)
    assert rest < needed
    assert 490 < len(rest) <= 500


def test_remaining_entry_has_a_mark_at_all_times(bench: Bench) -> None:
    """Neither a program that finds both marks nor an interrupted sweep changes this."""
    add_flows(bench, range(1000))
    for _ in range(2):
        bench.sweeper.sweep()
    needed = used(bench.maps)
    for marks in (1, 2, FLOW_MARKS):
        for place in needed:
            filter_of(bench.maps)[place] = marks
        for _ in range(3):
            bench.sweeper.sweep()
            assert used(bench.maps) == needed
    # The next agent may start with the mark that the previous one has set last.
    again = Bench(bench.maps)
    for sweeper in (again.sweeper, bench.sweeper, again.sweeper, again.sweeper):
        sweeper.sweep()
        assert used(bench.maps) == needed
    again.sweeper.close()


def test_both_marks_of_a_host_flow_are_kept(bench: Bench) -> None:
    """The flow may have begun at loopback, where the mark depends on the destination port, or at another device."""
    host = bytes((127, 0, 0, 1))
    for port in range(10):
        flow = Flow(host, host, 40000, 30000 + port, 6, egress=True)
        key = pack_flow(flow)
        nat = Nat(host, bytes((3, 3, 3, 3)), 1024, 80, 1, 1, NatFlags.HOST, Seen(0), bench.now, bench.now)
        bench.maps["conntrack"].update(key, pack_nat(key, nat))
    bench.sweeper.sweep()
    assert len(used(bench.maps)) == 11


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_map_migration_loses_no_mark_that_a_program_sets(pins: Path) -> None:
    old, new = (maps.open_or_create(pins, Capacity(conntrack=size)) for size in (1024, 2048))
    places = random.sample(range(SIZE), 4096)
    for place in places[::2]:
        filter_of(old)[place] = 1
    ours = filter_of(new)

    def set_marks() -> None:
        for place in places[1::2]:
            ours[place] = FLOW_MARKS
            assert ours[place] == FLOW_MARKS

    with OnOtherCpu(max(os.sched_getaffinity(0)), set_marks):
        for _ in range(100):
            _merge_filters(old, new)
            assert used(new) >= set(places[::2])
    assert used(new) == set(places)
    for opened in (old, new):
        opened.close()
