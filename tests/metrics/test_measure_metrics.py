"""Metrics of measured connections: no counter ever falls, and together they have everything once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from ebpfproxy.config.datapath import BPFFS
from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32, pack_name
from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, CONNECT_FAILURES, CONNECTS, TRAFFIC
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.roots import ensure_bpffs
from ebpfproxy.metrics.measure_metrics import MeasureCollector, Split
from ebpfproxy.services.model import Backend, BackendState, Family, Protocol, ServicePortKey
from tests.datapath.writing import SMALL

KEYS = ("a", "b", "c")
#: What each counter grows by before a reading, and which are told apart then.
readings = st.lists(
    st.tuples(
        st.fixed_dictionaries({key: st.tuples(st.integers(0, 9), st.integers(0, 9)) for key in KEYS}),
        st.sets(st.sampled_from(KEYS)),
    ),
    max_size=12,
)


@given(readings, st.booleans())
def test_no_counter_falls_and_sums_are_right(steps: list, was_there: bool) -> None:  # type: ignore[type-arg]
    totals = dict.fromkeys(KEYS, (5, 7) if was_there else (0, 0))
    begin = sum(a for a, _ in totals.values())
    split: Split[str] = Split(totals, 2)
    told: dict[str, tuple[int, ...]] = {}
    last: tuple[int, ...] = (0, 0)
    for grown, own in steps:
        totals = {key: (a + grown[key][0], b + grown[key][1]) for key, (a, b) in totals.items()}
        found, others = split.read(totals, own)
        assert found.keys() == own
        assert all(now >= then for now, then in zip(others, last, strict=True))
        for key, counts in found.items():
            assert all(now >= then for now, then in zip(counts, told.get(key, (0, 0)), strict=True))
        told |= found
        last = others
        # What is told of one that is not told apart any more stays as it was.
        assert sum(a for a, _ in told.values()) + others[0] == sum(a for a, _ in totals.values()) - begin


def test_a_counter_that_begins_anew_is_told_anew() -> None:
    split: Split[str] = Split({"a": (5,)}, 1)
    assert split.read({"a": (7,)}, set()) == ({}, (2,))
    assert split.read({"a": (1,)}, {"a"}) == ({"a": (1,)}, (2,))
    assert split.read({}, set()) == ({}, (2,))
    assert split.read({"a": (4,)}, set()) == ({}, (6,))


# -- the collector

WEB, API, SLOW = (
    ServicePortKey("shop", name, "http", Protocol.TCP, Family.IPV4) for name in ("web", "api", "slow")
)


@pytest.fixture
def opened() -> Iterator[MapSet]:
    ensure_bpffs(BPFFS)
    pins = BPFFS / f"test-measures-{os.getpid()}"
    pins.mkdir()
    made = maps.open_or_create(pins, SMALL)
    for number, name in enumerate((WEB, API, SLOW)):
        made["service_names"].update(U32.pack(number), pack_name(name))
        address = bytes((10, 0, 0, number))
        made.backends().write(number, Backend(address, 80, Protocol.TCP), BackendState.ACTIVE)
    yield made
    made.close()
    shutil.rmtree(pins)


def connect(opened: MapSet, number: int, times: dict[int, int], failures: tuple[int, int, int]) -> None:
    """Writes what is counted; ``times``: connections by bucket."""
    counts = [times.get(place, 0) for place in range(len(CONNECT_BOUNDS) + 1)]
    opened["connects"].update(U32.pack(number), CONNECTS.pack(sum(counts) * 1000, *counts, *failures))
    opened["connect_failures"].update(PAIR.pack(number, number), CONNECT_FAILURES.pack(*failures))


def samples(collector: MeasureCollector) -> dict[tuple[str, str, str, str], float]:
    """By name, Service, backend, and reason or bound, without what is 0."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (
            sample.name.removeprefix("ebpfproxy_"),
            sample.labels["service"],
            sample.labels.get("backend", ""),
            sample.labels.get("reason", sample.labels.get("le", "")),
        ): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.value
    }


@pytest.mark.root
def test_the_busiest_have_series_of_their_own(opened: MapSet) -> None:
    collector = MeasureCollector(opened, 1, backends=False)
    connect(opened, 0, {0: 2, 4: 1}, (1, 0, 0))
    connect(opened, 1, {1: 1}, (0, 1, 0))
    connect(opened, NOBODY, {18: 1}, (0, 0, 1))
    found = samples(collector)
    assert found["service_connect_seconds_count", "web", "", ""] == 3
    assert found["service_connect_seconds_sum", "web", "", ""] == 0.003
    assert found["service_connect_seconds_bucket", "web", "", "6.4e-05"] == 2
    assert found["service_connect_seconds_bucket", "web", "", "0.001024"] == 3
    assert found["service_connect_seconds_bucket", "web", "", "+Inf"] == 3
    assert found["service_connect_seconds_count", "other", "", ""] == 2
    assert found["service_connect_seconds_bucket", "other", "", "8.388608"] == 1
    failures = {key[1:]: value for key, value in found.items() if "failures" in key[0]}
    assert failures == {
        ("web", "", "reset"): 1,
        ("other", "", "timeout"): 1,
        ("other", "", "abandoned"): 1,
    }
    # Another one is busier now: what it had counted before is not told again.
    connect(opened, 1, {1: 9}, (0, 1, 0))
    found = samples(collector)
    assert found["service_connect_seconds_count", "api", "", ""] == 8
    assert found["service_connect_seconds_count", "other", "", ""] == 2
    assert ("service_connect_seconds_count", "web", "", "") not in found


@pytest.mark.root
def test_failures_name_the_backend_where_that_is_wanted(opened: MapSet) -> None:
    collector = MeasureCollector(opened, 2, backends=True)
    connect(opened, 0, {0: 5}, (1, 0, 0))
    connect(opened, 1, {0: 5}, (0, 2, 0))
    connect(opened, 2, {0: 1}, (0, 0, 3))
    failures = {key[1:]: value for key, value in samples(collector).items() if "failures" in key[0]}
    assert failures == {
        ("web", "10.0.0.0:80", "reset"): 1,
        ("api", "10.0.0.1:80", "timeout"): 2,
        ("other", "", "abandoned"): 3,
    }


@pytest.mark.root
def test_failures_of_two_ids_of_one_endpoint_are_added_up(opened: MapSet) -> None:
    collector = MeasureCollector(opened, 2, backends=True)
    connect(opened, 0, {0: 5}, (1, 0, 0))
    backends = opened.backends()
    backends.write(3, Backend(bytes((10, 0, 0, 0)), 80, Protocol.TCP), BackendState.ACTIVE)
    opened["connect_failures"].update(PAIR.pack(0, 3), CONNECT_FAILURES.pack(2, 1, 0))
    failures = {key[1:]: value for key, value in samples(collector).items() if "failures" in key[0]}
    assert failures == {("web", "10.0.0.0:80", "reset"): 3, ("web", "10.0.0.0:80", "timeout"): 1}


@pytest.mark.root
def test_bytes_and_packets(opened: MapSet) -> None:
    collector = MeasureCollector(opened, 1, backends=False)
    for number, counts in ((0, (1, 2, 3, 4)), (2, (10, 20, 30, 40))):
        value = TRAFFIC.pack(*counts) + bytes(TRAFFIC.size * (bpf.possible_cpus() - 1))
        opened["service_traffic"].update(U32.pack(number), value)
    registry = CollectorRegistry()
    registry.register(collector)
    found = {
        (sample.name, sample.labels["service"], sample.labels["direction"]): sample.value
        for family in registry.collect()
        for sample in family.samples
    }
    assert found == {
        ("ebpfproxy_service_bytes_total", "slow", "request"): 10,
        ("ebpfproxy_service_bytes_total", "slow", "response"): 20,
        ("ebpfproxy_service_packets_total", "slow", "request"): 30,
        ("ebpfproxy_service_packets_total", "slow", "response"): 40,
        ("ebpfproxy_service_bytes_total", "other", "request"): 1,
        ("ebpfproxy_service_bytes_total", "other", "response"): 2,
        ("ebpfproxy_service_packets_total", "other", "request"): 3,
        ("ebpfproxy_service_packets_total", "other", "response"): 4,
    }


@pytest.mark.root
def test_nothing_measured_is_nothing_told(opened: MapSet) -> None:
    assert samples(MeasureCollector(opened, 10, backends=False)) == {}
