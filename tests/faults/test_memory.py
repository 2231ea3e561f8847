"""The agent in a memory cgroup whose limit is too small: it ends, or does what it should, and nothing else is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.apiserver import objects
from tests.faults.faulted import Faulted
from tests.faults.memory_cgroup import MemoryCgroup
from tests.lab import Agent
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.faults]

MB = 1 << 20


@pytest.fixture
def cgroup(faulted: Faulted) -> Iterator[MemoryCgroup]:
    made = MemoryCgroup("faults")
    yield made
    made.limit(None)
    faulted.end_agents(())
    made.remove()


def _has_ended(agent: Agent) -> bool:
    assert agent.process is not None
    return agent.process.poll() is not None


def _is_well(agent: Agent) -> bool:
    with suppress(OSError):
        return agent.is_ready and agent.http("/healthz")[0] == 200
    return False


def _said(agent: Agent, cgroup: MemoryCgroup) -> str:
    """Of one that has ended: the kernel has killed it, or its last line says what it found no memory for."""
    assert agent.process is not None
    code = agent.process.poll()
    if code == -9:
        assert cgroup.kills
        return "killed"
    lines = agent.text.splitlines()
    assert code == 1, agent.text
    assert lines[-1].startswith("Error: "), agent.text
    assert "Cannot allocate memory" in lines[-1], agent.text
    assert "Traceback" not in agent.text
    return lines[-1]


# Limits are in MB: an agent needs about 40 of its own, and 150 for maps that it creates.
@pytest.mark.parametrize(
    ("maps", "limit"),
    [
        *(("reused maps", limit) for limit in (16, 32, 48, 96)),
        *(("new maps", limit) for limit in (32, 64, 96, 128, 192, 256)),
    ],
)
def test_start_within_a_small_limit_of_memory(
    faulted: Faulted, cgroup: MemoryCgroup, maps: str, limit: int
) -> None:
    """An agent starts in a memory cgroup with a small limit: it works, or ends and says why, and works without the limit."""
    # Maps of another size are not those that are there. All flows have room, as an evicted half would break the other.
    size = 300_000 + 100 * limit
    arguments = ("--max-conntrack", str(size)) if maps == "new maps" else ()
    former = faulted.agent().start()
    faulted.wait_equal()
    former.kill()
    cgroup.limit(limit * MB)
    # Flows of packets may be lost where maps change their size.
    with faulted.under_load("small limit of memory", packets=maps == "reused maps"):
        agent = faulted.agent(*arguments)
        agent.start(wait=False, before_exec=cgroup.join)
        until(lambda: _has_ended(agent) or _is_well(agent), "the agent neither works nor ends")
        if _has_ended(agent):
            _said(agent, cgroup)
            # It is started again and again, and each start may get further.
            again = faulted.agent(*arguments)
            again.start(wait=False, before_exec=cgroup.join)
            until(lambda: _has_ended(again) or _is_well(again), "the agent neither works nor ends")
            if not _has_ended(again):
                again.kill()
            cgroup.limit(None)
            agent.start(before_exec=cgroup.join)
        faulted.put_endpoints("web", "w1")
        faulted.put_endpoints("web", "w1", "w2")
        faulted.wait_equal()
    if maps == "new maps":
        # The next one starts from the usual sizes.
        agent.kill()
        faulted.agent().start().stop()
    else:
        agent.stop()


def test_cluster_that_grows_beyond_the_limit_of_memory(faulted: Faulted, cgroup: MemoryCgroup) -> None:
    """The memory cgroup of a running agent gets full: it is killed or goes on, and programs all once there is room."""
    agent = faulted.agent().start(before_exec=cgroup.join)
    faulted.wait_equal()
    with faulted.under_load("memory full"):
        cgroup.limit(cgroup.used + MB)
        put = 0
        while put < 400 and not _has_ended(agent):
            _put(faulted, put)
            put += 1
        if _has_ended(agent):
            _said(agent, cgroup)
        cgroup.limit(None)
        if _has_ended(agent):
            agent.start(before_exec=cgroup.join)
        faulted.wait_equal()
        for number in range(put):
            _delete(faulted, number)
        faulted.wait_equal()
    agent.stop()


def _put(faulted: Faulted, number: int) -> None:
    name = f"grown-{number}"
    made = objects.service(name, f"10.96.{202 + number // 200}.{number % 200 + 1}", namespace="shop")
    faulted.control("put", made, resource="services")
    found = [objects.endpoint(objects.pod_address(900_000 + 10 * number + n), "node-b") for n in range(10)]
    faulted.control("put", objects.endpoint_slice(name, found, namespace="shop"), resource="endpointslices")


def _delete(faulted: Faulted, number: int) -> None:
    for resource, name in (("services", f"grown-{number}"), ("endpointslices", f"grown-{number}-x7k2p")):
        faulted.control("delete", resource=resource, namespace="shop", name=name)
