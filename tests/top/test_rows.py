"""The rows of ``ebpfproxy top`` from real maps, whose counters are set as programs set them."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.agent.state import save_programmed
from ebpfproxy.config.datapath import Capacity
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import Loads, backend_ids
from ebpfproxy.datapath.abi.layout import BACKEND, BACKEND_SIZE, LOAD, REJECTIONS, U32, U64
from ebpfproxy.datapath.abi.node_layout import PacketEvent
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.services.model import Backend, Family, ServicePort, ServicePortKey
from ebpfproxy.top.comparison import Comparison, Wanted
from ebpfproxy.top.reading import Reader
from ebpfproxy.top.rows import ServiceRow, Sort, Top
from tests.datapath.writing import FEW_IDS, SMALL, Bench, port, set_load

_ALL = Wanted()


class Counted:
    """A bench whose counters a test turns; time goes on by a second for each refresh."""

    def __init__(
        self, bench: Bench, *ports: ServicePort, wanted: Wanted = _ALL, capacity: Capacity = FEW_IDS
    ) -> None:
        self._bench = bench
        bench.empty(capacity)
        self.apply(*ports)
        assert bench.maps is not None
        self.maps = bench.maps
        self._now = 0.0
        self._comparison = Comparison(Reader(self.maps), wanted, self._now)

    def apply(self, *ports: ServicePort, removed: Iterable[ServicePort] = ()) -> None:
        """Programs as the agent does."""
        self._bench.writer.apply(ports, [each.key for each in removed])
        assert self._bench.maps is not None
        save_programmed(self._bench.maps, time.time(), 0.0)

    def choose(self, key: ServicePortKey, address: Backend, times: int, *, closed: int = 0) -> None:
        """Connections of sockets, of which some have ended."""
        at = U32.pack(self._bench.service_ids[key])
        before = self.maps["service_choices"].lookup(at)
        assert before is not None
        self.maps["service_choices"].update(at, U64.pack(U64.unpack(before)[0] + times))
        number = self.id_of(address)
        load = self.maps.loads()[number]
        set_load(
            self.maps,
            number,
            sockets_opened=load.sockets_opened + times,
            sockets_closed=load.sockets_closed + closed,
        )

    def reject(self, key: ServicePortKey, refused: int, dropped: int) -> None:
        at = U32.pack(self._bench.service_ids[key])
        before = self.maps["service_rejections"].lookup(at)
        assert before is not None
        old_refused, old_dropped = REJECTIONS.unpack(before)
        self.maps["service_rejections"].update(
            at, REJECTIONS.pack(old_refused + refused, old_dropped + dropped)
        )

    def id_of(self, address: Backend) -> int:
        (number,) = (number for number, (each, _) in self._bench.records.items() if each == address)
        return number

    def refresh(self, seconds: float = 1.0) -> Top:
        self._now += seconds
        return self._comparison.next(self._now, 0.0)


def names(top: Top) -> list[str]:
    return [row.service for row in top.rows]


def row_of(top: Top, name: str) -> ServiceRow:
    (row,) = (row for row in top.rows if row.service == name)
    return row


@pytest.mark.root
def test_rates_are_of_the_last_interval_and_the_rest_is_since_the_start(bench: Bench) -> None:
    web, other = port("a", [1, 2]), port("b", [3])
    counted = Counted(bench, web, other)
    counted.choose(web.key, web.cluster[0], 10, closed=4)
    counted.choose(web.key, web.cluster[1], 2)
    counted.reject(other.key, 6, 4)
    top = counted.refresh(2.0)
    row = row_of(top, "a")
    assert (row.connections_per_second, row.open, row.connections, row.endpoints) == (6.0, 8, 12, 2)
    assert [
        (each.address, each.protocol, each.state, each.connections_per_second, each.open, each.connections)
        for each in row.backends
    ] == [("10.0.0.1:80", "TCP", "active", 5.0, 6, 10), ("10.0.0.2:80", "TCP", "active", 1.0, 2, 2)]
    row = row_of(top, "b")
    assert (row.refused_per_second, row.dropped_per_second) == (3.0, 2.0)
    assert (row.recently_refused, row.recently_dropped, row.refused, row.dropped) == (6, 4, 6, 4)
    assert (top.services, top.active, top.seconds) == (2, 2, 2.0)
    assert (top.connections_per_second, top.refused_per_second, top.dropped_per_second) == (6.0, 3.0, 2.0)
    assert [row.service for row in top.trouble] == ["b"]

    top = counted.refresh()
    assert row_of(top, "a").connections_per_second == 0
    assert row_of(top, "a").open == 8
    assert (row_of(top, "b").refused_per_second, row_of(top, "b").recently_refused) == (0, 6)
    assert [row.service for row in top.trouble] == ["b"], "what is over is still shown"


@pytest.mark.root
def test_what_was_counted_before_it_began_is_not_recent(bench: Bench) -> None:
    web = port("a", [1])
    bench.empty(FEW_IDS)
    bench.writer.apply([web])
    assert bench.maps is not None
    bench.maps["service_rejections"].update(U32.pack(bench.service_ids[web.key]), REJECTIONS.pack(7, 7))
    comparison = Comparison(Reader(bench.maps), Wanted(), 0.0)
    (row,) = comparison.next(1.0, 0.0).rows
    assert (row.refused, row.dropped, row.recently_refused, row.recently_dropped) == (7, 7, 0, 0)
    assert not row.is_active


@pytest.mark.root
def test_both_families_are_one_row(bench: Bench) -> None:
    web = port("a", [1])
    key = web.key._replace(family=Family.IPV6)
    web6 = msgspec.structs.replace(port("a", [2], address=99), key=key)
    counted = Counted(bench, web, web6)
    counted.choose(web.key, web.cluster[0], 1)
    counted.choose(key, web6.cluster[0], 2)
    (row,) = counted.refresh().rows
    assert (row.connections_per_second, row.open, row.endpoints, len(row.backends)) == (3.0, 3, 2, 2)


@pytest.mark.root
def test_a_backend_of_several_services_is_marked(bench: Bench) -> None:
    """What is counted for it is of all of them."""
    one, two = port("a", [1]), port("b", [1, 2])
    counted = Counted(bench, one, two)
    counted.choose(one.key, one.cluster[0], 3)
    top = counted.refresh()
    assert row_of(top, "a").connections_per_second == 3.0
    assert row_of(top, "b").connections_per_second == 0
    assert [(each.shared, each.open) for each in row_of(top, "b").backends] == [(True, 3), (False, 0)]


@pytest.mark.root
@pytest.mark.parametrize(
    ("sort", "expected"),
    [
        (Sort.CONNECTIONS, ["d", "a", "b", "c"]),
        (Sort.OPEN, ["a", "d", "b", "c"]),
        (Sort.REFUSED, ["b", "c", "d", "a"]),
        (Sort.DROPPED, ["c", "d", "a", "b"]),
        (Sort.NAME, ["a", "b", "c", "d"]),
    ],
)
def test_each_key_has_its_order(bench: Bench, sort: Sort, expected: list[str]) -> None:
    ports = {name: port(name, [n]) for n, name in enumerate("abcdef", 1)}
    counted = Counted(bench, *ports.values(), wanted=Wanted(sort=(sort,), rows=4))
    for name, times, closed in (("a", 5, 0), ("d", 9, 8)):
        counted.choose(ports[name].key, ports[name].cluster[0], times, closed=closed)
    counted.reject(ports["b"].key, 3, 0)
    counted.reject(ports["c"].key, 2, 1)
    top = counted.refresh()
    assert names(top) == expected
    assert (top.services, top.active) == (6, 4)


@pytest.mark.root
def test_rows_of_several_keys_are_the_first_of_each(bench: Bench) -> None:
    ports = {name: port(name, [n]) for n, name in enumerate("abcd", 1)}
    wanted = Wanted(sort=(Sort.CONNECTIONS, Sort.REFUSED), rows=1)
    counted = Counted(bench, *ports.values(), wanted=wanted)
    counted.choose(ports["a"].key, ports["a"].cluster[0], 1)
    counted.choose(ports["b"].key, ports["b"].cluster[0], 2)
    counted.reject(ports["c"].key, 1, 0)
    assert names(counted.refresh()) == ["b", "c"]


@pytest.mark.root
def test_filters_leave_others_out_of_rows_and_sums(bench: Bench) -> None:
    shop, system = port("a", [1]), port("b", [2])
    system = msgspec.structs.replace(system, key=system.key._replace(namespace="system"))
    for wanted, expected in (
        (Wanted(namespace="system"), ["b"]),
        (Wanted(service="a"), ["a"]),
        (Wanted(namespace="system", service="a"), []),
    ):
        counted = Counted(bench, shop, system, wanted=wanted)
        counted.choose(shop.key, shop.cluster[0], 1)
        counted.choose(system.key, system.cluster[0], 1)
        top = counted.refresh()
        assert names(top) == expected
        assert (top.services, top.active, top.connections_per_second) == (len(expected),) * 3


@pytest.mark.root
def test_changes_of_services_and_backends_are_seen(bench: Bench) -> None:
    web, other = port("a", [1]), port("b", [2])
    counted = Counted(bench, web)
    assert row_of(counted.refresh(), "a").endpoints == 1
    more = port("a", [1, 3])
    counted.apply(more, other)
    counted.choose(more.key, more.cluster[1], 4)
    top = counted.refresh()
    assert names(top) == ["a", "b"]
    assert [each.address for each in row_of(top, "a").backends] == ["10.0.0.3:80", "10.0.0.1:80"]
    assert row_of(top, "a").backends[0].connections_per_second == 4.0
    counted.apply(removed=[more])
    assert names(counted.refresh()) == ["b"]


@pytest.mark.root
def test_a_range_of_slots_that_comes_back_is_read_again(bench: Bench) -> None:
    """Two changes between refreshes may leave the selection's word as it was, with other slots."""
    counted = Counted(bench, port("a", [1]), capacity=SMALL)
    counted.refresh()
    number = bench.service_ids[port("a", [1]).key]
    word = counted.maps.selections().ranges(number)
    for changes in range(1, 200):
        counted.apply(port("a", [2 + changes % 2]))
        bench.writer.reclaim(bench.writer.take_retired())
        if counted.maps.selections().ranges(number) == word:
            break
    assert counted.maps.selections().ranges(number) == word, "the range did not come back"
    (each,) = row_of(counted.refresh(), "a").backends
    assert each.address == f"10.0.0.{2 + changes % 2}:80"


@pytest.mark.root
def test_ids_that_no_backend_can_have_are_left_out(bench: Bench) -> None:
    """Somebody with root has stored them."""
    web = port("a", [1, 2])
    counted = Counted(bench, web)
    base, _ = counted.maps.selections().ranges(bench.service_ids[web.key])[0]
    counted.maps["slots"].update(U32.pack(base), U64.pack(0xFFFFFFFF))
    save_programmed(counted.maps, time.time(), 0.0)
    row = row_of(counted.refresh(), "a")
    assert (row.endpoints, [each.address for each in row.backends]) == (1, ["10.0.0.2:80"])


@pytest.mark.root
def test_a_backend_that_leaves_one_of_its_services_is_not_shared_any_more(bench: Bench) -> None:
    one, two = port("a", [1]), port("b", [1, 2])
    counted = Counted(bench, one, two)
    counted.choose(two.key, two.cluster[0], 3)
    assert row_of(counted.refresh(), "a").open == 3
    counted.apply(port("b", [2]))
    top = counted.refresh()
    assert [row_of(top, name).open for name in "ab"] == [3, 0]
    assert [each.shared for each in row_of(top, "a").backends] == [False]
    counted.apply(two)
    assert row_of(counted.refresh(), "a").backends[0].shared
    counted.apply(removed=[two])
    assert not row_of(counted.refresh(), "a").backends[0].shared


@pytest.mark.root
def test_a_reused_id_counts_for_its_new_owner_only(bench: Bench) -> None:
    old = port("a", [1])
    counted = Counted(bench, old)
    counted.reject(old.key, 9, 9)
    counted.choose(old.key, old.cluster[0], 9)
    counted.refresh()
    number = bench.service_ids[old.key]
    # The id would come back by itself once every other has been in use.
    new = old.key._replace(name="b")
    counted.maps["service_names"].update(U32.pack(number), layout.pack_name(new))
    counted.maps["service_rejections"].update(U32.pack(number), REJECTIONS.pack(11, 0))
    counted.maps["service_choices"].update(U32.pack(number), U64.pack(2))
    save_programmed(counted.maps, time.time(), 0.0)
    (row,) = counted.refresh().rows
    assert row.service == "b"
    assert (row.connections_per_second, row.refused_per_second, row.recently_refused) == (2.0, 11.0, 11)


@pytest.mark.root
def test_packets_of_no_service_are_named(bench: Bench) -> None:
    counted = Counted(bench, port("a", [1]))
    cpus = bpf.possible_cpus()
    for event in (PacketEvent.NO_SUCH_SERVICE, PacketEvent.NO_SUCH_PORT, PacketEvent.MARTIAN):
        counted.maps["packet_events"].update(U32.pack(event), U64.pack(1) * cpus)
    # A socket that wanted an IPv6 address.
    counted.maps["unallocated"].update(U32.pack(3), U64.pack(2) * cpus)
    top = counted.refresh(2.0)
    assert [(row.action, row.reason, row.per_second, row.recently) for row in top.packets] == [
        ("rejected", "no-such-port", cpus / 2, cpus),
        ("dropped", "no-such-service", cpus / 2, cpus),
        ("refused", "no-such-service", float(cpus), 2 * cpus),
    ]
    assert [row.per_second for row in counted.refresh().packets] == [0, 0, 0]


# -- what is read in columns


_WORD, _LONG = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(
    st.lists(st.tuples(_WORD, _LONG, _LONG, _LONG, _WORD, _WORD, _WORD, _WORD), min_size=1, max_size=40),
    st.data(),
)
def test_columns_are_what_records_are(loads: list[tuple[int, ...]], data: st.DataObject) -> None:
    memory = memoryview(b"".join(bytes(BACKEND.size) + LOAD.pack(*each) for each in loads))
    assert len(memory) == BACKEND_SIZE * len(loads)
    read = Loads(memory, len(loads))
    first = data.draw(st.integers(0, len(loads)))
    end = data.draw(st.integers(first, len(loads)))
    assert read.open_now(first, end) == [read[number].open_now for number in range(first, end)]


@pytest.mark.root
def test_slots_of_many_services_are_those_of_each(bench: Bench) -> None:
    ports = [port("a", [1, 2], local=[2]), port("b", [3]), port("c", [])]
    counted = Counted(bench, *ports)
    dump = Dump(counted.maps)
    for number, packed in counted.maps.selections().packed_slots(dump.names):
        both = [*dump.selection(number, 0), *dump.selection(number, 1)]
        words = memoryview(packed).cast("Q")
        assert list(backend_ids(words)) == both  # type: ignore[arg-type]
