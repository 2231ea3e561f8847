"""The writer on real maps: restarts, kills, capacity errors and ids of backends."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.arrays import backend_ids
from ebpfproxy.datapath.abi.flow_layout import BackendUse, unpack_departure
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.datapath.services import adopt
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.selection_table import NO_SLOTS, SelectionTable
from ebpfproxy.services.model import (
    Algorithm,
    BackendState,
    Policy,
    Prefix,
)
from tests.datapath.writing import (
    FEW_IDS,
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
            "+ departures",
            "- service_names",
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


def test_backend_that_has_come_back_is_not_removed_any_more_when_it_can_be_chosen(bench: Bench) -> None:
    """The sweep ends all flows of a removed backend, and an agent may be killed after any write."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    writer.apply([port("a", [2], idle=[1])])
    assert bench.maps is not None
    ((_, number),) = map(unpack_departure, bench.maps["departures"].keys())
    assert bench.records[number][0] == backend(1)
    with (
        patch.object(bench.maps["departures"], "delete", side_effect=KilledError),
        pytest.raises(KilledError),
    ):
        writer.apply([port("a", [1, 2])])
    assert number not in dict(bench.slots(0, Policy.CLUSTER))
    writer = bench.reopen()
    writer.apply([port("a", [1, 2])], complete=True)
    assert number in dict(bench.slots(0, Policy.CLUSTER))
    assert not bench.maps["departures"].keys()


def test_backend_that_is_still_not_ready_stays_removed_across_a_start(bench: Bench) -> None:
    """Nothing is open to it: datagram sockets that are not connected have records of their own."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    wanted = [port("a", [2], idle=[1])]
    writer.apply(wanted)
    assert bench.maps is not None
    removed = bench.maps["departures"].keys()
    assert removed
    writer = bench.reopen()
    writer.apply(wanted, complete=True)
    assert bench.maps["departures"].keys() == removed


@pytest.mark.parametrize("stays", [True, False], ids=["still not ready", "ready again"])
@pytest.mark.parametrize("killed_at", ["before the removal", "before the epoch", "after both"])
def test_flows_leave_a_backend_though_the_agent_is_killed_meanwhile(
    bench: Bench, killed_at: str, *, stays: bool
) -> None:
    """The next one removes it, or withdraws the removal."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    wanted = [port("a", [2], idle=[1])]
    assert bench.maps is not None
    number = next(n for n, (each, _) in bench.records.items() if each == backend(1))
    bench.count_open(number, 1, flow=True)
    epoch = bench.maps.shared("epochs").words()[0]
    target, what = {
        "before the removal": (bench.maps["departures"], "update_many"),
        "before the epoch": (RemovedBackends, "look_again"),
        "after both": (Backends, "settle"),
    }[killed_at]
    with patch.object(target, what, side_effect=KilledError), pytest.raises(KilledError):
        writer.apply(wanted)
    writer = bench.reopen()
    writer.apply(wanted if stays else [port("a", [1, 2])], complete=True)
    assert [*map(unpack_departure, bench.maps["departures"].keys())] == ([(0, number)] if stays else [])
    assert not stays or bench.maps.shared("epochs").words()[0] > epoch
    assert (number in dict(bench.slots(0, Policy.CLUSTER))) is not stays


def test_backend_that_was_about_to_come_back_is_removed_once_more(bench: Bench) -> None:
    """The agent was killed when it had withdrawn the removal, and now the endpoint is not ready."""
    writer = bench.empty()
    writer.apply([port("a", [1, 2])], complete=True)
    assert bench.maps is not None
    number = next(n for n, (each, _) in bench.records.items() if each == backend(1))
    bench.count_open(number, 1, flow=True)
    writer.apply([port("a", [2], idle=[1])])
    with patch.object(SelectionTable, "select", side_effect=KilledError), pytest.raises(KilledError):
        writer.apply([port("a", [1, 2])])
    assert not bench.maps["departures"].keys()
    with patch.object(adopt, "uses", return_value={BackendUse(0, number)}):
        writer = bench.reopen()
    writer.apply([port("a", [2], idle=[1])], complete=True)
    assert [*map(unpack_departure, bench.maps["departures"].keys())] == [(0, number)]


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
