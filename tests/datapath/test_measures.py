"""What is measured of connections: read by id, and forgotten with the id."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.datapath.abi.flow_layout import FLOW, NAT, NAT_IDS_AT, BackendUse
from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, CONNECT_FAILURES, CONNECTS, TRAFFIC
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
def test_nothing_is_left_of_a_service_that_is_gone(own_bench: Bench) -> None:
    assert own_bench.maps is not None
    own_bench.writer.apply([port("a", [1])], complete=True)
    (number,) = own_bench.writer.names()
    (backend,) = own_bench.records
    count(own_bench.maps, number, backend)
    own_bench.writer.apply([], complete=True)
    own_bench.writer.reclaim(own_bench.writer.take_retired())
    assert measures.connects(own_bench.maps) == {}
    assert measures.failures(own_bench.maps) == {}


@pytest.mark.root
def test_what_goes_on_after_its_service_is_gone_is_forgotten_with_its_backend(own_bench: Bench) -> None:
    assert own_bench.maps is not None
    own_bench.writer.apply([port("a", [1])], complete=True)
    (number,) = own_bench.writer.names()
    (backend,) = own_bench.records
    own_bench.writer.apply([], complete=True)
    own_bench.writer.reclaim(own_bench.writer.take_retired())
    count(own_bench.maps, number, backend)
    own_bench.writer.forget_removed_backends(own_bench.writer.removed_backends)
    assert measures.connects(own_bench.maps).keys() == measures.traffic(own_bench.maps).keys() == set()
    assert measures.failures(own_bench.maps) == {}


@pytest.mark.root
def test_a_service_has_nothing_of_an_earlier_owner_of_its_id(own_bench: Bench) -> None:
    own_bench.reopen()
    assert own_bench.maps is not None
    count(own_bench.maps, 0, 0)
    own_bench.writer.apply([port("a", [1])], complete=True)
    assert list(own_bench.writer.names()) == [0]
    assert measures.connects(own_bench.maps).keys() == measures.traffic(own_bench.maps).keys() == set()
    assert measures.failures(own_bench.maps) == {}


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
def test_an_id_has_no_other_owner_while_connections_count_for_it(
    own_bench: Bench, kind: OriginKind | None
) -> None:
    """Also where the agent was restarted, and does not know which ids have been used."""
    assert own_bench.maps is not None
    own_bench.writer.apply([port("a", [1]), port("b", [2])], complete=True)
    old = own_bench.service_ids[port("b", [2]).key]
    own_bench.writer.apply([port("a", [1])], complete=True)
    own_bench.writer.reclaim(own_bench.writer.take_retired())
    if kind is None:
        open_flow(own_bench.maps, old)
    else:
        open_socket(own_bench.maps, old, kind)
    own_bench.reopen()
    own_bench.writer.apply([port("a", [1]), port("c", [3])], complete=True)
    assert own_bench.service_ids[port("c", [3]).key] == old + 1


@pytest.mark.root
def test_a_service_gets_an_id_that_connections_have_rather_than_none(own_bench: Bench) -> None:
    own_bench.empty(FEW_IDS)
    ports = [port(name, []) for name in "abcdefgh"]
    own_bench.writer.apply(ports, complete=True)
    own_bench.writer.apply(ports[1:], complete=True)
    own_bench.writer.reclaim(own_bench.writer.take_retired())
    assert own_bench.maps is not None
    open_flow(own_bench.maps, 0)
    own_bench.writer.apply([port("i", [])])
    assert own_bench.service_ids[port("i", []).key] == 0


@pytest.mark.root
def test_connections_are_looked_at_again_after_many_services_are_gone(own_bench: Bench) -> None:
    assert own_bench.maps is not None
    held = HeldIds(own_bench.maps)
    assert 3 not in held
    held.retire(3)
    assert 3 in held, "it may have connections that were not there before"
    for number in range(10, 10 + 1022):
        held.retire(number)
    assert 3 in held
    held.retire(9)
    assert 3 not in held


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
