"""The agent is killed, or refused a system call, at every step of a start, an update, a change of map sizes and a
clean-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.faults import report
from tests.faults.faulted import Faulted
from tests.faults.ladders import (
    EVERY,
    KILL,
    MARKS,
    OTHER_SIZES,
    SAMPLED,
    Ladder,
    changes,
    clean_up,
    start,
    wait_end,
)
from tests.faults.steps import Fault, Step

pytestmark = MARKS


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--no-localhost-nodeports",), id="options"),
        pytest.param(OTHER_SIZES, id="sizes", marks=pytest.mark.faults),
    ],
)
def test_agent_killed_at_a_step_of_each_kind(faulted: Faulted, arguments: tuple[str, ...]) -> None:
    """kill -9 at one step of each kind of a start with other options: a sample of the ladders for every run."""
    faulted.agent().start().kill()
    ladder = Ladder(KILL, of_kind=SAMPLED)
    fault = f"kill -9 at a step of each kind of a start with {' '.join(arguments)}"
    with faulted.under_load(fault, packets=arguments is not OTHER_SIZES):
        agent = ladder.climb(faulted, *arguments)
    ladder.report(fault)
    assert {step.name.split()[0] for step in ladder.done} == SAMPLED
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_a_first_start(faulted: Faulted) -> None:
    """kill -9 at every step of a first start; each next start goes on from there."""
    faulted.a.cli("cleanup")
    ladder = Ladder(KILL)
    agent = ladder.climb(faulted)
    faulted.wait_equal()
    with faulted.under_load("after kill -9 at every step of a first start"):
        time.sleep(1)
    ladder.report("after kill -9 at every step of a first start")
    agent.stop()
    assert len(ladder.done) > 100 // EVERY
    assert EVERY > 1 or ladder.has_done("LINK_CREATE")


@pytest.mark.faults
def test_agent_killed_before_what_it_attached_to_a_device_is_in_its_place(faulted: Faulted) -> None:
    """kill -9 when a link to a device is pinned beside its place: the next start takes it over, and fails at no device."""
    faulted.a.cli("cleanup")
    for place in ("tc-1-egress", "tc-2-egress", "tc-2-ingress"):
        step = Step(f"rename *ebpfproxy/links/{place}")
        agent, stepped = start(faulted, lambda each, at=step: KILL if each == at else None)  # type: ignore[misc]
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
    ladder = Ladder(KILL)
    with faulted.under_load("kill -9 at every step of a restart"):
        agent = ladder.climb(faulted)
    ladder.report("kill -9 at every step of a restart")
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOSPC, errno.EPERM], ids=errno.errorcode.get)
def test_every_step_of_a_start_fails(faulted: Faulted, error: int) -> None:
    """A system call fails at every step of a start that loads programs: the agent says so in a line, or goes on.

    None of so many agents in a row lives for a sweep: load makes 2,000 entries a second, which fill a small table.
    """
    room = ("--max-conntrack", "131072")
    faulted.agent(*room).start().kill()
    fault = f"{errno.errorcode[error]} at every step of a start with other options"
    ladder = Ladder(Fault(error=error))
    with faulted.under_load(fault):
        agent = ladder.climb(faulted, *room, "--no-localhost-nodeports")
        agent.kill()
        agent = faulted.agent(*room).start()
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
    ladder = Ladder(KILL)
    with faulted.under_load("kill -9 at every step of a change of map sizes", packets=False):
        agent = ladder.climb(faulted, *OTHER_SIZES)
        agent.kill()
        agent = faulted.agent().start()
    ladder.report("kill -9 at every step of a change of map sizes")
    assert EVERY > 1 or ladder.has_done("LINK_UPDATE", "unlinkat")
    assert len([*pin_folder(faulted.a.bpf_root).glob("v*")]) == 1
    faulted.wait_equal()
    agent.stop()


@pytest.mark.faults
def test_agent_killed_at_every_step_of_an_update(faulted: Faulted) -> None:
    """kill -9 at every system call of a change of endpoints and of Services, by a running agent."""
    # The load begins with programs that serve it.
    faulted.agent().start().kill()
    ladder, made = Ladder(KILL), changes(faulted)
    with faulted.under_load("kill -9 at every step of an update"):
        while True:
            ladder.is_armed = False
            agent, stepped = start(faulted, ladder.choose)
            agent.wait_ready()
            faulted.wait_equal()
            stepped.recount()
            ladder.is_armed, before = True, len(ladder.done)
            for change in made:
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
    assert EVERY > 1 or ladder.has_done("services4", "service_names")


@pytest.mark.faults
def test_agent_killed_at_every_store_of_an_update(faulted: Faulted, tmp_path: Path) -> None:
    """kill -9 at every line that stores something in the maps, in memory or not, for a change of endpoints and Services."""
    done = tmp_path / "done"
    environment = {**os.environ, "EBPFPROXY_LINES_DONE": str(done)}
    made = changes(faulted)
    faulted.agent().start().kill()
    with faulted.under_load("kill -9 at every store of an update"):
        while True:
            agent = faulted.agent().start(module="tests.faults.lines", env=environment)
            faulted.wait_equal()
            assert agent.process is not None
            agent.process.send_signal(signal.SIGUSR1)
            for change in made:
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


@pytest.mark.faults
@pytest.mark.parametrize(
    "at", ["MAP_UPDATE_ELEM devices", "unlink *ebpfproxy/links/sendmsg4", "unlinkat slots"]
)
def test_agent_started_after_a_cleanup_that_was_killed(faulted: Faulted, at: str) -> None:
    """An agent that is started where a clean-up was killed half way puts all in place again."""
    faulted.agent().start().stop()
    step = Step(at)
    assert clean_up(faulted, lambda each: KILL if each == step else None) == -signal.SIGKILL
    agent = faulted.agent().start()
    faulted.wait_equal()
    with faulted.under_load("an agent after kill -9 of a clean-up"):
        time.sleep(0.5)
    agent.stop()


@pytest.mark.faults
def test_cleanup_killed_at_every_step(faulted: Faulted) -> None:
    """kill -9 at every step of ``ebpfproxy cleanup``: the next one removes what is left, and an agent starts after it."""
    faulted.agent().start().stop()
    ladder = Ladder(KILL)
    while True:
        before = len(ladder.done)
        code = clean_up(faulted, ladder.choose)
        if len(ladder.done) == before:
            assert code == 0
            break
        assert code == -signal.SIGKILL
    assert not pin_folder(faulted.a.bpf_root).exists()
    assert len(ladder.done) > 50 // EVERY
    ladder.report("after kill -9 at every step of a clean-up")
    agent = faulted.agent().start()
    faulted.wait_equal()
    with faulted.under_load("after kill -9 at every step of a clean-up"):
        time.sleep(1)
    agent.stop()
