"""The number of open sockets and flows per backend is exact, also across restarts of the agent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e import load
from tests.e2e.world import NODE_PORT, SERVICE_IPS, World
from tests.lab import Agent, Lab
from tests.lab.holders import Holder
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        yield World(lab)


@pytest.fixture(scope="module")
def agent(world: World) -> Agent:
    world.write_web(world.w1)
    return world.agent().start()


def open_to(world: World, port: str = "8080/TCP") -> int:
    """The number of open sockets and flows to the pod w1."""
    address, _, protocol = port.partition("/")
    rows = json.loads(world.a.cli("backend", "list", "-o", "json"))
    found: int = sum(
        row["open"]
        for row in rows
        if row["address"] == f"{world.w1.address}:{address}" and row["protocol"] == protocol
    )
    return found


def test_open_count_covers_sockets_and_flows_until_they_close(world: World, agent: Agent) -> None:
    inside = Holder(world.client, [("tcp", "tcp", IP, 80, 7)])
    outside = Holder(world.lab.outside, [("tcp", "tcp", world.a.address, NODE_PORT, 5)])
    inside.wait()
    outside.wait()
    assert open_to(world) == 12
    outside.close()
    until(lambda: open_to(world) == 7)
    agent.kill()
    inside.close()
    until(lambda: open_to(world) == 0)
    again = world.agent().start()
    assert open_to(world) == 0
    again.stop()


def test_open_count_is_zero_after_load_with_agent_restarts(world: World, agent: Agent) -> None:
    """The load uses sockets and packets, while the agent is killed and restarted."""
    running = world.agent().start()
    with load.running(world.client, IP, 80), load.running(world.lab.outside, world.a.address, NODE_PORT):
        time.sleep(1)
        running.kill()
        time.sleep(1)
        running = world.agent().start()
    until(lambda: open_to(world) == 0)
    running.stop()


def test_open_count_has_a_socket_that_connects_twice_once(world: World, agent: Agent) -> None:
    running = world.agent().start()
    holder = Holder(world.client, [("again", "udp-again", IP, 53, 20)])
    holder.wait()
    assert open_to(world, "8053/UDP") == 20
    holder.close()
    until(lambda: open_to(world, "8053/UDP") == 0)
    running.stop()


def test_open_count_drops_when_the_sweeper_deletes_expired_flows(world: World, agent: Agent) -> None:
    running = world.agent("--conntrack-udp-timeout", "1s", "--conntrack-udp-timeout-stream", "1s").start()
    holder = Holder(world.lab.outside, [("udp", "udp-asking", world.a.address, 30053, 9)])
    holder.wait()
    until(lambda: open_to(world, "8053/UDP") == 9)
    until(lambda: open_to(world, "8053/UDP") == 0)
    holder.close()
    running.stop()
