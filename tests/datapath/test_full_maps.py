"""The writer where the maps of Services are full: what leaves, what stays, and what is tried again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest

from ebpfproxy.datapath.abi.flow_layout import RemovalReason
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import BackendState, ServicePort
from tests.datapath.writing import TABLE, Bench, backend, port

pytestmark = pytest.mark.root

WAIT = 5.0


class Waiting:
    """A writer that waits for endpoints, by a clock that the test sets."""

    def __init__(self, bench: Bench) -> None:
        bench.empty()
        assert bench.maps is not None
        self.now = 100.0
        self.bench = bench
        # Without a cycle, in which maps would stay open until it is collected.
        itself = weakref.proxy(self)
        self.writer = Writer(
            bench.maps, bench.grace.wait, maglev_size=TABLE, absence=WAIT, clock=lambda: itself.now
        )

    def apply(self, *ports: ServicePort) -> list[str]:
        return [each.why for each in self.writer.apply(ports)]

    def pass_time(self) -> None:
        """The end of a wait, and a grace period."""
        self.now += WAIT
        self.writer.end_absences()
        self.writer.reclaim(self.writer.take_retired())
        self.writer.retry()

    def sweep(self) -> None:
        self.writer.forget_removed_backends(self.writer.removed_backends)
        self.writer.retry()

    def id_of(self, n: int) -> int:
        (number,) = (
            number
            for number, (each, state) in self.bench.records.items()
            if each == backend(n) and state is not BackendState.GONE
        )
        return number

    def selected(self, name: str) -> set[str]:
        return {
            each.address.partition(":")[0].rpartition(".")[2]
            for row in self.bench.rows
            if row.name == name and row.scope == "internal"
            for each in row.backends
        }

    def reasons(self) -> dict[int, RemovalReason]:
        return {use.backend_id: each.why for use, each in self.writer.removed_backends.items()}


@pytest.fixture
def waiting(bench: Bench) -> Iterator[Waiting]:
    made = Waiting(bench)
    yield made
    # It refers to the arrays' memory.
    del made.writer


OTHERS = list(range(20, 33))


def test_endpoint_with_connections_may_come_back_although_others_have_no_room(waiting: Waiting) -> None:
    """Its id would not be free before its connections have ended: it stays absent, and is the same when it is back."""
    waiting.apply(port("a", [1, 2]), port("b", OTHERS))
    number = waiting.id_of(1)
    waiting.bench.count_open(number, 1, flow=False)
    waiting.apply(port("a", [2]))
    assert waiting.apply(port("c", [40, 41])), "one id is free, another belongs to the absent endpoint"
    assert waiting.reasons() == {number: RemovalReason.ABSENT}
    waiting.apply(port("a", [1, 2]))
    assert waiting.reasons() == {}
    assert waiting.id_of(1) == number
    waiting.pass_time()
    assert waiting.reasons() == {}
    assert waiting.selected("a") == {"1", "2"}


def test_absent_endpoint_without_connections_makes_room(waiting: Waiting) -> None:
    waiting.apply(port("a", [1, 2]), port("b", OTHERS))
    waiting.apply(port("a", [2]))
    assert waiting.apply(port("c", [40, 41])) == []
    assert waiting.selected("c") == {"40", "41"}


@pytest.mark.parametrize("flow", [False, True], ids=["socket", "flow"])
def test_id_that_is_free_once_its_connections_have_ended_is_used(waiting: Waiting, flow: bool) -> None:
    waiting.apply(port("a", [1, 2]), port("b", OTHERS))
    number = waiting.id_of(1)
    waiting.bench.count_open(number, 1, flow=flow)
    waiting.apply(port("a", [2]))
    assert waiting.apply(port("c", [40, 41]))
    waiting.pass_time()
    assert waiting.reasons() == {number: RemovalReason.GONE}
    assert len(waiting.writer.capacity_errors) == 1
    waiting.bench.count_open(number, -1, flow=flow)
    waiting.sweep()
    assert waiting.writer.capacity_errors == []
    assert waiting.selected("c") == {"40", "41"}


def _with_ids(waiting: Waiting) -> ServicePort:
    """No id is left for two of these endpoints."""
    waiting.apply(port("b", OTHERS))
    return port("a", [1, 2, 40, 41])


def _with_slots(waiting: Waiting) -> ServicePort:
    """All slots are taken by weights."""
    waiting.apply(port("b", [20, 21], weights={20: 32, 21: 29}), port("d", [22]))
    assert waiting.writer.free_slots == 1
    return port("a", [1, 2])


@pytest.mark.parametrize("fill", [_with_ids, _with_slots])
def test_endpoint_that_is_back_in_a_service_without_room_is_waited_for_no_longer(
    waiting: Waiting, fill: Callable[[Waiting], ServicePort]
) -> None:
    """Its connections go on, whether it can be chosen again or not."""
    waiting.apply(port("a", [1, 2]))
    number = waiting.id_of(1)
    waiting.bench.count_open(number, 1, flow=False)
    waiting.apply(port("a", [2]))
    waiting.writer.reclaim(waiting.writer.take_retired())
    assert waiting.apply(fill(waiting))
    waiting.pass_time()
    waiting.pass_time()
    assert RemovalReason.GONE not in waiting.reasons().values()
    assert waiting.id_of(1) == number
    # And not if it is removed once more.
    waiting.apply(port("a", [2, 50, 51, 52]) if fill is _with_ids else port("a", [2]))
    waiting.pass_time()
    assert waiting.reasons() == {number: RemovalReason.GONE}


def test_removed_endpoint_leaves_a_service_whose_new_ones_have_no_room(waiting: Waiting) -> None:
    """It takes no new connections, its id is free after the wait, and then the next one has it."""
    waiting.apply(port("a", [1, 2]), port("b", [*OTHERS, 33]))
    (why,) = waiting.apply(port("a", [2, 40]))
    assert "all 16 ids are in use" in why
    assert waiting.selected("a") == {"2"}
    waiting.pass_time()
    assert waiting.writer.capacity_errors == []
    assert waiting.selected("a") == {"2", "40"}


def test_all_endpoints_are_replaced_where_there_is_no_room_for_both(waiting: Waiting) -> None:
    waiting.apply(port("a", [1, 2]), port("b", [*OTHERS, 33]))
    waiting.apply(port("a", [40, 41]))
    waiting.pass_time()
    assert waiting.writer.capacity_errors == []
    assert waiting.selected("a") == {"40", "41"}


def test_terminating_endpoints_serve_while_those_that_follow_have_no_room(waiting: Waiting) -> None:
    waiting.apply(port("a", [1, 2]), port("b", [*OTHERS, 33]))
    assert waiting.apply(port("a", [40, 41], terminating=(1, 2)))
    assert waiting.selected("a") == {"1", "2"}
    assert waiting.apply(port("a", [2, 41], terminating=(1,)))
    assert waiting.selected("a") == {"2"}


def test_weights_and_frontends_of_a_service_without_room_change(waiting: Waiting) -> None:
    """What it has room for is as its objects say; what a map refused of that is tried again with all endpoints."""
    waiting.apply(port("a", [1, 2]), port("b", [*OTHERS, 33]))
    wanted = port("a", [1, 2, 40], weights={1: 4, 40: 7}, affinity=60, address=9)
    assert waiting.apply(wanted)
    assert {row.frontend for row in waiting.bench.rows if row.name == "a"} >= {"10.96.0.9:80/TCP"}
    assert {row.affinity for row in waiting.bench.rows if row.name == "a"} == {60}
    waiting.apply(port("b", OTHERS))
    waiting.pass_time()
    assert waiting.writer.capacity_errors == []
    assert waiting.selected("a") == {"1", "2", "40"}
