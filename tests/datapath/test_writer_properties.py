"""The writer on real maps: after any sequence of changes the maps hold the desired state and nothing else."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebpfproxy.datapath.abi.flow_layout import RemovalReason
from ebpfproxy.datapath.services import plan
from ebpfproxy.services.model import (
    Algorithm,
    Backend,
    BackendState,
    Policy,
    ServicePort,
    ServicePortKey,
)
from tests.datapath.writing import FEW_IDS, Bench, KilledError, check, port

pytestmark = pytest.mark.root

sets = st.lists(st.integers(1, 5), max_size=3, unique=True)
ports = st.builds(
    lambda name, cluster, local, external, terminating, idle, drained, algorithm, weights, affinity: port(
        name,
        cluster,
        local,
        external=external,
        terminating=tuple(terminating),
        idle=idle,
        drained=drained,
        algorithm=algorithm,
        weights=weights,
        affinity=affinity,
    ),
    name=st.sampled_from(["a", "b", "c"]),
    cluster=sets,
    local=sets,
    external=st.sampled_from(list(Policy)),
    terminating=sets,
    idle=sets,
    drained=sets,
    algorithm=st.sampled_from(list(Algorithm)),
    weights=st.dictionaries(st.integers(1, 5), st.sampled_from([1, 2, 4, 6, 7]), max_size=3),
    affinity=st.sampled_from([0, 60]),
)
numbers = st.integers(0, 50)


#: The map whose write kills the agent: the first one of a change with a new name, of any, or that of frontends.
KILLED_AT = ("service_names", "members", "services4")
#: ``restart`` follows the grace period, ``kill`` precedes its end. An agent that is killed within a change is
#: followed by one with the same desired state, or with the one before the change.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), ports),
        st.tuples(st.just("set"), ports),
        st.tuples(st.just("remove"), ports),
        st.tuples(st.sampled_from(["reclaim", "restart", "kill"]), st.none()),
        st.tuples(
            st.sampled_from(["same", "reverted"]).flatmap(
                lambda end: st.sampled_from([f"{end} {at}" for at in KILLED_AT])
            ),
            ports,
        ),
        st.tuples(st.sampled_from(["open a flow", "open a socket", "close"]), numbers),
    ),
    max_size=25,
)


def same_entries(one: ServicePort, other: ServicePort | None) -> bool:
    entries = [plan.entries_of(each, 0, lambda _: ()) for each in (one, other) if each is not None]
    return len(entries) == 2 and entries[0] == entries[1]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_maps_equal_the_desired_state_after_every_change(
    bench: Bench, steps: list[tuple[str, ServicePort | int | None]]
) -> None:
    writer = bench.empty(FEW_IDS)
    wanted: dict[ServicePortKey, ServicePort] = {}
    opened: dict[int, Backend] = {}
    flows: set[int] = set()
    for step, each in steps:
        if isinstance(each, ServicePort):
            if step == "set":
                wanted[each.key] = each
                assert writer.apply([each]) == []
            elif step == "remove":
                wanted.pop(each.key, None)
                writer.apply((), [each.key])
            else:
                end, at = step.rsplit(" ", 1)
                assert bench.maps is not None
                with patch.object(bench.maps[at], "update_many", side_effect=KilledError):
                    try:
                        writer.apply([each])
                    except KilledError:
                        is_killed = True
                    else:
                        is_killed = False
                        # Names are written of what is new, and frontends where their entries differ.
                        is_same = at == "services4" and same_entries(each, wanted.get(each.key))
                        assert at == "service_names" or is_same, "all changes write it"
                if end == "same" or not is_killed:
                    wanted[each.key] = each
                writer = bench.reopen()
                assert writer.apply(wanted.values(), complete=True) == []
        elif step == "reclaim":
            writer.reclaim(writer.take_retired())
        elif isinstance(each, int):
            if step == "close" and opened:
                number = sorted(opened)[each % len(opened)]
                bench.count_open(number, -1, flow=number in flows)
                flows.discard(number)
                del opened[number]
            # Programs select backends by slots. At most four connections are open, so that ids suffice.
            ids = {n for s in bench.service_ids.values() for p in Policy for n, _ in bench.slots(s, p)}
            unused = sorted(ids - opened.keys())
            if step != "close" and unused and len(opened) < 4:
                number = unused[each % len(unused)]
                opened[number] = bench.records[number][0]
                if step == "open a flow":
                    flows.add(number)
                bench.count_open(number, 1, flow=number in flows)
        else:
            if step == "restart":
                writer.reclaim(writer.take_retired())
            writer = bench.reopen()
            before, departures = bench.writes(), writer.removed_backends.keys()
            assert writer.apply(wanted.values(), complete=True) == []
            leftovers = writer.take_retired()
            after = bench.writes()
            # The writer does not adopt a removed backend without open connections, but what is not ready is removed.
            added = writer.removed_backends.keys() - departures
            assert {writer.removed_backends[each].why for each in added} <= {RemovalReason.IDLE}
            before.pop("departures"), after.pop("departures")
            assert after == before, "an unchanged state needs no writes"
            assert not leftovers.ranges
            writer.reclaim(leftovers)
        check(bench, wanted, opened)
    writer.apply((), list(wanted))
    writer.reclaim(writer.take_retired())
    writer.forget_removed_backends(writer.removed_backends)
    assert bench.rows == []
    assert (writer.service_ports, writer.frontends, writer.backends) == (0, 0, 0)
    assert writer.free_slots == FEW_IDS.slots, "every range is released"
    gone = {(each, BackendState.GONE) for each in opened.values()}
    assert set(bench.records.values()) == gone, "only backends with open connections remain"
    for number in opened:
        bench.count_open(number, -1, flow=number in flows)
    writer.forget_removed_backends(writer.removed_backends)
    assert bench.records == {}, "no backend remains"
