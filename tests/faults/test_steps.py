"""The agent is killed, stopped, or refused a system call at every step of a start, an update, a change of map sizes and
a clean-up.

A ladder kills a process at the first step at which none was killed before, starts the next one on what that one left,
and so on, until one gets to the end: every step that exists has then had its process killed, and every start has
begun with what another had half done.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.faults import report
from tests.faults.faulted import Faulted
from tests.faults.steps import Choose, Fault, Step, Stepped
from tests.lab import Agent
from tests.lab.waiting import READY_SECONDS, until

pytestmark = [
    pytest.mark.root,
    # A ladder has hundreds of rungs, each a start.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are x86_64's"),
]

#: A step that a process makes again and again is one step after so many times.
_TIMES = 3
#: A run in a hurry takes one of so many steps; the parts together take each once.
_EVERY = int(os.environ.get("EBPFPROXY_FAULTS_EVERY", "1"))
_PART = int(os.environ.get("EBPFPROXY_FAULTS_PART", "0"))
#: Kinds of steps that change what programs there are: one of each in every run of the tests.
_SAMPLED = frozenset({"PROG_LOAD", "OBJ_PIN", "LINK_UPDATE"})
#: What finds out about the kernel loads programs, too.
_PROBES = frozenset({"PROG_LOAD ", "PROG_LOAD probe", "PROG_LOAD libbpf_nametest"})
_KILL = Fault(signal.SIGKILL)
_OTHER_SIZES = ("--max-services", "3000")


def start(faulted: Faulted, choose: Choose, *arguments: str) -> tuple[Agent, Stepped]:
    stepped = Stepped(choose)
    agent = faulted.agent(*arguments)
    agent.start(wait=False, before_exec=stepped.enter)
    assert agent.process is not None
    stepped.follow(agent.process.pid)
    return agent, stepped


def wait_end(agent: Agent) -> bool:
    """Waits until it is ready (True), or has ended."""
    assert agent.process is not None
    process = agent.process
    ends = time.monotonic() + READY_SECONDS
    until(
        lambda: agent.is_ready or process.poll() is not None or time.monotonic() > ends, "", 2 * READY_SECONDS
    )
    assert agent.is_ready or process.poll() is not None, (
        f"the agent neither ends nor is ready:\n{agent.text[-9000:]}"
    )
    return process.poll() is None


class Ladder:
    """Chooses each step once, or one step of each kind in ``of_kind``."""

    def __init__(self, fault: Fault, *, of_kind: Collection[str] = ()) -> None:
        self.done: set[Step] = set()
        self._fault = fault
        self._left = set(of_kind)
        self._has_kinds = bool(of_kind)
        if not of_kind:
            report.take_part(_PART, _EVERY)
        #: False for an agent that is to get to the end of its start.
        self.is_armed = True

    def choose(self, step: Step) -> Fault | None:
        # An agent writes its state and the lists again and again; a step is one of its first few times.
        if not self.is_armed or step in self.done or step.occurrence > _TIMES:
            return None
        kind = step.name.split()[0]
        if self._has_kinds and (kind not in self._left or step.name in _PROBES):
            return None
        if not self._has_kinds and zlib.crc32(str(step).encode()) % _EVERY != _PART:
            return None
        self._left.discard(kind)
        self.done.add(step)
        return self._fault

    def has_done(self, *parts: str) -> bool:
        """Says if there was a step with each of these parts of a name."""
        return all(any(each in step.name for step in self.done) for each in parts)

    def report(self, fault: str) -> None:
        report.add_steps(fault, len(self.done))

    def climb(self, faulted: Faulted, *arguments: str) -> Agent:
        """Returns the first agent that gets to the end."""
        while True:
            self.is_armed, before = True, len(self.done)
            agent, stepped = start(faulted, self.choose, *arguments)
            is_ready = wait_end(agent)
            # What follows is no part of the start.
            self.is_armed = False
            if self._fault.error:
                assert "Traceback" not in agent.text, agent.text
            if len(self.done) == before and is_ready:
                return agent
            if is_ready:
                agent.kill()
            stepped.join()
            assert len(self.done) > before, f"the agent ends at no step:\n{agent.text}"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--no-localhost-nodeports",), id="options"),
        pytest.param(_OTHER_SIZES, id="sizes", marks=pytest.mark.faults),
    ],
)
def test_agent_killed_at_a_step_of_each_kind(faulted: Faulted, arguments: tuple[str, ...]) -> None:
    """kill -9 at one step of each kind of a start with other options: a sample of the ladders for every run."""
    faulted.agent().start().kill()
    ladder = Ladder(_KILL, of_kind=_SAMPLED)
    fault = f"kill -9 at a step of each kind of a start with {' '.join(arguments)}"
    with faulted.under_load(fault, packets=arguments is not _OTHER_SIZES):
        agent = ladder.climb(faulted, *arguments)
    ladder.report(fault)
    assert {step.name.split()[0] for step in ladder.done} == _SAMPLED
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_a_first_start(faulted: Faulted) -> None:
    """kill -9 at every step of a first start; each next start goes on from there."""
    faulted.a.cli("cleanup")
    ladder = Ladder(_KILL)
    agent = ladder.climb(faulted)
    faulted.wait_equal()
    with faulted.under_load("after kill -9 at every step of a first start"):
        time.sleep(1)
    ladder.report("after kill -9 at every step of a first start")
    agent.stop()
    assert len(ladder.done) > 100 // _EVERY
    assert _EVERY > 1 or ladder.has_done("LINK_CREATE")


@pytest.mark.faults
def test_agent_killed_before_what_it_attached_to_a_device_is_in_its_place(faulted: Faulted) -> None:
    """kill -9 when a link to a device is pinned beside its place: the next start takes it over, and fails at no device."""
    faulted.a.cli("cleanup")
    for place in ("tc-1-egress", "tc-2-egress", "tc-2-ingress"):
        step = Step(f"rename *ebpfproxy/links/{place}")
        agent, stepped = start(faulted, lambda each, at=step: _KILL if each == at else None)  # type: ignore[misc]
        assert not wait_end(agent)
        stepped.join()
    agent = faulted.agent().start()
    assert "failed to attach" not in agent.text, agent.text
    faulted.wait_equal()
    with faulted.under_load("after kill -9 before a link to a device is in its place"):
        time.sleep(0.5)
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_a_restart(faulted: Faulted) -> None:
    """kill -9 at every step of a restart with the same maps."""
    faulted.agent().start().kill()
    ladder = Ladder(_KILL)
    with faulted.under_load("kill -9 at every step of a restart"):
        agent = ladder.climb(faulted)
    ladder.report("kill -9 at every step of a restart")
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_stopped_at_every_step_of_a_start(faulted: Faulted) -> None:
    """SIGSTOP for a while at every step of a restart, and at those of one with other options, which loads programs."""
    faulted.agent().start().kill()
    with faulted.under_load("SIGSTOP at every step of a start"):
        for arguments in ((), ("--no-localhost-nodeports",)):
            ladder = Ladder(Fault(signal.SIGSTOP, 0.05))
            agent, stepped = start(faulted, ladder.choose, *arguments)
            agent.wait_ready()
            assert _EVERY > 1 or len(ladder.done) > 3
            ladder.report("SIGSTOP at every step of a start")
            agent.kill()
            stepped.join()
    agent = faulted.agent().start()
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOSPC, errno.EPERM], ids=errno.errorcode.get)
def test_every_step_of_a_start_fails(faulted: Faulted, error: int) -> None:
    """A system call fails at every step of a start that loads programs: the agent says so in a line, or goes on."""
    faulted.agent().start().kill()
    fault = f"{errno.errorcode[error]} at every step of a start with other options"
    ladder = Ladder(Fault(error=error))
    with faulted.under_load(fault):
        agent = ladder.climb(faulted, "--no-localhost-nodeports")
        agent.kill()
        agent = faulted.agent().start()
    ladder.report(fault)
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_a_change_of_map_sizes(faulted: Faulted) -> None:
    """kill -9 at every step of a start with maps of other sizes, and then back to the old ones.

    Connections of sockets outlive this. Of flows of packets, one that begins within the last milliseconds before the
    programs of its device are replaced may be lost (datapath/flows/map_migration.py): they are counted.
    """
    faulted.agent().start().kill()
    ladder = Ladder(_KILL)
    with faulted.under_load("kill -9 at every step of a change of map sizes", packets=False):
        agent = ladder.climb(faulted, *_OTHER_SIZES)
        agent.kill()
        agent = faulted.agent().start()
    ladder.report("kill -9 at every step of a change of map sizes")
    assert _EVERY > 1 or ladder.has_done("LINK_UPDATE", "unlinkat")
    assert len([*pin_folder(faulted.a.bpf_root).glob("v*")]) == 1
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_an_update(faulted: Faulted) -> None:
    """kill -9 at every system call of a change of endpoints and of Services, by a running agent."""
    ladder, changes = Ladder(_KILL), _changes(faulted)
    with faulted.under_load("kill -9 at every step of an update"):
        while True:
            ladder.is_armed = False
            agent, stepped = start(faulted, ladder.choose)
            agent.wait_ready()
            faulted.wait_equal()
            stepped.recount()
            ladder.is_armed, before = True, len(ladder.done)
            for change in changes:
                change()
                assert agent.process is not None
                if len(ladder.done) == before:
                    faulted.wait_equal_or(agent)
            ladder.is_armed = False
            if len(ladder.done) == before:
                break
            stepped.join()
    ladder.report("kill -9 at every step of an update")
    faulted.wait_equal()
    agent.stop()
    assert ladder.done
    # One of so many steps need not be at these maps.
    assert _EVERY > 1 or ladder.has_done("services4", "service_names")


@pytest.mark.faults
def test_agent_killed_at_every_store_of_an_update(faulted: Faulted, tmp_path: Path) -> None:
    """kill -9 at every line that stores something in the maps, in memory or not, for a change of endpoints and Services."""
    done = tmp_path / "done"
    environment = {**os.environ, "EBPFPROXY_LINES_DONE": str(done)}
    changes = _changes(faulted)
    with faulted.under_load("kill -9 at every store of an update"):
        while True:
            agent = faulted.agent().start(module="tests.faults.lines", env=environment)
            faulted.wait_equal()
            assert agent.process is not None
            agent.process.send_signal(signal.SIGUSR1)
            for change in changes:
                change()
                faulted.wait_equal_or(agent)
            if agent.process.poll() is None:
                break
    lines = done.read_text().split()
    report.add_steps("kill -9 at every store of an update", len(lines))
    assert len(lines) > 10
    assert len(lines) == len(set(lines))
    agent.process.send_signal(signal.SIGUSR1)
    faulted.wait_equal()
    agent.stop()


def _changes(faulted: Faulted) -> list[Callable[[], object]]:
    """Changes after which everything is as it was; the Services under load always have an endpoint that serves."""
    return [
        lambda: faulted.put_endpoints("web", "w1"),
        lambda: faulted.put_endpoints("other", "x2"),
        lambda: faulted.put_endpoints("web", "w2", "w1"),
        faulted.put_further,
        faulted.delete_further,
        lambda: faulted.put_endpoints("other", "x1", "x2"),
    ]


def clean_up(faulted: Faulted, choose: Choose) -> int:
    """Runs ``ebpfproxy cleanup``; returns its exit code."""
    stepped = Stepped(choose)
    command = [sys.executable, "-m", "ebpfproxy", "cleanup", "--bpf-root", str(faulted.a.bpf_root)]
    process = faulted.a.popen(command, before_exec=stepped.enter, join_cgroup=False, stdout=-3)
    stepped.follow(process.pid)
    code = process.wait(60)
    stepped.join()
    return code


@pytest.mark.faults
@pytest.mark.parametrize(
    "at", ["MAP_UPDATE_ELEM devices", "unlink *ebpfproxy/links/sendmsg4", "unlinkat slots"]
)
def test_agent_started_after_a_cleanup_that_was_killed(faulted: Faulted, at: str) -> None:
    """An agent that is started where a clean-up was killed half way puts all in place again."""
    faulted.agent().start().stop()
    step = Step(at)
    assert clean_up(faulted, lambda each: _KILL if each == step else None) == -signal.SIGKILL
    agent = faulted.agent().start()
    faulted.wait_equal()
    with faulted.under_load("an agent after kill -9 of a clean-up"):
        time.sleep(0.5)
    agent.stop()


@pytest.mark.faults
def test_cleanup_killed_at_every_step(faulted: Faulted) -> None:
    """kill -9 at every step of ``ebpfproxy cleanup``: the next one removes what is left, and an agent starts after it."""
    faulted.agent().start().stop()
    ladder = Ladder(_KILL)
    while True:
        before = len(ladder.done)
        code = clean_up(faulted, ladder.choose)
        if len(ladder.done) == before:
            assert code == 0
            break
        assert code == -signal.SIGKILL
    assert not pin_folder(faulted.a.bpf_root).exists()
    assert len(ladder.done) > 50 // _EVERY
    ladder.report("after kill -9 at every step of a clean-up")
    agent = faulted.agent().start()
    faulted.wait_equal()
    with faulted.under_load("after kill -9 at every step of a clean-up"):
        time.sleep(1)
    agent.stop()
