"""The programs that report decisions to ``ebpfproxy trace``: how many, and for how long they are attached."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.traces import WEB, Trace, connect_again, outcomes_of, programs, reports
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Agent, Lab, clients
from tests.lab.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: OutsideClientCluster) -> Agent:
    return cluster.agent().start()


# -- limits


def _lost(said: str) -> int:
    return sum(int(line.split()[1]) for line in said.splitlines() if line.startswith("lost"))


def test_decisions_above_the_rate_are_counted(cluster: OutsideClientCluster, agent: Agent) -> None:
    trace = Trace(cluster.a, "--rate", "100")
    cluster.client.call(connect_again, WEB, 53, 5000)
    shown = len(trace.end())
    # A CPU may save up a quarter of a second's.
    assert 1 <= shown <= os.cpu_count() * (25 + 100 * 10)  # type: ignore[operator]
    assert shown + _lost(trace.said) == 5000
    assert "above --rate" in trace.said


def test_decisions_that_do_not_fit_into_the_ring_are_counted(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    """The ring has room for about 12,000."""
    trace = Trace(cluster.a, "--rate", "1000000")
    trace.process.send_signal(signal.SIGSTOP)
    cluster.client.call(connect_again, WEB, 53, 30_000)
    trace.process.send_signal(signal.SIGCONT)
    shown = len(trace.end())
    assert 10_000 < shown < 13_000
    assert shown + _lost(trace.said) == 30_000
    assert "not read in time" in trace.said


# -- programs


def test_replacing_programs_loses_no_connection(cluster: OutsideClientCluster, agent: Agent) -> None:
    """Sequential connections by socket and by packets, and one that stays open, over three traces."""
    held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)
    over = threading.Event()
    seen: list[int] = []

    def work() -> None:
        while not over.is_set():
            cluster.client.call(clients.spread_tcp, WEB, 80, 50)
            cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, 20)
            seen.append(70)

    worker = threading.Thread(target=work)
    until(lambda: not reports(agent), "the programs of the trace before stay")
    before = agent.text.count("replaced programs")
    worker.start()
    try:
        for done in range(2, 8, 2):
            Trace(cluster.a, "--errors").end()
            until(lambda done=done: agent.text.count("replaced programs") == before + done)  # type: ignore[misc]
    finally:
        over.set()
        worker.join()
    assert len(seen) > 1
    assert held.ask() == "alive"


def test_killed_trace_leaves_programs_that_do_not_report(cluster: OutsideClientCluster, agent: Agent) -> None:
    until(lambda: not reports(agent), "the programs of the trace before stay")
    plain = programs(cluster)
    trace = Trace(cluster.a)
    reporting = programs(cluster)
    assert reporting.keys() == plain.keys()
    assert not set(reporting.values()) & set(plain.values())
    trace.process.kill()
    until(lambda: programs(cluster) == plain, "the programs that report stay", 10)


def test_next_trace_attaches_the_programs_of_the_one_before(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    """The verifier takes a second for them, and a screen that follows decisions begins and ends with each look."""
    attached = []
    for _ in range(2):
        trace = Trace(cluster.a)
        attached.append(programs(cluster))
        trace.end()
        until(lambda: not reports(agent), "the programs that report stay")
    assert attached[0] == attached[1]


def test_agent_that_is_told_to_end_while_it_loads_programs_for_a_trace_leaves_them_to_the_next(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    """A worker pins them, and the folder is not removed below it."""
    pins = cluster.a.bpf_root / "ebpfproxy"
    agent.stop()
    agent.start()
    (plain,) = pins.glob("v*/progs-*")
    trace = cluster.a.start_command(["trace", "--bpf-root", str(cluster.a.bpf_root)], stdout=-1, stderr=-1)
    until(lambda: any(each.parent != plain for each in pins.glob("v*/progs-*/*")), "nothing is loaded")
    assert agent.stop() == 0
    trace.kill()
    trace.communicate()
    agent.start()
    until(lambda: list(pins.glob("v*/progs-*")) == [plain], "programs of nobody are pinned")


def test_second_trace_at_a_time_fails(cluster: OutsideClientCluster, agent: Agent) -> None:
    trace = Trace(cluster.a)
    said = cluster.a.cli("trace", "--count", "1", check=False)
    assert said == ""
    cluster.client.call(clients.ask_tcp, WEB, 80)
    assert len(trace.end()) == 1


def test_stop_and_start_of_the_agent_are_reported(cluster: OutsideClientCluster, agent: Agent) -> None:
    """The command goes on with the next agent."""
    trace = Trace(cluster.a)
    agent.stop()
    assert trace.process.stderr is not None
    assert trace.process.stderr.readline() == b"not tracing: the agent has ended, or this was held up\n"
    agent.start()
    assert trace.process.stderr.readline() == b"tracing\n"
    cluster.client.call(clients.ask_tcp, WEB, 80)
    assert outcomes_of(trace.end()) == [("chosen", "", "web", f"{WEB}:80")]


def test_suspended_trace_continues_with_a_new_lease(cluster: OutsideClientCluster, agent: Agent) -> None:
    """As by a pager: its lease ends, and it takes a new one."""
    trace = Trace(cluster.a)
    before = agent.text.count("replaced programs report_decisions=False")
    trace.process.send_signal(signal.SIGSTOP)
    until(lambda: agent.text.count("replaced programs report_decisions=False") > before)
    trace.process.send_signal(signal.SIGCONT)
    assert trace.process.stderr is not None
    assert trace.process.stderr.readline().startswith(b"not tracing: ")
    assert trace.process.stderr.readline() == b"tracing\n"
    cluster.client.call(clients.ask_tcp, WEB, 80)
    assert outcomes_of(trace.end()) == [("chosen", "", "web", f"{WEB}:80")]


@pytest.fixture
def killed(cluster: OutsideClientCluster, agent: Agent) -> Iterator[Callable[[], None]]:
    """Kills the agent; after the test another runs."""
    yield agent.kill
    agent.start()


def test_programs_report_nothing_once_agent_and_trace_are_gone(
    cluster: OutsideClientCluster, agent: Agent, killed: Callable[[], None]
) -> None:
    trace = Trace(cluster.a)
    killed()
    trace.process.kill()
    until(lambda: "not running" in _refusal(cluster))


def test_trace_ends_when_the_agent_creates_other_maps(cluster: OutsideClientCluster, agent: Agent) -> None:
    """Its own would show nothing any more."""
    trace = Trace(cluster.a)
    agent.stop()
    other = cluster.agent("--max-conntrack", "20000").start()
    assert trace.process.stderr is not None
    assert b"the agent has made other maps" in trace.process.stderr.read()
    assert trace.process.wait() == 1
    other.stop()
    agent.start()


def _refusal(cluster: OutsideClientCluster) -> str:
    process = cluster.a.start_command(["trace", "--bpf-root", str(cluster.a.bpf_root)], stderr=-1)
    said: str = process.communicate(timeout=20)[1].decode()
    return said
