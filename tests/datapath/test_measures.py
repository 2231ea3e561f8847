"""What is measured of connections: read by id, and forgotten with the id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.abi.layout import PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, CONNECT_FAILURES, CONNECTS, NOBODY, TRAFFIC
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import NO_CONNECTS, Connects, Measures, ServiceBackend, Traffic
from tests.datapath.writing import SMALL, Bench, port

BUCKETS = len(CONNECT_BOUNDS) + 1


@pytest.fixture
def opened(pins: Path) -> Iterator[MapSet]:
    made = maps.open_or_create(pins, SMALL)
    yield made
    made.close()


def count(opened: MapSet, service_id: int, backend_id: int) -> None:
    """Counts a connection of each kind as programs do."""
    times = [0] * BUCKETS
    times[3] = 1
    opened["connects"].update(U32.pack(service_id), CONNECTS.pack(300, *times, 1, 0, 2))
    opened["connect_failures"].update(PAIR.pack(service_id, backend_id), CONNECT_FAILURES.pack(1, 0, 2))
    # Each CPU counts for itself.
    opened["service_traffic"].update(U32.pack(service_id), TRAFFIC.pack(1, 2, 3, 4) * bpf.possible_cpus())


@pytest.mark.root
def test_reading(opened: MapSet) -> None:
    Measures(opened)
    assert measures.connects(opened) == {}
    assert measures.failures(opened) == {}
    assert measures.traffic(opened) == {}
    count(opened, 3, 5)
    found = measures.connects(opened)
    assert found.keys() == {3}
    assert (found[3].microseconds, found[3].established, found[3].failures) == (300, 1, (1, 0, 2))
    assert measures.failures(opened) == {ServiceBackend(3, 5): (1, 0, 2)}
    cpus = bpf.possible_cpus()
    assert measures.traffic(opened) == {3: Traffic(cpus, 2 * cpus, 3 * cpus, 4 * cpus)}


@pytest.mark.root
def test_ids_that_are_given_back_are_forgotten(opened: MapSet) -> None:
    made = Measures(opened)
    for service_id, backend_id in ((1, 1), (2, 2), (3, 3)):
        count(opened, service_id, backend_id)
    made.forget([1], [2])
    assert measures.connects(opened).keys() == measures.traffic(opened).keys() == {2, 3}
    assert measures.failures(opened).keys() == {ServiceBackend(3, 3)}


@pytest.mark.root
def test_a_start_keeps_what_belongs_to_ids_in_use(opened: MapSet) -> None:
    for service_id, backend_id in ((1, 1), (1, 2), (2, 1), (NOBODY, NOBODY)):
        count(opened, service_id, backend_id)
    made = Measures(opened)
    made.keep({1}, {1})
    assert measures.connects(opened).keys() == measures.traffic(opened).keys() == {1, NOBODY}
    assert measures.failures(opened).keys() == {ServiceBackend(1, 1), ServiceBackend(NOBODY, NOBODY)}


@pytest.mark.root
def test_nothing_is_left_of_a_service_that_is_gone(pins: Path) -> None:
    bench = Bench(pins)
    assert bench.maps is not None
    bench.writer.apply([port("a", [1])], complete=True)
    (number,) = bench.writer.names()
    (backend,) = bench.records
    count(bench.maps, number, backend)
    bench.writer.apply([], complete=True)
    bench.writer.reclaim(bench.writer.take_retired())
    assert measures.connects(bench.maps) == {}
    assert measures.failures(bench.maps) == {}
    bench.close_maps()


@pytest.mark.root
def test_what_goes_on_after_its_service_is_gone_is_forgotten_with_its_backend(pins: Path) -> None:
    bench = Bench(pins)
    assert bench.maps is not None
    bench.writer.apply([port("a", [1])], complete=True)
    (number,) = bench.writer.names()
    (backend,) = bench.records
    bench.writer.apply([], complete=True)
    bench.writer.reclaim(bench.writer.take_retired())
    count(bench.maps, number, backend)
    bench.writer.forget_removed_backends(bench.writer.removed_backends)
    assert measures.connects(bench.maps).keys() == measures.traffic(bench.maps).keys() == set()
    assert measures.failures(bench.maps) == {}
    bench.close_maps()


@pytest.mark.root
def test_a_service_has_nothing_of_an_earlier_owner_of_its_id(pins: Path) -> None:
    bench = Bench(pins)
    bench.reopen()
    assert bench.maps is not None
    count(bench.maps, 0, 0)
    bench.writer.apply([port("a", [1])], complete=True)
    assert list(bench.writer.names()) == [0]
    assert measures.connects(bench.maps).keys() == measures.traffic(bench.maps).keys() == set()
    assert measures.failures(bench.maps) == {}
    bench.close_maps()


# -- quantiles

times = st.lists(st.integers(0, 50), min_size=BUCKETS, max_size=BUCKETS).map(tuple)


@given(times, st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_its_connection(buckets: tuple[int, ...], share: float) -> None:
    found = Connects(0, buckets, (0, 0, 0)).quantile(share)
    if not any(buckets):
        assert found is None
        return
    assert found is not None
    each = [place for place, number in enumerate(buckets) for _ in range(number)]
    # The place of the connection at that share, which is rounded up.
    place = each[max(0, -int(-share * len(each) // 1) - 1)]
    bounds = (0, *CONNECT_BOUNDS)
    upper = bounds[min(place + 1, BUCKETS - 1)] / 1e6
    assert found == pytest.approx(upper) or bounds[place] / 1e6 * (1 - 1e-9) <= found <= upper


def test_no_quantile_without_connections() -> None:
    assert NO_CONNECTS.quantile(0.5) is None
