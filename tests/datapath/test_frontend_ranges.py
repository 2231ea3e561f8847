"""What the agent has a program cache of a frontend's range (``cache_frontend`` in bpf/records.c)."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.hooks import RECORDS
from ebpfproxy.datapath.abi.layout import RANGE_GENERATIONS, U32, ServiceEntry, ServiceFlags
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.kernel import bpf, maps, probe
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.services import frontend_cache
from ebpfproxy.services.model import Algorithm, FrontendKind, Policy

pytestmark = pytest.mark.root

OF_BACKENDS = 1 << 31
BASE = 1000


class Cache:
    def __init__(self, opened: MapSet, programs: RecordPrograms) -> None:
        self.maps, self.programs = opened, programs

    def fill(self) -> None:
        frontend_cache.renew_frontends(self.maps)
        self.programs.cache(frontend_cache.frontends_to_cache(self.maps))

    def lines(self) -> list[tuple[int, ...]]:
        cached = self.maps["frontend_cache"]
        return [struct.unpack("=8Q", value) for _, value in cached.items() if any(value)]

    def set_range(self, service_id: int, policy: Policy, ids: list[int]) -> None:
        view = self.maps.selections()
        view.write_slots(BASE, array("Q", ids))
        view.set_range(service_id, policy, (BASE, len(ids)))
        frontend_cache.renew_ranges(self.maps, [service_id])

    def clear(self) -> None:
        for name in ("services4", "services6"):
            table = self.maps[name]
            table.delete_many([key for key, _ in table.items()])
        cached = self.maps["frontend_cache"]
        for key in [key for key, value in cached.items() if any(value)]:
            bpf.map_update(cached.fd, key, bytes(cached.spec.value_size))


@pytest.fixture(scope="module")
def filled(module_pins: Path) -> Iterator[Cache]:
    opened = maps.open_or_create(module_pins, Capacity(services=1024))
    options = loader.Options(features=probe.probe(), host_netns_cookie=1)
    programs = RecordPrograms(loader.ensure_loaded(opened, options, (RECORDS,)))
    yield Cache(opened, programs)
    programs.close()
    opened.close()


@pytest.fixture
def cache(filled: Cache) -> Iterator[Cache]:
    yield filled
    filled.clear()


def entry(service_id: int, algorithm: Algorithm, flags: int = 0) -> bytes:
    return layout.pack_service(
        *ServiceEntry(service_id, ServiceFlags(flags), FrontendKind.CLUSTER_IP, algorithm, 0)
    )


@pytest.mark.parametrize("address", [bytes((10, 96, 0, 1)), bytes(15) + b"\7"])
@pytest.mark.parametrize(
    ("algorithm", "ids", "is_of_backends"),
    [
        (Algorithm.RANDOM, [5], True),
        (Algorithm.RANDOM, [5, 6, 7], True),
        (Algorithm.ROUND_ROBIN, list(range(40, 56)), True),
        (Algorithm.RANDOM, list(range(40, 57)), False),  # more than are compared
        (Algorithm.RANDOM, [5, 7], False),
        (Algorithm.RANDOM, [5, 5, 6], False),  # by weight
        (Algorithm.RANDOM, [7, 6], False),
        (Algorithm.LEAST_CONNECTIONS, [5, 6, 7], False),  # compares loads and weights
        (Algorithm.NEVER_QUEUE, [5], False),
        (Algorithm.MAGLEV, [5, 6, 7], True),
        (Algorithm.RANDOM, [], False),
    ],
)
def test_range_of_successive_backends_has_their_ids(
    cache: Cache, address: bytes, algorithm: Algorithm, ids: list[int], is_of_backends: bool
) -> None:
    key = layout.pack_service_key(address, 80, 6, layout.Scope.INTERNAL)
    table = cache.maps["services4" if len(address) == 4 else "services6"]
    table.update(key, entry(9, algorithm))
    cache.set_range(9, Policy.CLUSTER, ids)
    cache.fill()
    (line,) = cache.lines()
    base, count = layout.selection_range(line[6])
    wanted = (ids[0], len(ids) | OF_BACKENDS) if is_of_backends else (BASE, len(ids))
    assert (base, count) == wanted


def test_range_is_that_of_the_frontend_s_policy(cache: Cache) -> None:
    key = layout.pack_service_key(bytes((10, 96, 0, 1)), 80, 6, layout.Scope.INTERNAL)
    cache.maps["services4"].update(key, entry(9, Algorithm.RANDOM, ServiceFlags.LOCAL))
    cache.set_range(9, Policy.LOCAL, [3, 9])
    cache.fill()
    (line,) = cache.lines()
    assert layout.selection_range(line[6]) == (BASE, 2)


def test_only_what_sockets_look_for_is_cached(cache: Cache) -> None:
    """Neither frontends of clients outside, nor the entry for a cluster IP's other ports."""
    address = bytes((10, 96, 0, 1))
    table = cache.maps["services4"]
    table.update(layout.pack_service_key(address, 80, 6, layout.Scope.EXTERNAL), entry(9, Algorithm.RANDOM))
    table.update(*layout.pack_cluster_ip(address))
    cache.fill()
    assert cache.lines() == []


def test_all_of_more_frontends_than_a_packet_has_room_for_are_cached(cache: Cache) -> None:
    """But for those whose lines others have."""
    number = layout.FRONTENDS_READ * 5 + 1
    keys = [
        layout.pack_service_key(U32.pack(number)[::-1], 80, 6, layout.Scope.INTERNAL)
        for number in range(1, number + 1)
    ]
    cache.maps["services4"].update_many(dict.fromkeys(keys, entry(9, Algorithm.RANDOM)))
    cache.fill()
    assert number / 2 < len(cache.lines()) <= number


def test_generations_of_ranges_are_each_of_some_services(cache: Cache) -> None:
    words = cache.maps.shared("range_generations").words()
    before = [word & ~1 for word in words[2:5]]
    frontend_cache.renew_ranges(cache.maps, [3, 3 + RANGE_GENERATIONS, 4])
    assert [now - then for now, then in zip(words[2:5], before, strict=True)] == [0, 2, 2]
    frontend_cache.renew_ranges(cache.maps)
    assert [now - then for now, then in zip(words[2:5], before, strict=True)] == [2, 4, 4]


def test_nothing_is_cached_while_it_is_being_changed(cache: Cache) -> None:
    """An agent that is killed then leaves the marks, and lines that do not count; its successor ends that."""
    key = layout.pack_service_key(bytes((10, 96, 0, 1)), 80, 6, layout.Scope.INTERNAL)
    cache.maps["services4"].update(key, entry(9, Algorithm.RANDOM))
    cache.set_range(9, Policy.CLUSTER, [5])
    of_frontends, of_ranges = (
        cache.maps.shared(name).words() for name in ("frontend_generation", "range_generations")
    )
    of_frontends[0] |= 1
    cache.programs.cache(frontend_cache.frontends_to_cache(cache.maps))
    assert cache.lines() == []
    of_ranges[9] |= 1
    cache.fill()
    assert of_frontends[0] & 1 == 0
    ((*_, range_word, range_check),) = cache.lines()
    assert (range_word, range_check) == (0, 0)
    frontend_cache.renew_ranges(cache.maps)
    assert of_ranges[9] & 1 == 0
    cache.fill()
    ((*_, range_word, range_check),) = cache.lines()
    assert layout.selection_range(range_word) == (5, 1 | OF_BACKENDS)
    assert range_check
