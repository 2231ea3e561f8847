"""Large arrays of which an agent maps only the part that is in use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.schema import MapSpec
from ebpfproxy.datapath.drift.repair import repair
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.bpf_map import SharedArray
from ebpfproxy.services.model import Policy
from tests.datapath.writing import Bench, port

pytestmark = pytest.mark.root

SPEC = MapSpec("partly", uapi.MAP_ARRAY, 4, 64, 4096, uapi.F_MMAPABLE)
STEP, OWNED = 1024, 20


@pytest.fixture
def array() -> Iterator[SharedArray]:
    fd = bpf.map_create(
        SPEC.kind, SPEC.name, SPEC.key_size, SPEC.value_size, SPEC.max_entries, flags=SPEC.flags
    )
    found = SharedArray(fd, SPEC, STEP)
    yield found
    found.close()


@pytest.fixture
def whole(array: SharedArray) -> Iterator[SharedArray]:
    """Returns the same array as another process has it."""
    found = SharedArray(os.dup(array.fd), SPEC)
    yield found
    found.close()


def test_more_is_mapped_step_by_step(array: SharedArray, whole: SharedArray) -> None:
    former = array.bytes
    assert len(former) == STEP * SPEC.value_size
    assert not array.reach(STEP)
    assert array.reach(STEP + 1)
    assert len(array.bytes) == 2 * STEP * SPEC.value_size
    former[5] = 7
    array.bytes[STEP * SPEC.value_size] = 9
    assert (array.bytes[5], whole.bytes[5], whole.bytes[STEP * SPEC.value_size]) == (7, 7, 9)
    assert array.reach(SPEC.max_entries)
    assert len(array.bytes) == len(whole.bytes)


@pytest.mark.parametrize("number", [0, STEP - 1, STEP, SPEC.max_entries - 1])
def test_what_is_not_mapped_is_compared_and_restored(
    array: SharedArray, whole: SharedArray, number: int
) -> None:
    array.keep(OWNED)
    assert list(array.differing()) == []
    whole.bytes[number * SPEC.value_size] = 1
    (part,) = array.differing()
    assert part.start <= number * OWNED < part.stop
    assert len(array.bytes) == STEP * SPEC.value_size, "to compare maps nothing for good"
    array.restore(number * OWNED)
    assert whole.bytes[number * SPEC.value_size] == 0
    assert list(array.differing()) == []
    assert array.reach(STEP + 1), "whoever maps more is told of it"


def test_service_grows_to_places_that_were_repaired(bench: Bench) -> None:
    """Somebody has written beyond the places that were in use, and the agent has written back what they had."""
    assert bench.empty(Capacity(conntrack=1024)).apply([port("a", range(8))], complete=True) == []
    assert bench.maps is not None
    for name, number in (("backends", 17_000), ("slots", 140_000), ("selections", 20_000)):
        table = bench.maps[name]
        table.update(number.to_bytes(4, sys.byteorder), b"\xff" * table.spec.value_size)
    found = bench.drift()
    assert {each.map for each in found} == {"backends", "slots", "selections"}
    assert len(repair(bench.maps, found)) == len(found)
    assert bench.drift() == []
    assert bench.writer.apply([port("a", range(20_000))]) == []
    assert bench.drift() == []
    assert bench.writer.backends == 20_000


def test_service_with_more_backends_than_are_mapped_at_first(bench: Bench) -> None:
    """Commands map everything, and the next agent finds everything."""
    count = 20_000
    wanted = port("a", range(count))
    assert bench.empty(Capacity(conntrack=1024)).apply([wanted], complete=True) == []
    assert bench.maps is not None
    seen = maps.open_pinned(bench.maps.folder)
    assert seen.backends().ids() == list(range(count))
    assert seen.backends().read(count - 1) == bench.maps.backends().read(count - 1)
    seen.close()
    assert bench.drift() == []
    (number,) = bench.service_ids.values()
    slots = bench.slots(number, Policy.CLUSTER)
    assert len(slots) == count
    writer = bench.reopen()
    before = bench.writes()
    assert writer.apply([wanted], complete=True) == []
    assert bench.writes() == before
    assert bench.slots(number, Policy.CLUSTER) == slots
