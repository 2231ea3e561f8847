"""What is measured of connections: read by id, and forgotten with the id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.abi.flow_layout import FLOW, NAT, NAT_IDS_AT, BackendUse
from ebpfproxy.datapath.abi.layout import PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, CONNECT_FAILURES, CONNECTS, NOBODY, TRAFFIC
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, OriginKind, origin_key, with_origin_ids
from ebpfproxy.datapath.kernel import bpf, maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.held_ids import HeldIds
from ebpfproxy.datapath.services.measures import NO_CONNECTS, Connects, Measures, ServiceBackend, Traffic
from tests.datapath.writing import FEW_IDS, SMALL, Bench, port

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


# -- ids of Services that are gone


def open_socket(maps: MapSet, service_id: int, kind: OriginKind) -> None:
    """A connection of a socket, which counts when it ends."""
    packed = origin_key(7, kind).ljust(ORIGIN.size, b"\0")
    maps["sock_origin"].update(U32.pack(7), with_origin_ids(packed, BackendUse(service_id, 0), 1))


def open_flow(maps: MapSet, service_id: int) -> None:
    value = bytearray(NAT.size)
    PAIR.pack_into(value, NAT_IDS_AT, service_id, 0)
    maps["conntrack"].update(bytes(FLOW.size), bytes(value))


@pytest.mark.root
@pytest.mark.parametrize("kind", [OriginKind.CONNECTED, OriginKind.CLOSED, None])
def test_an_id_has_no_other_owner_while_connections_count_for_it(pins: Path, kind: OriginKind | None) -> None:
    """Also where the agent was restarted, and does not know which ids have been used."""
    bench = Bench(pins)
    assert bench.maps is not None
    bench.writer.apply([port("a", [1]), port("b", [2])], complete=True)
    old = bench.service_ids[port("b", [2]).key]
    bench.writer.apply([port("a", [1])], complete=True)
    bench.writer.reclaim(bench.writer.take_retired())
    if kind is None:
        open_flow(bench.maps, old)
    else:
        open_socket(bench.maps, old, kind)
    bench.reopen()
    bench.writer.apply([port("a", [1]), port("c", [3])], complete=True)
    assert bench.service_ids[port("c", [3]).key] == old + 1
    bench.close_maps()


@pytest.mark.root
def test_a_service_gets_an_id_that_connections_have_rather_than_none(pins: Path) -> None:
    bench = Bench(pins)
    bench.empty(FEW_IDS)
    ports = [port(name, []) for name in "abcdefgh"]
    bench.writer.apply(ports, complete=True)
    bench.writer.apply(ports[1:], complete=True)
    bench.writer.reclaim(bench.writer.take_retired())
    assert bench.maps is not None
    open_flow(bench.maps, 0)
    bench.writer.apply([port("i", [])])
    assert bench.service_ids[port("i", []).key] == 0
    bench.close_maps()


@pytest.mark.root
def test_connections_are_looked_at_again_after_many_services_are_gone(pins: Path) -> None:
    bench = Bench(pins)
    assert bench.maps is not None
    held = HeldIds(bench.maps)
    assert 3 not in held
    held.retire(3)
    assert 3 in held, "it may have connections that were not there before"
    for number in range(10, 10 + 1022):
        held.retire(number)
    assert 3 in held
    held.retire(9)
    assert 3 not in held
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
