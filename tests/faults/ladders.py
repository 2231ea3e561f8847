"""Ladders: a process is killed, stopped or refused a system call at each of its steps.

A ladder kills a process at the first step at which none was killed before, starts the next one on what that one left,
and so on, until one gets to the end: every step that exists has then had its process killed, and every start has
begun with what another had half done.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import time
import zlib
from collections.abc import Callable, Collection

import pytest

from tests.faults import report
from tests.faults.faulted import Faulted
from tests.faults.steps import Choose, Fault, Step, Stepped
from tests.lab import Agent
from tests.lab.waiting import READY_SECONDS, until

MARKS = [
    pytest.mark.root,
    # A ladder has hundreds of rungs, each a start.
    pytest.mark.timeout(3600),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are x86_64's"),
]

#: A step that a process makes again and again is one step after so many times.
_TIMES = 3
#: A run in a hurry takes one of so many steps; the parts together take each once.
EVERY = int(os.environ.get("EBPFPROXY_FAULTS_EVERY", "1"))
_PART = int(os.environ.get("EBPFPROXY_FAULTS_PART", "0"))
#: Kinds of steps that change what programs there are: one of each in every run of the tests.
SAMPLED = frozenset({"PROG_LOAD", "OBJ_PIN", "LINK_UPDATE"})
#: What finds out about the kernel loads programs, too.
_PROBES = frozenset({"PROG_LOAD ", "PROG_LOAD probe", "PROG_LOAD libbpf_nametest"})
#: Copied flows are steps, of which each takes two switches between processes.
_READY_SECONDS = 4 * READY_SECONDS
KILL = Fault(signal.SIGKILL)
OTHER_SIZES = ("--max-services", "3000")


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
    ends = time.monotonic() + _READY_SECONDS
    until(
        lambda: agent.is_ready or process.poll() is not None or time.monotonic() > ends,
        "",
        2 * _READY_SECONDS,
    )
    assert agent.is_ready or process.poll() is not None, (
        f"the agent neither ends nor is ready:\n{agent.text[-9000:]}"
    )
    return process.poll() is None


class Ladder:
    """Chooses each step once, or one step of each kind in ``of_kind``, and each of the kinds in ``all_of``.

    ``every``: only one of so many steps, where each takes long.
    """

    def __init__(
        self, fault: Fault, *, of_kind: Collection[str] = (), all_of: Collection[str] = (), every: int = 1
    ) -> None:
        self.done: set[Step] = set()
        self._fault = fault
        self._every = every * EVERY
        self._left = set(of_kind)
        self._all_of = frozenset(all_of)
        self._has_kinds = bool(of_kind)
        if not of_kind:
            report.take_part(_PART, EVERY)
        #: False for an agent that is to get to the end of its start.
        self.is_armed = True

    def choose(self, step: Step) -> Fault | None:
        # An agent writes its state and the lists again and again; a step is one of its first few times.
        if not self.is_armed or step in self.done or step.occurrence > _TIMES:
            return None
        kind = step.name.split()[0]
        is_other = kind not in self._left or step.name in _PROBES
        if self._has_kinds and is_other and kind not in self._all_of:
            return None
        if not self._has_kinds and zlib.crc32(str(step).encode()) % self._every != _PART:
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


def changes(faulted: Faulted) -> list[Callable[[], object]]:
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
