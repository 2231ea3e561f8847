"""What commands say while an agent starts, and the record in the maps is still that of the one before."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from ebpfproxy.datapath.kernel.roots import Lock
from ebpfproxy.operator.migrate.node import takeover
from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab import Agent, Lab
from tests.lab.waiting import until

pytestmark = pytest.mark.root

ENDED = (
    "the agent that left this record has ended: another one starts, or cleanup or rollback is under"
    " way; changes are not applied yet"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        yield TwoNodeCluster(lab)


@pytest.fixture
def agent(cluster: TwoNodeCluster) -> Iterator[Agent]:
    started = cluster.agent().start()
    wait_record(cluster, started)
    yield started
    started.kill()


def wait_record(cluster: TwoNodeCluster, agent: Agent) -> None:
    """It is written a moment after the agent serves; until then there is that of the one before."""
    assert agent.process is not None
    pid = agent.process.pid
    until(lambda: status(cluster)["agent"]["pid"] == pid, "no record of the agent")


def status(cluster: TwoNodeCluster) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.a.cli("status", "-o", "json"))
    return found


def test_record_of_an_agent_that_has_ended_is_told_from_the_next_ones(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    """An agent has the lock from its start on, and writes its record once it knows something. So has a clean-up."""
    assert status(cluster)["healthy"]
    pid = status(cluster)["agent"]["pid"]
    agent.kill()
    lock = Lock([("--bpf-root", cluster.a.bpf_root)])
    try:
        found, text = status(cluster), cluster.a.cli("status")
        checked = cluster.a.call(takeover.check, cluster.a.bpf_root)
    finally:
        lock.release()
    assert (found["agent_running"], found["agent_ended"], found["healthy"]) == (True, True, False)
    assert found["problems"] == [ENDED]
    assert f"pid {pid}, ENDED, last seen" in text
    assert "since" not in text.lower()
    assert checked.starting
    assert checked.problems == ("the agent has not read all Services and EndpointSlices yet",)


def test_next_agent_leaves_its_own_record(cluster: TwoNodeCluster, agent: Agent) -> None:
    agent.kill()
    again = cluster.agent().start()
    wait_record(cluster, again)
    found = status(cluster)
    assert (found["agent_running"], found["agent_ended"]) == (True, False)
    assert again.stop() == 0


def test_agent_without_cpu_is_not_said_to_have_ended(cluster: TwoNodeCluster, agent: Agent) -> None:
    assert agent.process is not None
    agent.process.send_signal(signal.SIGSTOP)
    found = status(cluster)
    assert (found["agent_running"], found["agent_ended"]) == (True, False)


def test_watches_of_a_stopped_agent_are_not_shown_as_connected(cluster: TwoNodeCluster, agent: Agent) -> None:
    assert "connected" in cluster.a.cli("status")
    assert agent.stop() == 0
    text = cluster.a.cli("status")
    assert "STOPPED" in text
    assert "connected" not in text
