"""What the writer does with service ports for which a map has no room."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import msgspec
import pytest

from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.datapath.services import maglev
from ebpfproxy.services.model import (
    Algorithm,
    Policy,
    ServicePort,
)
from tests.datapath.writing import (
    SMALL,
    Bench,
    check,
    expected_rows,
    port,
    seen_rows,
)

pytestmark = pytest.mark.root


@pytest.mark.parametrize("what", ["slots", "ids"])
def test_capacity_error_within_a_change_leaves_readers_the_old_or_the_new_set(
    bench: Bench, what: str
) -> None:
    """Slots and ids that one service port releases are reused only after no reader can see them."""
    every = dict.fromkeys(range(1, 7), 4)
    if what == "slots":
        # The service ports use 25 of 64 slots each, then 4 and 25 more.
        first = [port("a", [*every, 7], weights=every), port("b", [*every, 8], weights=every)]
        then = [port("a", [1, 2, 3, 4]), port("c", [*every, 9], weights=every)]
    else:
        first = [port("a", [*range(1, 15)])]
        then = [port("a", [30]), port("c", [*range(40, 52)])]
    writer = bench.empty()
    assert writer.apply(first, complete=True) == []

    def chosen(rows: Mapping[tuple[str, str, str], list[tuple[str, str]]]) -> list[list[str]]:
        return [[address for address, _ in row] for key, row in rows.items() if key[0] == "a"]

    old, new = (chosen(expected_rows({p.key: p for p in each})) for each in (first, then))
    assert bench.maps is not None
    seen: list[list[list[str]]] = []

    def look(entries: dict[bytes, bytes]) -> list[bytes]:
        seen.append(chosen(seen_rows(bench.rows)))
        return real(entries)

    for table in ("service_names", "members", "services4"):
        real = bench.maps[table].update_many
        with patch.object(bench.maps[table], "update_many", side_effect=look):
            assert writer.apply(then) == []
        writer.reclaim(writer.take_retired())
        assert all(each in (old, new) for each in seen)
        for each in ([], first):
            assert writer.apply(each, complete=True) == []
            writer.reclaim(writer.take_retired())
    assert len(seen) > 3, "readers also run within the change"


def test_service_ports_that_exceeded_capacity_are_retried(bench: Bench) -> None:
    writer = bench.empty()
    every = dict.fromkeys(range(1, 9), 5)
    first = port("a", [*every, 9], weights=every)
    second, third = port("b", [*every, 9], weights=every), port("c", [*every, 10], weights=every)
    assert writer.apply([first], complete=True) == []
    problems = writer.apply([second, third])
    assert [str(problem).partition(": no room for its slots")[0] for problem in problems] == [
        "shop/b:http (IPv4)",
        "shop/c:http (IPv4)",
    ]
    assert writer.capacity_errors == problems
    writer.retry()
    assert writer.capacity_errors == problems
    with patch.object(writer, "apply") as apply:
        writer.retry()
        apply.assert_not_called()
    assert writer.capacity_errors == problems, "no slot has been released"
    writer.apply((), [third.key, first.key])
    assert writer.capacity_errors == problems[:1], "a removed service port is no longer pending"
    writer.reclaim(writer.take_retired())
    writer.retry()
    assert writer.capacity_errors == []
    check(bench, {second.key: second}, {})


def test_service_ports_of_a_first_list_that_do_not_fit_leave_no_backends(bench: Bench) -> None:
    """The first list fits as far as its service ports would, had they come one after the other."""
    writer = bench.empty()
    first, second, third = port("a", range(1, 11)), port("b", range(11, 21)), port("c", range(21, 27))
    (problem,) = writer.apply([first, second, third], complete=True)
    assert "shop/b:http (IPv4): no room for its backends" in str(problem)
    check(bench, {each.key: each for each in (first, third)}, {})
    assert {each for each, _ in bench.records.values()} == {*first.cluster, *third.cluster}
    assert bench.drift() == []


def test_backends_of_a_first_list_are_retired_where_their_slots_do_not_fit(bench: Bench) -> None:
    writer = bench.empty()
    every = dict.fromkeys(range(1, 9), 9)
    first, second = port("a", [1, 2]), port("b", [*every, 9], weights=every)
    (problem,) = writer.apply([first, second], complete=True)
    assert "shop/b:http (IPv4): no room for its slots" in str(problem)
    check(bench, {first.key: first}, {})
    writer.reclaim(writer.take_retired())
    assert {each for each, _ in bench.records.values()} == set(first.cluster)
    assert writer.apply([port("b", range(3, 17))]) == []


def test_maglev_table_is_smaller_until_slots_suffice(bench: Bench) -> None:
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=800), MAGLEV_SIZES[1])
    first, second = (port(name, [1, 2, 3], algorithm=Algorithm.MAGLEV) for name in "ab")
    assert writer.apply([first], complete=True) == []
    (problem,) = writer.apply([second])
    assert str(problem) == (
        "shop/b:http (IPv4): its Maglev table has only 251 places, unlike on other nodes: no room for more"
    )
    assert len(bench.slots(bench.service_ids[second.key], Policy.CLUSTER)) == 251
    assert writer.capacity_errors == [problem]
    writer.apply((), [first.key])
    writer.reclaim(writer.take_retired())
    writer.retry()
    assert writer.capacity_errors == []
    assert len(bench.slots(bench.service_ids[second.key], Policy.CLUSTER)) == 509


def test_maglev_table_that_exceeds_free_slots_is_not_computed(bench: Bench) -> None:
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=600), MAGLEV_SIZES[-1])
    with patch.object(maglev, "table", wraps=maglev.table) as made:
        (problem,) = writer.apply([port("a", [1, 2, 3], algorithm=Algorithm.MAGLEV)])
    assert "its Maglev table has only 509 places" in str(problem)
    assert [call.args[2] for call in made.call_args_list] == [509]


def test_grown_maglev_table_reuses_released_slots(bench: Bench) -> None:
    """A table of 509 places changes three times in 1,100 slots."""
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=1100, backends=300))
    for missing in (1, 2, 3):
        chosen = [n for n in range(254) if n != missing]
        assert writer.apply([port("a", chosen, algorithm=Algorithm.MAGLEV)]) == []


def test_entries_that_a_full_map_rejected_are_reported_until_they_fit(bench: Bench) -> None:
    """The LPM trie of source ranges has a capacity of 16."""
    writer = bench.empty()
    ranges = tuple((bytes([198, 51, 100, n]), 32) for n in range(12))
    first, second = (msgspec.structs.replace(port(name, [1]), source_ranges=ranges) for name in "ab")
    assert writer.apply([first], complete=True) == []
    (problem,) = writer.apply([second])
    assert str(problem) == "shop/b:http (IPv4): no room in source_ranges, and 7 more"
    assert writer.apply([port("c", [1])]) == []
    writer.retry()
    assert [each.key.name for each in writer.capacity_errors] == ["b"], (
        "changes of other service ports keep the report"
    )
    writer.apply((), [first.key])
    writer.retry()
    assert writer.capacity_errors == []
    assert bench.maps is not None
    assert len(list(bench.maps["source_ranges"].items())) == len(ranges)
    before = bench.writes()
    assert writer.apply([second]) == []
    assert bench.writes() == before


def test_frontends_that_exceeded_capacity_are_retried(bench: Bench) -> None:
    writer = bench.empty()

    def with_ports(name: str, number: int) -> ServicePort:
        made = port(name, [1])
        (cluster_ip, _) = made.frontends
        frontends = tuple(cluster_ip._replace(port=1000 + n) for n in range(number))
        return msgspec.structs.replace(made, frontends=frontends)

    room = SMALL.frontends
    first, second = with_ports("a", room - 10), with_ports("b", 12)
    assert writer.apply([first], complete=True) == []
    (problem,) = writer.apply([second])
    assert "shop/b:http (IPv4): no room in services4 for 10.96.0.98:10" in str(problem)
    assert writer.capacity_errors == [problem]
    assert writer.apply([with_ports("a", room - 20)]) == []
    writer.retry()
    assert writer.capacity_errors == []
    assert len({row.frontend for row in bench.rows if row.name == "b"}) == 12


def test_removed_service_port_that_exceeded_capacity_is_not_retried(bench: Bench) -> None:
    writer = bench.empty()
    assert len(writer.apply([port("a", list(range(1, 20)))])) == 1
    writer.apply([port("b", [1])], complete=True)
    assert writer.capacity_errors == []


def test_capacity_errors_are_reported_and_the_old_state_is_kept(bench: Bench) -> None:
    writer = bench.empty()
    assert writer.apply([port("a", [1, 2])], complete=True) == []
    before = seen_rows(bench.rows)
    problems = writer.apply([port("a", list(range(1, 20)))])
    assert len(problems) == 1
    assert "shop/a:http" in str(problems[0])
    assert "no room for its backends" in str(problems[0])
    assert seen_rows(bench.rows) == before
    assert writer.apply([port("a", list(range(1, 17)))]) == [], "service ports within capacity are programmed"


def test_released_ids_are_reused_before_capacity_is_exceeded(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", list(range(1, 17)))], complete=True)
    assert writer.apply([port("a", [1])]) == []
    assert writer.apply([port("a", list(range(20, 35)))]) == [], (
        "a grace period frees those that were retired"
    )
