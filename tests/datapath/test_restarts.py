"""A start on maps that are there: the new agent writes of an endpoint what the former would have written."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from ebpfproxy.datapath.abi.flow_layout import BackendUse, RemovalReason, unpack_departure
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.services import adopt
from ebpfproxy.datapath.services.backends import Backends
from ebpfproxy.datapath.services.publish import Publisher
from ebpfproxy.datapath.services.retirement import Retirement
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.services.model import BackendState, ServicePort
from tests.datapath.writing import TABLE, Bench, KilledError, backend, port

pytestmark = pytest.mark.root

WAIT = 5.0
#: The endpoint 1 of the Service a, whose other one is ready.
STATES: dict[str, list[ServicePort]] = {
    "ready": [port("a", [1, 2])],
    "unready": [port("a", [2], idle=[1])],
    "terminating": [port("a", [2], terminating=(1,))],
    "drained": [port("a", [2], drained=[1])],
    "absent": [port("a", [2])],
    "deleted": [],
}
#: Another Service that has the endpoint, too.
OTHERS: dict[str, list[ServicePort]] = {
    "alone": [],
    "ready elsewhere": [port("b", [1])],
    "unready elsewhere": [port("b", [3], idle=[1])],
    # It has no other one.
    "terminating elsewhere": [port("b", [1], terminating=(1,))],
}


class Agents:
    """One after the other, with a clock that the test sets. A connection to endpoint 1 is open all the time."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        #: The only item is the time.
        self._clock = [100.0]
        self.begin()

    def begin(self, *others: ServicePort) -> None:
        self._bench.empty()
        self._open(WAIT)
        self.apply(*STATES["ready"], *others)
        self._bench.count_open(self.first, 1, flow=False)

    def _open(self, wait: float) -> None:
        assert self._bench.maps is not None
        # Without a cycle, in which maps would stay open until it is collected.
        clock = self._clock
        self.writer = Writer(
            self._bench.maps, self._bench.grace.wait, maglev_size=TABLE, absence=wait, clock=lambda: clock[0]
        )

    def restart(self, wait: float = WAIT) -> None:
        use = BackendUse(0, self.first)
        del self.writer
        self._bench.close_maps()
        self._bench.maps = maps.open_or_create(self._bench.pins, self._bench.capacity)
        with patch.object(adopt, "uses", return_value={use}):
            self._open(wait)

    def apply(self, *wanted: ServicePort) -> None:
        assert self.writer.apply(wanted, complete=True) == []

    def pass_time(self) -> None:
        self._clock[0] += WAIT
        self.writer.end_absences()

    @property
    def first(self) -> int:
        """The id of endpoint 1."""
        return next(number for number, (each, _) in self._bench.records.items() if each == backend(1))

    @property
    def reasons(self) -> dict[int, RemovalReason]:
        """Why backends were removed from Service a, by id."""
        assert self._bench.maps is not None
        found = self._bench.maps["departures"].items()
        reasons = {BackendUse(*unpack_departure(key)): RemovalReason(*U32.unpack(why)) for key, why in found}
        return {use.backend_id: why for use, why in reasons.items() if use.service_id == 0}

    @property
    def written(self) -> tuple[dict[int, RemovalReason], dict[int, BackendState]]:
        return self.reasons, {number: state for number, (_, state) in self._bench.records.items()}


@pytest.fixture
def agents(bench: Bench) -> Iterator[Agents]:
    made = Agents(bench)
    yield made
    # It refers to the arrays' memory.
    del made.writer


@pytest.mark.parametrize(
    ("before", "elsewhere"),
    [
        *((state, "alone") for state in STATES if state != "deleted"),
        *((state, "ready elsewhere") for state in STATES if state not in ("ready", "deleted")),
        ("absent", "unready elsewhere"),
        ("terminating", "terminating elsewhere"),
        *(("gone", elsewhere) for elsewhere in OTHERS),
    ],
)
@pytest.mark.parametrize("after", STATES)
def test_start_after_a_change_writes_what_a_running_agent_writes(
    agents: Agents, before: str, after: str, elsewhere: str
) -> None:
    """``gone``: it was absent for so long that nobody waits for it any more."""
    others, found = OTHERS[elsewhere], []
    for is_restarted in (False, True):
        agents.begin(*others)
        agents.apply(*STATES["absent" if before == "gone" else before], *others)
        if before == "gone":
            agents.pass_time()
        if is_restarted:
            agents.restart()
        agents.apply(*STATES[after], *others)
        now = agents.written
        agents.pass_time()
        found.append((now, agents.written))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("after", "reason"), [("absent", RemovalReason.GONE), ("unready", RemovalReason.IDLE)]
)
def test_absent_endpoint_where_the_next_agent_waits_for_none(
    agents: Agents, after: str, reason: RemovalReason
) -> None:
    agents.apply(*STATES["absent"])
    assert agents.reasons == {agents.first: RemovalReason.ABSENT}
    agents.restart(wait=0.0)
    agents.apply(*STATES[after])
    assert agents.reasons == {agents.first: reason}


@pytest.mark.parametrize("after", ["absent", "unready", "ready"])
@pytest.mark.parametrize("elsewhere", ["alone", "ready elsewhere"])
@pytest.mark.parametrize(
    "killed_at", [(RemovedBackends, "note"), (Backends, "settle")], ids=["removal", "state"]
)
def test_agent_that_is_killed_before_it_stores_that_an_endpoint_is_absent(
    agents: Agents, killed_at: tuple[type, str], elsewhere: str, after: str
) -> None:
    reasons = {"absent": RemovalReason.ABSENT, "unready": RemovalReason.IDLE, "ready": None}
    others = OTHERS[elsewhere]
    agents.begin(*others)
    number = agents.first
    with patch.object(*killed_at, side_effect=KilledError), pytest.raises(KilledError):
        agents.apply(*STATES["absent"], *others)
    agents.restart()
    agents.apply(*STATES[after], *others)
    is_active = after == "ready" or others
    state = BackendState.ACTIVE if is_active else BackendState.QUARANTINED
    written, states = agents.written
    assert (written.get(number), states[number]) == (reasons[after], state)


def test_agent_that_is_killed_while_a_service_is_deleted_loses_no_removal(agents: Agents) -> None:
    """With ``staleTCP`` unready its connections are closed."""
    ids = set(agents.written[1])
    with patch.object(Retirement, "add_service", side_effect=KilledError), pytest.raises(KilledError):
        agents.apply()
    agents.restart()
    agents.apply()
    assert agents.reasons == dict.fromkeys(ids, RemovalReason.IDLE)


def test_endpoint_that_was_absent_stays_gone_though_the_agent_is_killed_before_its_service_is_nameless(
    agents: Agents,
) -> None:
    """Its connections are closed, while those to the Service's other endpoint go on."""
    others = OTHERS["terminating elsewhere"]
    agents.begin(*others)
    agents.apply(*STATES["absent"], *others)
    with patch.object(Publisher, "_forget_name", side_effect=KilledError), pytest.raises(KilledError):
        agents.apply(*others)
    written = agents.reasons
    assert written[agents.first] == RemovalReason.GONE
    agents.restart()
    agents.apply(*others)
    assert agents.reasons == written
