"""What ``ebpfproxy top`` says of connect times, failures and bytes, from real maps set as programs set them."""

from __future__ import annotations

import time

import msgspec
import pytest

from ebpfproxy.agent.state import save_programmed
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import (
    CONNECT_BOUNDS,
    CONNECT_FAILURES,
    CONNECTS,
    TRAFFIC,
    ConnectFailure,
)
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.services.measures import Measuring
from ebpfproxy.services.model import Family, ServicePort, ServicePortKey
from ebpfproxy.top.comparison import Comparison, Wanted
from ebpfproxy.top.measured import WINDOW_SECONDS
from ebpfproxy.top.reading import Reader
from ebpfproxy.top.rows import ServiceRow, Sort, Top
from tests.datapath.writing import FEW_IDS, Bench, port

pytestmark = pytest.mark.root

_BUCKETS = len(CONNECT_BOUNDS) + 1
_WEB, _OTHER = port("a", [1, 2, 3]), port("b", [4])


class Measured:
    """A bench of two Services, whose measures a test sets; time goes on by a second for each refresh."""

    def __init__(self, bench: Bench, *, wanted: Wanted | None = None) -> None:
        self._bench = bench
        bench.empty(FEW_IDS)
        self.apply(_WEB, _OTHER)
        assert bench.maps is not None
        self.maps = bench.maps
        self.measuring = Measuring(connections=True, traffic=True)
        self.now = 0.0
        wanted = wanted or Wanted()
        self._comparison = Comparison(Reader(self.maps), wanted, 0.0, lambda: self.measuring)

    def apply(self, *ports: ServicePort) -> None:
        self._bench.writer.apply(ports, [])
        assert self._bench.maps is not None
        save_programmed(self._bench.maps, time.time(), 0.0)

    def connect(self, key: ServicePortKey, bucket: int, times: int) -> None:
        """So many connections took so long."""
        self._add_connects(self._bench.service_ids[key], 1 + bucket, times)

    def connect_others(self) -> None:
        """A Service without an entry had a connection."""
        self._add_connects(NOBODY, 1, 1)

    def fail(self, service: ServicePort, backend: int, why: ConnectFailure, times: int = 1) -> None:
        number = self._bench.service_ids[service.key]
        self._add_connects(number, 1 + _BUCKETS + why, times)
        (backend_id,) = (
            n for n, (each, _) in self._bench.records.items() if each == service.cluster[backend]
        )
        key = PAIR.pack(number, backend_id)
        counts = list(CONNECT_FAILURES.unpack(self._value("connect_failures", key, CONNECT_FAILURES.size)))
        counts[why] += times
        self.maps["connect_failures"].update(key, CONNECT_FAILURES.pack(*counts))

    def send(self, key: ServicePortKey, request: int, response: int) -> None:
        """Bytes, in a packet each, seen by the first CPU."""
        at, size = U32.pack(self._bench.service_ids[key]), TRAFFIC.size * bpf.possible_cpus()
        value = self._value("service_traffic", at, size)
        before = TRAFFIC.unpack(value[: TRAFFIC.size])
        new = (a + b for a, b in zip(before, (request, response, 1, 1), strict=True))
        self.maps["service_traffic"].update(at, TRAFFIC.pack(*new) + value[TRAFFIC.size :])

    def refresh(self, seconds: float = 1.0) -> Top:
        self.now += seconds
        return self._comparison.next(self.now, 0.0)

    def row(self, name: str = "a", seconds: float = 1.0) -> ServiceRow:
        (row,) = (row for row in self.refresh(seconds).rows if row.service == name)
        return row

    def give_id_to(self, key: ServicePortKey, new: ServicePortKey) -> None:
        """The id has another owner, with counts of its own."""
        at = U32.pack(self._bench.service_ids[key])
        self.maps["service_names"].update(at, layout.pack_name(new))
        counts = [0] * (1 + _BUCKETS + len(ConnectFailure))
        counts[1] = 1_000_000
        self.maps["connects"].update(at, CONNECTS.pack(*counts))
        save_programmed(self.maps, time.time(), 0.0)

    def _add_connects(self, number: int, place: int, times: int) -> None:
        key = U32.pack(number)
        counts = list(CONNECTS.unpack(self._value("connects", key, CONNECTS.size)))
        counts[place] += times
        self.maps["connects"].update(key, CONNECTS.pack(*counts))

    def _value(self, table: str, key: bytes, size: int) -> bytes:
        return self.maps[table].lookup(key) or bytes(size)


@pytest.fixture
def measured(bench: Bench) -> Measured:
    return Measured(bench)


def test_percentiles_are_of_the_connections_of_the_last_seconds(measured: Measured) -> None:
    measured.connect(_WEB.key, 2, 99)
    measured.connect(_WEB.key, 9, 1)
    row = measured.row()
    assert row.connects is not None and row.connects.p50 is not None and row.connects.p99 is not None
    assert sum(row.connects.times) == 100
    assert CONNECT_BOUNDS[1] / 1e6 <= row.connects.p50 <= row.connects.p99 <= CONNECT_BOUNDS[2] / 1e6
    # They are shown while the window has them, and not for ever.
    assert [buckets(measured) for _ in range(5)] == [[2, 9]] * 5
    measured.connect(_WEB.key, 5, 1)
    assert [buckets(measured) for _ in range(7)][-1] == [5]
    row = measured.row(seconds=2 * WINDOW_SECONDS)
    assert row.connects is not None and row.connects.p50 is None and not any(row.connects.times)


def buckets(measured: Measured) -> list[int]:
    """Those that have connections, after three more seconds."""
    row = measured.row(seconds=WINDOW_SECONDS / 10)
    assert row.connects is not None
    return [place for place, count in enumerate(row.connects.times) if count]


def test_both_families_are_one_histogram(measured: Measured) -> None:
    key = _WEB.key._replace(family=Family.IPV6)
    measured.apply(msgspec.structs.replace(port("a", [9], address=99), key=key))
    measured.connect(_WEB.key, 0, 1)
    measured.connect(key, 4, 3)
    row = measured.row()
    assert row.connects is not None and row.connects.times[:5] == (1, 0, 0, 0, 3)


def test_failures_are_named_by_backend_and_reason(measured: Measured) -> None:
    """A backend that is not among the busiest, too."""
    measured.fail(_WEB, 2, ConnectFailure.RESET, 3)
    measured.fail(_WEB, 2, ConnectFailure.TIMEOUT)
    measured.fail(_OTHER, 0, ConnectFailure.ABANDONED)
    found = measured.refresh(2.0)
    web, other = found.rows
    assert web.connects is not None and other.connects is not None
    assert (web.connects.failed_per_second, web.connects.recently_failed) == (2.0, {"reset": 3, "timeout": 1})
    assert other.connects.recently_failed == {"abandoned": 1}
    assert [(each.address, each.recently_failed, each.failed_per_second) for each in web.backends] == [
        ("10.0.0.1:80", {}, 0.0),
        ("10.0.0.2:80", {}, 0.0),
        ("10.0.0.3:80", {"reset": 3, "timeout": 1}, 2.0),
    ]
    assert found.failed_per_second == 2.5
    assert [row.service for row in found.trouble] == ["a", "b"]
    web = measured.row()
    assert web.connects is not None and web.is_active, "what is over is still shown"
    assert (web.connects.failed_per_second, web.connects.recently_failed) == (0.0, {"reset": 3, "timeout": 1})


def test_a_backend_that_fails_is_shown_beside_the_busiest(bench: Bench) -> None:
    measured = Measured(bench, wanted=Wanted(backends=1))
    measured.fail(_WEB, 2, ConnectFailure.RESET)
    assert [each.address for each in measured.row().backends] == ["10.0.0.1:80", "10.0.0.3:80"]
    assert Measured(bench, wanted=Wanted(backends=0)).row().backends == ()


def test_bytes_are_of_the_last_interval(measured: Measured) -> None:
    measured.send(_WEB.key, 1000, 3000)
    found = measured.refresh(2.0)
    (row,) = (row for row in found.rows if row.service == "a")
    assert row.traffic is not None
    assert (row.traffic.request_bytes_per_second, row.traffic.response_bytes_per_second) == (500.0, 1500.0)
    assert (row.traffic.request_packets_per_second, row.traffic.bytes_per_second) == (0.5, 2000.0)
    assert found.bytes_per_second == 2000.0
    row = measured.row()
    assert row.traffic is not None and row.traffic.bytes_per_second == 0


@pytest.mark.parametrize("connections", [False, True])
@pytest.mark.parametrize("traffic", [False, True])
def test_what_is_not_measured_is_none(measured: Measured, connections: bool, traffic: bool) -> None:
    """What was measured before it was switched off is not shown as new."""
    measured.measuring = Measuring(connections, traffic)
    measured.connect(_WEB.key, 1, 1)
    measured.fail(_WEB, 0, ConnectFailure.RESET)
    measured.send(_WEB.key, 1, 1)
    found = measured.refresh()
    (row,) = (row for row in found.rows if row.service == "a")
    assert (row.connects is not None, row.traffic is not None) == (connections, traffic)
    assert (found.measuring.connections, found.measuring.traffic) == (connections, traffic)
    assert [each.failed_per_second is not None for each in row.backends] == [connections] * 3
    assert [bool(each.recently_failed) for each in row.backends] == [connections, False, False]


def test_what_was_measured_before_it_began_is_not_recent(bench: Bench) -> None:
    measured = Measured(bench)
    measured.connect(_WEB.key, 1, 5)
    measured.fail(_WEB, 0, ConnectFailure.RESET)
    measured.send(_WEB.key, 1, 1)
    later = Comparison(Reader(measured.maps), Wanted(), 0.0, lambda: measured.measuring)
    row = later.next(1.0, 0.0).rows[0]
    assert row.connects is not None and row.traffic is not None
    assert (sum(row.connects.times), row.connects.recently_failed) == (0, {})
    assert row.traffic.bytes_per_second == 0
    assert not row.is_active


def test_a_service_without_an_entry_is_not_said_to_have_none(measured: Measured) -> None:
    """Its connections are counted together with others', because the map is full."""
    measured.connect(_WEB.key, 1, 1)
    measured.connect_others()
    found = measured.refresh()
    assert [(row.service, row.connects is None) for row in found.rows] == [("a", False), ("b", True)]
    assert found.measuring.full == 1


def test_a_reused_id_counts_for_its_new_owner_only(measured: Measured) -> None:
    measured.connect(_WEB.key, 3, 9)
    measured.fail(_WEB, 0, ConnectFailure.RESET)
    measured.refresh()
    measured.give_id_to(_WEB.key, _WEB.key._replace(name="c"))
    row = measured.row("c")
    assert row.connects is not None and row.connects.recently_failed == {}
    assert row.connects.times == (1_000_000, *(0,) * (_BUCKETS - 1))


@pytest.mark.parametrize(
    ("sort", "expected"),
    [(Sort.FAILED, "b"), (Sort.CONNECT_TIME, "a"), (Sort.BYTES, "b"), (Sort.NAME, "a")],
)
def test_each_key_has_its_order(bench: Bench, sort: Sort, expected: str) -> None:
    measured = Measured(bench, wanted=Wanted(sort=(sort,), rows=1))
    measured.fail(_OTHER, 0, ConnectFailure.RESET)
    measured.connect(_WEB.key, 9, 1)
    measured.connect(_OTHER.key, 2, 1)
    measured.send(_OTHER.key, 10, 0)
    measured.send(_WEB.key, 5, 0)
    assert [row.service for row in measured.refresh().rows] == [expected]


def test_it_is_the_same_as_json(measured: Measured) -> None:
    measured.connect(_WEB.key, 1, 1)
    measured.fail(_WEB, 0, ConnectFailure.RESET)
    measured.send(_WEB.key, 1, 1)
    found = measured.refresh()
    assert msgspec.json.decode(msgspec.json.encode(found), type=Top) == found
