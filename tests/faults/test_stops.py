"""The agent is stopped for a while (SIGSTOP) at every step of a start, an update, a change of map sizes and a clean-up."""

from __future__ import annotations

import signal
import time

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.faults.faulted import Faulted
from tests.faults.ladders import EVERY, MARKS, OTHER_SIZES, Ladder, changes, clean_up, start
from tests.faults.steps import Fault

pytestmark = [*MARKS, pytest.mark.faults]

_STOP = Fault(signal.SIGSTOP, 0.05)


def test_agent_stopped_at_every_step_of_a_start(faulted: Faulted) -> None:
    """SIGSTOP for a while at every step of a restart, and at those of one with other options, which loads programs."""
    faulted.agent().start().kill()
    with faulted.under_load("SIGSTOP at every step of a start"):
        for arguments in ((), ("--no-localhost-nodeports",)):
            ladder = Ladder(_STOP)
            agent, stepped = start(faulted, ladder.choose, *arguments)
            agent.wait_ready()
            assert EVERY > 1 or len(ladder.done) > 3
            ladder.report("SIGSTOP at every step of a start")
            agent.kill()
            stepped.join()
    agent = faulted.agent().start()
    faulted.wait_equal()
    agent.stop()


def test_agent_stopped_at_every_step_of_an_update(faulted: Faulted) -> None:
    """SIGSTOP for a while at every step of a change of endpoints and of Services, by a running agent."""
    ladder, fault = Ladder(_STOP), "SIGSTOP at every step of an update"
    ladder.is_armed = False
    agent, stepped = start(faulted, ladder.choose)
    agent.wait_ready()
    faulted.wait_equal()
    with faulted.under_load(fault):
        # The second time has steps that come after those of the first.
        for _ in range(2):
            stepped.recount()
            ladder.is_armed = True
            for change in changes(faulted):
                change()
                faulted.wait_equal()
        ladder.is_armed = False
    ladder.report(fault)
    assert EVERY > 1 or ladder.has_done("services4", "service_names")
    agent.stop()
    stepped.join()


def test_agent_stopped_at_steps_of_a_change_of_map_sizes(faulted: Faulted) -> None:
    """SIGSTOP for a while at every fourth step of a start with maps of other sizes, and back to the old ones.

    As with kill -9 there, flows of packets that begin while the agent does not copy them may be lost.
    """
    faulted.agent().start().kill()
    fault = "SIGSTOP at every fourth step of a change of map sizes"
    ladder = Ladder(_STOP, every=4)
    with faulted.under_load(fault, packets=False, pause=0.02):
        for arguments in (OTHER_SIZES, ()):
            agent, stepped = start(faulted, ladder.choose, *arguments)
            agent.wait_ready(600)
            agent.kill()
            stepped.join()
    ladder.report(fault)
    assert EVERY > 1 or len(ladder.done) > 40
    agent = faulted.agent().start()
    assert len([*pin_folder(faulted.a.bpf_root).glob("v*")]) == 1
    faulted.wait_equal()
    agent.stop()


def test_cleanup_stopped_at_every_step(faulted: Faulted) -> None:
    """SIGSTOP for a while at every step of ``ebpfproxy cleanup``: it removes all, and an agent starts after it."""
    faulted.agent().start().stop()
    ladder, fault = Ladder(_STOP), "after SIGSTOP at every step of a clean-up"
    assert clean_up(faulted, ladder.choose) == 0
    assert not pin_folder(faulted.a.bpf_root).exists()
    ladder.report(fault)
    assert len(ladder.done) > 50 // EVERY
    agent = faulted.agent().start()
    faulted.wait_equal()
    with faulted.under_load(fault):
        time.sleep(1)
    agent.stop()
