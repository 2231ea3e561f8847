"""The writer on real maps: restarts, kills, what does not fit, who keeps which id."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from ebpfproxy.config.datapath import MAGLEV_SIZES
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.services import maglev
from ebpfproxy.datapath.services.selection_table import NO_SLOTS
from ebpfproxy.services.model import (
    Algorithm,
    BackendState,
    Policy,
    Prefix,
    ServicePort,
)
from tests.datapath.writing import (
    ROUND,
    SMALL,
    TABLE,
    Bench,
    KilledError,
    backend,
    check,
    expected_rows,
    port,
    seen_rows,
)

pytestmark = pytest.mark.root


def test_a_change_is_published_in_an_order_in_which_each_step_finds_what_it_refers_to(bench: Bench) -> None:
    """The order of ``datapath.services.publish``: of a new service port, and of one that replaces it."""
    writer = bench.empty()
    prefix = Prefix(bytes([192, 0, 2, 0]), 24)
    first, second = (
        msgspec.structs.replace(port(name, [n], affinity=60, address=7), source_ranges=(prefix,))
        for name, n in (("a", 1), ("b", 2))
    )
    assert bench.maps is not None
    words: tuple[tuple[int, int], ...] = (NO_SLOTS, NO_SLOTS)
    seen: list[str] = []

    def look(text: str) -> None:
        """Notes a step, after what has been stored in memory since the one before."""
        nonlocal words
        assert bench.maps is not None
        table = bench.maps.selections()
        now = tuple(table.ranges(number)[Policy.CLUSTER] for number in range(2))
        if now != words:
            # What the word leads to is there: the backend's record by its slot.
            for used in (used for used in now if used not in words and used[1]):
                (number,) = backend_ids(table.slots(used))
                assert bench.records[number][1] is BackendState.ACTIVE
            seen.append("selections")
            words = now
        seen.append(text)

    def watch(name: str, what: str) -> AbstractContextManager[object]:
        assert bench.maps is not None
        real = getattr(bench.maps[name], what)

        def call(entries: Any) -> object:
            if entries:
                look(f"{'-' if what == 'delete' else '+'} {name}")
            return real(entries)

        return patch.object(bench.maps[name], what, call)

    with ExitStack() as stack:
        for name in ("service_names", "members", "source_ranges", "services4", "departures"):
            for what in ("update_many", "delete"):
                stack.enter_context(watch(name, what))
        writer.apply([first], complete=True)
        assert seen == [
            "+ service_names",
            "+ members",
            "selections",
            "+ source_ranges",
            # All other ports of the cluster IP, then its own.
            "+ services4",
            "+ services4",
        ]
        seen.clear()
        writer.apply([second], [first.key])
        assert seen == [
            "+ service_names",
            "+ members",
            "selections",
            "- members",
            "+ source_ranges",
            "+ services4",
            "- services4",
            "- source_ranges",
            "- service_names",
            "+ departures",
        ]


def test_after_a_restart_states_do_not_flicker_where_users_differ(bench: Bench) -> None:
    """A backend that is terminating for one Service and drained for another stays drained all the time."""
    writer = bench.empty()
    wanted = [port("a", [1], leaving=(1,)), port("b", [2], drained=[1])]
    writer.apply(wanted, complete=True)
    assert {str(state) for _, state in bench.records.values()} == {"drained", "active"}
    writer = bench.reopen()
    writer.apply(wanted, complete=True)
    assert bench.writes()["backends"] == 0


def test_a_backend_that_a_killed_agent_was_about_to_let_go_is_active_again(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    assert bench.maps is not None
    with (
        patch.object(bench.maps["service_names"], "update_many", side_effect=KilledError),
        pytest.raises(KilledError),
    ):
        writer.apply([port("a", [])])
    bench.reopen().apply([port("a", [1])], complete=True)
    assert seen_rows(bench.rows) == expected_rows({port("a", [1]).key: port("a", [1])})


@pytest.mark.parametrize("what", ["slots", "ids"])
def test_where_room_runs_out_within_a_change_readers_still_see_the_old_set_or_the_new_one(
    bench: Bench, what: str
) -> None:
    """What one service port has given up is used for the next only when nobody sees it any more."""
    every = dict.fromkeys(range(1, 7), 4)
    if what == "slots":
        # 25 of 64 slots each; then 4 and 25 more.
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
    assert len(seen) > 3, "in between, too"


def test_what_did_not_fit_is_tried_again(bench: Bench) -> None:
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
    assert writer.capacity_errors == problems, "nothing has been given back"
    writer.apply((), [third.key, first.key])
    assert writer.capacity_errors == problems[:1], "who is gone does not wait any more"
    writer.reclaim(writer.take_retired())
    writer.retry()
    assert writer.capacity_errors == []
    check(bench, {second.key: second}, {})


def test_a_maglev_table_is_smaller_where_there_is_no_room_until_there_is(bench: Bench) -> None:
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


def test_a_table_for_which_there_is_no_room_is_not_made(bench: Bench) -> None:
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=600), MAGLEV_SIZES[-1])
    with patch.object(maglev, "table", wraps=maglev.table) as made:
        (problem,) = writer.apply([port("a", [1, 2, 3], algorithm=Algorithm.MAGLEV)])
    assert "its Maglev table has only 509 places" in str(problem)
    assert [call.args[2] for call in made.call_args_list] == [509]


def test_a_maglev_table_that_has_grown_with_its_backends_gets_what_was_given_back(bench: Bench) -> None:
    """Three changes of a table of 509 places in a range of 1,100."""
    writer = bench.empty(msgspec.structs.replace(SMALL, slots=1100, backends=300))
    for missing in (1, 2, 3):
        chosen = [n for n in range(254) if n != missing]
        assert writer.apply([port("a", chosen, algorithm=Algorithm.MAGLEV)]) == []


def test_what_a_map_refused_is_said_until_there_is_room(bench: Bench) -> None:
    """Source ranges: the map is a tree that takes 16."""
    writer = bench.empty()
    ranges = tuple((bytes([198, 51, 100, n]), 32) for n in range(12))
    first, second = (msgspec.structs.replace(port(name, [1]), source_ranges=ranges) for name in "ab")
    assert writer.apply([first], complete=True) == []
    (problem,) = writer.apply([second])
    assert str(problem) == "shop/b:http (IPv4): no room in source_ranges, and 7 more"
    assert writer.apply([port("c", [1])]) == []
    writer.retry()
    assert [each.key.name for each in writer.capacity_errors] == ["b"], "others' changes do not hide it"
    writer.apply((), [first.key])
    writer.retry()
    assert writer.capacity_errors == []
    assert bench.maps is not None
    assert len(list(bench.maps["source_ranges"].items())) == len(ranges)
    before = bench.writes()
    assert writer.apply([second]) == []
    assert bench.writes() == before


def test_frontends_without_room_are_tried_again(bench: Bench) -> None:
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


def test_what_never_fitted_and_is_gone_is_not_tried_again(bench: Bench) -> None:
    writer = bench.empty()
    assert len(writer.apply([port("a", list(range(1, 20)))])) == 1
    writer.apply([port("b", [1])], complete=True)
    assert writer.capacity_errors == []


def test_a_change_of_weights_or_of_the_algorithm_is_one_of_slots(bench: Bench) -> None:
    """And the same again is none."""
    writer = bench.empty(ROUND)
    writer.apply([port("a", [1, 2])], complete=True)
    for p, slots in (
        (port("a", [1, 2], weights={1: 3}), 4),
        (port("a", [1, 2], weights={1: 3}, algorithm=Algorithm.ROUND_ROBIN), 0),
        (port("a", [1, 2], weights={1: 6, 2: 2}, algorithm=Algorithm.ROUND_ROBIN), 0),
        (port("a", [1, 2], weights={1: 3}, algorithm=Algorithm.LEAST_CONNECTIONS), 2),
        (port("a", [1, 2], algorithm=Algorithm.LEAST_CONNECTIONS), 2),
        (port("a", [1, 2], algorithm=Algorithm.MAGLEV), TABLE),
        (port("a", [1], algorithm=Algorithm.MAGLEV), 1),
    ):
        for expected in (slots, 0):
            before = bench.writes()["slots"]
            assert writer.apply([p]) == []
            assert bench.writes()["slots"] - before == expected
        check(bench, {p.key: p}, {})


def test_the_id_of_a_backend_that_is_gone_rests_while_something_is_open_to_it(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    number = next(n for n, (each, _) in bench.records.items() if each == backend(1))
    bench.count_open(number, 1, flow=True)
    writer.apply([port("a", [2])])
    for _ in range(2):
        writer.reclaim(writer.take_retired())
        assert bench.records[number] == (backend(1), BackendState.GONE)
        assert writer.apply([port("a", [2, *range(20, 33)])]) == [], "all others"
        problems = writer.apply([port("a", [2, *range(20, 35)])])
        assert len(problems) == 1
        assert "no room for its backends" in str(problems[0])
        writer = bench.reopen()
        writer.apply([port("a", [2])], complete=True)
    bench.count_open(number, -1, flow=True)
    writer.forget_removed_backends(writer.removed_backends)
    writer.reclaim(writer.take_retired())
    assert number not in bench.records
    assert writer.apply([port("a", [2, *range(20, 35)])]) == []


def test_a_backend_that_comes_back_while_something_is_open_has_another_id(bench: Bench) -> None:
    """What is open was open to the one that went: it is not counted for its successor."""
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    bench.count_open(0, 1, flow=False)
    for p in (port("a", []), port("a", [1])):
        writer.apply([p])
        writer.reclaim(writer.take_retired())
    assert bench.records == {
        0: (backend(1), BackendState.GONE),
        1: (backend(1), BackendState.ACTIVE),
    }
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]


def test_of_two_records_of_one_backend_a_restart_finds_the_one_that_is_used(bench: Bench) -> None:
    """It has left and come back, under a lower id, and the agent was killed before it was taken out."""
    writer = bench.empty()
    writer.apply([port("a", list(range(1, 17)))], complete=True)
    last = next(each for n, (each, _) in bench.records.items() if n == 15).address[3]
    writer.apply([port("a", [last])])
    writer.reclaim(writer.take_retired())
    writer.apply([port("a", [])])
    writer.apply([port("a", [last])])
    assert bench.slots(0, Policy.CLUSTER) == [(0, 0)]
    writer = bench.reopen()
    before = bench.writes()
    writer.apply([port("a", [last])], complete=True)
    after = bench.writes()
    assert {name: n - before[name] for name, n in after.items() if n != before[name]}.keys() <= {"departures"}
    writer.reclaim(writer.take_retired())
    assert bench.slots(0, Policy.CLUSTER) == [(0, 0)]
    assert bench.records == {0: (backend(last), BackendState.ACTIVE)}
    writer.apply([], complete=True)
    writer.reclaim(writer.take_retired())
    assert bench.records == {}


@pytest.mark.parametrize("other", [0, 5])
def test_a_second_record_that_nobody_marked_is_not_taken_for_the_one_that_is_used(
    bench: Bench, other: int
) -> None:
    """As an agent leaves it that is killed between the one and the other."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    writer.apply([port("a", [2])])
    writer.reclaim(writer.take_retired())
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]
    assert bench.maps is not None
    shared = bench.maps.shared("backends")
    packed = layout.pack_backend(backend(2), BackendState.ACTIVE)
    shared.bytes[other * shared.stride : other * shared.stride + len(packed)] = packed
    writer = bench.reopen()
    writer.apply([port("a", [2])], complete=True)
    assert bench.slots(0, Policy.CLUSTER) == [(1, 0)]
    writer.reclaim(writer.take_retired())
    assert bench.records == {1: (backend(2), BackendState.ACTIVE)}


def test_what_was_counted_for_an_id_is_nothing_to_the_next_that_has_it(bench: Bench) -> None:
    """Words that have wrapped, and ends of what began before they were counted."""
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    bench.count_open(0, -1, flow=False)
    for step in (1, -1, -1):
        bench.count_open(0, step, flow=True)
    writer.apply([port("a", [])])
    writer.reclaim(writer.take_retired())
    assert bench.records == {}
    assert bench.maps is not None
    assert not any(bench.maps.shared("loads").bytes)


def test_members_without_a_service_port_go_with_the_first_complete_state(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2], affinity=60)], complete=True)
    assert bench.maps is not None
    bench.maps["members"].update(layout.pack_member(9, 3), layout.U32.pack(1))
    writer = bench.reopen()
    assert bench.members == {(0, 0), (0, 1), (9, 3)}
    writer.apply([port("a", [1, 2], affinity=60)], complete=True)
    assert bench.members == {(0, 0), (0, 1)}
    writer.apply([port("a", [1, 2], affinity=0)])
    assert bench.members == set()


def test_a_change_writes_its_slots_and_one_word_only(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2]), port("b", [1, 2, 3])], complete=True)
    assert bench.maps is not None
    before = {name: each.writes for name, each in bench.maps.maps.items()}
    writer.apply([port("a", [1, 3])])
    after = {name: each.writes - before[name] for name, each in bench.maps.maps.items()}
    # And that backend 2 has left, for the flows that have it.
    assert {name: n for name, n in after.items() if n} == {"slots": 2, "selections": 1, "departures": 1}


def test_ids_stay_across_restarts_and_are_reused_last(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2]), port("b", [3])], complete=True)
    assert bench.maps is not None
    ids = {row.address: row.id for row in Dump(bench.maps).backends()}
    writer = bench.reopen()
    writer.apply([port("a", [2]), port("b", [3, 4])], complete=True)
    writer.reclaim(writer.take_retired())
    after = {row.address: row.id for row in Dump(bench.maps).backends()}
    assert after["10.0.0.2:80"] == ids["10.0.0.2:80"]
    assert after["10.0.0.3:80"] == ids["10.0.0.3:80"]
    assert after["10.0.0.4:80"] not in ids.values(), "a fresh id while there are any"


def test_a_frontend_that_moves_to_another_service_is_never_missing(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1], address=7)], complete=True)
    taken = port("b", [2], address=7)
    given_up = port("a", [1], address=8)
    writer.apply([given_up, taken])
    rows = seen_rows(bench.rows)
    assert rows["b", "10.96.0.7:80", "internal"] == [("10.0.0.2:80", "active")]
    assert ("a", "10.96.0.7:80", "internal") not in rows


def test_what_does_not_fit_is_said_and_the_old_state_stays(bench: Bench) -> None:
    writer = bench.empty()
    assert writer.apply([port("a", [1, 2])], complete=True) == []
    before = seen_rows(bench.rows)
    problems = writer.apply([port("a", list(range(1, 20)))])
    assert len(problems) == 1
    assert "shop/a:http" in str(problems[0])
    assert "no room for its backends" in str(problems[0])
    assert seen_rows(bench.rows) == before
    assert writer.apply([port("a", list(range(1, 17)))]) == [], "what fits is programmed"


def test_ids_that_are_only_resting_are_used_when_nothing_else_is_left(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", list(range(1, 17)))], complete=True)
    assert writer.apply([port("a", [1])]) == []
    assert writer.apply([port("a", list(range(20, 35)))]) == [], (
        "a grace period frees those that were retired"
    )


def test_leftovers_of_a_killed_agent_go_with_the_first_complete_state(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1]), port("b", [2])], complete=True)
    writer = bench.reopen()
    assert len(bench.rows) == 8, "nothing goes before everything is known"
    writer.apply([port("b", [2])], complete=True)
    assert {row.name for row in bench.rows} == {"b"}


def test_other_ports_of_an_address_that_the_node_has_are_not_rejected_after_a_kill(bench: Bench) -> None:
    """Between the mark and the entry for other ports."""
    writer = bench.empty()
    dns = port("a", [1], number=53)
    writer.apply([dns], complete=True)
    assert bench.maps is not None
    table = bench.maps["services4"]
    address = dns.frontends[0].address
    other_ports, _ = layout.pack_cluster_ip(address)
    with patch.object(table, "delete", side_effect=KilledError), pytest.raises(KilledError):
        writer.set_own_addresses(frozenset({address}), frozenset({address}))
    assert table.lookup(other_ports) is not None
    writer = bench.reopen()
    writer.set_own_addresses(frozenset({address}), frozenset({address}))
    writer.apply([dns], complete=True)
    assert bench.maps["services4"].lookup(other_ports) is None
    writer.set_own_addresses(frozenset(), frozenset())
    assert bench.maps["services4"].lookup(other_ports) is not None


def test_node_addresses_follow_the_node(bench: Bench) -> None:
    writer = bench.empty()
    one, two = bytes([172, 18, 0, 1]), bytes(15) + b"\x09"
    for addresses in ({one, two}, {two}, {one}):
        writer.set_node_addresses(frozenset(addresses))
        assert bench.maps is not None
        assert bench.maps["node_addresses"].count() == len(addresses)
    bench.reopen().set_node_addresses(frozenset({one}))
    assert bench.writes()["node_addresses"] == 0
