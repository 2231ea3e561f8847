"""The writer on real maps: restarts, kills, capacity errors and ids of backends."""

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
    FEW_IDS,
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


def test_map_writes_of_a_change_are_ordered_so_that_no_reference_dangles(bench: Bench) -> None:
    """Checks the order of ``datapath.services.publish`` for a new service port and for one that replaces it."""
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
        """Appends a step, and before it the selections if they have changed in shared memory."""
        nonlocal words
        assert bench.maps is not None
        table = bench.maps.selections()
        now = tuple(table.ranges(number)[Policy.CLUSTER] for number in range(2))
        if now != words:
            # The slots and backend records that a selection refers to exist.
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
            # The entry for all other ports of the cluster IP is written before that of its port.
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


def test_state_shared_by_services_does_not_change_during_a_restart(bench: Bench) -> None:
    """A backend that is terminating for one Service and drained for another stays drained all the time."""
    writer = bench.empty()
    wanted = [port("a", [1], terminating=(1,)), port("b", [2], drained=[1])]
    writer.apply(wanted, complete=True)
    assert {str(state) for _, state in bench.records.values()} == {"drained", "active"}
    writer = bench.reopen()
    writer.apply(wanted, complete=True)
    assert bench.writes()["backends"] == 0


def test_backend_whose_removal_was_interrupted_becomes_active_again(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    assert bench.maps is not None
    with (
        patch.object(bench.maps["members"], "update_many", side_effect=KilledError),
        pytest.raises(KilledError),
    ):
        writer.apply([port("a", [])])
    bench.reopen().apply([port("a", [1])], complete=True)
    assert seen_rows(bench.rows) == expected_rows({port("a", [1]).key: port("a", [1])})


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


def test_change_of_weights_or_algorithm_replaces_slots(bench: Bench) -> None:
    """The same service port again is no change."""
    writer = bench.empty(FEW_IDS)
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


def test_id_of_a_removed_backend_is_not_reused_while_connections_are_open(bench: Bench) -> None:
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


def test_backend_added_again_while_connections_are_open_gets_a_new_id(bench: Bench) -> None:
    """Open connections to the removed backend are not counted for the new one."""
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


def test_restart_adopts_the_selected_one_of_two_records_of_a_backend(bench: Bench) -> None:
    """A backend is removed and added again with a lower id, and the agent is killed before the old record is deleted."""
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
def test_restart_does_not_adopt_an_unselected_active_record(bench: Bench, other: int) -> None:
    """An agent that is killed between the two writes leaves such records."""
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


def test_counts_of_an_id_are_reset_for_its_next_backend(bench: Bench) -> None:
    """Counters may have wrapped, or have counted only the end of a connection."""
    writer = bench.empty()
    writer.apply([port("a", [1])], complete=True)
    bench.count_open(0, -1, flow=False)
    for step in (1, -1, -1):
        bench.count_open(0, step, flow=True)
    writer.apply([port("a", [])])
    writer.reclaim(writer.take_retired())
    assert bench.records == {}
    assert bench.maps is not None
    assert not any(bench.maps.shared("backends").bytes)


def test_members_without_a_service_port_are_removed_with_the_first_complete_state(bench: Bench) -> None:
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


def test_change_writes_only_its_slots_and_one_selection(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1, 2]), port("b", [1, 2, 3])], complete=True)
    assert bench.maps is not None
    before = {name: each.writes for name, each in bench.maps.maps.items()}
    writer.apply([port("a", [1, 3])])
    after = {name: each.writes - before[name] for name, each in bench.maps.maps.items()}
    # The departure tells the sweep that backend 2 is removed from the Service.
    assert {name: n for name, n in after.items() if n} == {"slots": 2, "selections": 1, "departures": 1}


def test_ids_are_kept_across_restarts_and_reused_last(bench: Bench) -> None:
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
    assert after["10.0.0.4:80"] not in ids.values(), "unused ids are allocated first"


def test_frontend_that_moves_to_another_service_is_never_missing(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1], address=7)], complete=True)
    taken = port("b", [2], address=7)
    given_up = port("a", [1], address=8)
    writer.apply([given_up, taken])
    rows = seen_rows(bench.rows)
    assert rows["b", "10.96.0.7:80", "internal"] == [("10.0.0.2:80", "active")]
    assert ("a", "10.96.0.7:80", "internal") not in rows


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


def test_leftovers_of_a_killed_agent_are_removed_with_the_first_complete_state(bench: Bench) -> None:
    writer = bench.empty()
    writer.apply([port("a", [1]), port("b", [2])], complete=True)
    writer = bench.reopen()
    assert len(bench.rows) == 8, "nothing is removed before the first complete state"
    writer.apply([port("b", [2])], complete=True)
    assert {row.name for row in bench.rows} == {"b"}


def test_unused_ports_of_a_node_address_are_not_rejected_after_a_kill(bench: Bench) -> None:
    """The agent is killed after it writes the mark and before it deletes the entry for other ports."""
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


def test_node_addresses_are_updated(bench: Bench) -> None:
    writer = bench.empty()
    one, two = bytes([172, 18, 0, 1]), bytes(15) + b"\x09"
    for addresses in ({one, two}, {two}, {one}):
        writer.set_node_addresses(frozenset(addresses))
        assert bench.maps is not None
        assert bench.maps["node_addresses"].count() == len(addresses)
    bench.reopen().set_node_addresses(frozenset({one}))
    assert bench.writes()["node_addresses"] == 0


def test_removals_without_room_are_told_once_there_is_room(bench: Bench) -> None:
    """Flows learn of a removal from a map; the writer does not take those that it refused for lost entries."""
    writer = bench.empty(FEW_IDS)
    count = FEW_IDS.backends // 2 + 2
    for numbers in (range(1, count + 1), ()):
        assert writer.apply([port("a", list(numbers)), port("b", list(numbers))]) == []
        assert bench.drift() == []
    assert bench.maps is not None
    told = bench.maps["departures"]
    assert (told.count(), len(writer.removed_backends)) == (FEW_IDS.backends, 2 * count)
    over = {use: each for use, each in writer.removed_backends.items() if use.service_id == 0}
    writer.forget_removed_backends(over)
    assert told.count() == len(writer.removed_backends) == count
    assert bench.drift() == []
