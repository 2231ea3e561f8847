"""Counters of service ports by id: rows of CPUs, and reused ids."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import PACKETS
from ebpfproxy.datapath.abi.layout import CHOICE_ROWS, REJECTIONS, U32, U64, cpus_of_a_row_shift
from ebpfproxy.datapath.abi.schema import map_specs
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.services.counters import ServiceCounts
from tests.datapath.test_loading import OPTIONS
from tests.datapath.writing import SMALL, Bench, port

#: No multiple of a page's words.
SERVICES = 600
CPUS = (1, 2, 3, 15, 16, 17, 64, 128, 129, 8192)


def row_of(cpu: int, cpus: int) -> int:
    """Returns the row as programs compute it (lib/service.h, count_service())."""
    return (cpu >> cpus_of_a_row_shift(cpus)) % CHOICE_ROWS


@pytest.mark.parametrize("cpus", CPUS)
def test_adjacent_cpus_share_a_row_evenly(cpus: int) -> None:
    rows = [row_of(cpu, cpus) for cpu in range(cpus)]
    assert rows == sorted(rows)
    assert max(rows) < CHOICE_ROWS
    assert max(Counter(rows).values()) <= max(1, 2 * cpus // CHOICE_ROWS)


@pytest.mark.parametrize("cpus", CPUS)
def test_memory_of_counters_does_not_grow_with_cpus(cpus: int) -> None:
    """docs/performance.md states the sums for 128 CPUs."""
    specs = {spec.name: spec for spec in map_specs(Capacity())}
    by_cpu = [spec for spec in specs.values() if spec.kind == uapi.MAP_PERCPU_ARRAY]
    assert sum(spec.value_size * spec.max_entries for spec in by_cpu) * cpus <= 1024 * cpus
    counted = ("service_choices", "service_rejections")
    assert sum(specs[name].value_size * specs[name].max_entries for name in counted) == 9 << 20


@pytest.fixture
def opened(pins: Path) -> Iterator[MapSet]:
    made = maps.open_or_create(pins, Capacity(services=SERVICES, backends=1))
    yield made
    made.close()


def choose(opened: MapSet, number: int, cpu: int, cpus: int, times: int) -> None:
    """Counts as a program does on one of ``cpus`` CPUs."""
    services = opened["service_rejections"].spec.max_entries
    key = U32.pack(row_of(cpu, cpus) * services + number)
    before = opened["service_choices"].lookup(key)
    assert before is not None
    opened["service_choices"].update(key, U64.pack(U64.unpack(before)[0] + times))


def reject(opened: MapSet, number: int, refused: int, dropped: int) -> None:
    opened["service_rejections"].update(U32.pack(number), REJECTIONS.pack(refused, dropped))


@pytest.mark.root
@pytest.mark.parametrize("cpus", CPUS)
def test_counts_of_all_cpus_are_added(opened: MapSet, cpus: int) -> None:
    counts = ServiceCounts(opened)
    assert list(counts.read([])) == list(counts.read(range(SERVICES))) == []
    for cpu in range(cpus):
        choose(opened, 3, cpu, cpus, 5)
    choose(opened, SERVICES - 1, cpus - 1, cpus, 2)
    reject(opened, 3, 6, 7)
    reject(opened, 200, 0, 1)
    assert list(counts.read({SERVICES - 1, 3, 200, 4})) == [
        (3, (5 * cpus, 6, 7)),
        (200, (0, 0, 1)),
        (SERVICES - 1, (2, 0, 0)),
    ]
    assert list(counts.read({4})) == []


@pytest.mark.root
@pytest.mark.parametrize("cpus", [2, 16, 128, 8192])
def test_programs_count_in_the_row_of_their_cpu(
    own_bench: Bench, monkeypatch: pytest.MonkeyPatch, cpus: int
) -> None:
    """The program believes that the machine has ``cpus`` possible CPUs."""
    own_bench.writer.apply([port("a", [1])], complete=True)
    assert own_bench.maps is not None
    monkeypatch.setattr(bpf, "possible_cpus", lambda: cpus)
    folder = loader.ensure_loaded(own_bench.maps, OPTIONS, (PACKETS,))
    monkeypatch.undo()
    program = bpf.get_pinned(folder / "from_device")
    allowed = os.sched_getaffinity(0)
    try:
        for n, cpu in enumerate(sorted(allowed)):
            os.sched_setaffinity(0, {cpu})
            packet = Ether(dst="00:00:00:00:00:00") / IP(src="198.51.100.7", dst="10.96.0.97")
            bpf.prog_run(program, raw(packet / TCP(sport=2000 + n, dport=80, flags="S") / bytes(20)))
    finally:
        os.sched_setaffinity(0, allowed)
        os.close(program)
    wanted = Counter(row_of(cpu, cpus) for cpu in allowed)
    services = SMALL.services
    values = (
        own_bench.maps["service_choices"].lookup(U32.pack(row * services)) for row in range(CHOICE_ROWS)
    )
    assert [U64.unpack(value or b"")[0] for value in values] == [wanted[row] for row in range(CHOICE_ROWS)]
    assert list(ServiceCounts(own_bench.maps).read([0])) == [(0, (len(allowed), 0, 0))]
    assert own_bench.maps.loads()[0].chosen == len(allowed)


@pytest.mark.root
def test_counters_of_a_reused_id_restart_at_zero_and_others_are_kept(opened: MapSet) -> None:
    counts = ServiceCounts(opened)
    for number in (0, 1, 2):
        for cpu in (0, 127):
            choose(opened, number, cpu, 128, 5)
        reject(opened, number, 6, 7)
    counts.clear(1)
    assert list(counts.read(range(3))) == [(0, (10, 6, 7)), (2, (10, 6, 7))]
    choose(opened, 1, 9, 128, 1)
    assert dict(ServiceCounts(opened).read(range(3)))[1] == (1, 0, 0)


@pytest.mark.root
def test_time_and_memory_of_a_scrape_follow_the_ids_in_use(pins: Path) -> None:
    """All of 128 CPUs have counted; the capacity is the default."""
    made = maps.open_or_create(pins, Capacity(backends=1, slots=1))
    used, all_ = range(100), range(Capacity().services)
    size = 8 * CHOICE_ROWS * len(all_)
    # Maps of another test may be left.
    mapped = _mapped_sizes().count(size)
    counts = ServiceCounts(made)

    def seconds(numbers: range) -> float:
        began = time.thread_time()
        assert list(counts.read(numbers)) == [(number, (128, 0, 0)) for number in used]
        return time.thread_time() - began

    try:
        for number in used:
            for cpu in range(128):
                choose(made, number, cpu, 128, 1)
        assert min(seconds(used) for _ in range(5)) * 20 < min(seconds(all_) for _ in range(3))
        # The array is mapped for the moment of a reading only: else all of it would count as memory.
        assert _mapped_sizes().count(size) == mapped
    finally:
        made.close()


def _mapped_sizes() -> list[int]:
    """Returns the sizes of the BPF maps in the memory of this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "bpf-map" in line]
    ends = (line.split()[0].split("-") for line in lines)
    return [int(end, 16) - int(start, 16) for start, end in ends]
