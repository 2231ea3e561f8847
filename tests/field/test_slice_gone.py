"""An endpoint that is removed may come back within a stated time: nothing of it is ended before."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.outer import Held, Outer
from tests.e2e.world import EXTERNAL, SERVICE_IPS
from tests.lab import Lab, clients
from tests.lab.holders import Holder
from tests.lab.spaces import read_line
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: The agent runs with this value; its default is 5.
SECONDS = 3.0
THROUGH = {"v4", "v6", "mapped"}


@pytest.fixture(scope="module")
def world() -> Iterator[Outer]:
    with Lab() as lab:
        yield Outer(lab)


def _hold(world: Outer, seconds: float, expected: int = 0) -> Holder:
    """Sockets of a pod that were sent to w1, watched for ``seconds`` and until ``expected`` are ended."""
    holder = Holder(world.client, [(f, "tcp", ip, 80, 2) for f, ip in SERVICE_IPS.items()], seconds)
    holder.wait()
    holder.watch(expected)
    return holder


def _refused(world: Outer) -> None:
    until(
        lambda: world.client.call(clients.connect_error, SERVICE_IPS["v4"], 80) == "ECONNREFUSED",
        "a new connection finds no endpoint",
    )


def _served(world: Outer) -> None:
    until(
        lambda: world.client.call(clients.connect_error, SERVICE_IPS["v4"], 80) == "connected",
        "the endpoint is back",
    )


def _flows(world: Outer) -> list[Held]:
    """Connections of a client outside, both families."""
    return [Held(world.outside, ip, 80) for ip in (EXTERNAL, SERVICE_IPS["v6"])]


def test_connections_outlive_a_slice_that_is_away_for_a_moment(world: Outer) -> None:
    """A slice that is gone for 0.7 s ends no connection, of sockets or of packets; new ones are refused at once."""
    world.write_web(world.w1)
    agent = world.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(world, SECONDS + 2.0), _flows(world)
    ids = world.a.cli("backend", "list", "-o", "json")
    world.write_web()
    _refused(world)
    time.sleep(0.7)
    assert [each.ask() for each in flows] == ["alive", "alive"]
    world.write_web(world.w1)
    _served(world)
    ended, _ = holder.result()
    assert ended == {}
    assert [each.ask() for each in flows] == ["alive", "alive"]
    assert "shop/web" in ids
    assert "closed stale sockets" not in agent.text
    agent.stop()


def test_connections_end_when_the_time_is_over(world: Outer) -> None:
    """An endpoint that stays away loses its connections after the stated time: not before, and not much later."""
    world.write_web(world.w1)
    agent = world.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(world, SECONDS + 3.0, 2 * len(THROUGH)), _flows(world)
    began = time.time()
    world.write_web()
    _refused(world)
    assert [each.ask() for each in flows] == ["alive", "alive"]
    ended, last = holder.result()
    assert ended == dict.fromkeys(THROUGH, 2)
    assert SECONDS <= last - began < SECONDS + 2.5
    assert all(each.ask() != "alive" for each in flows)
    agent.stop()


_ASK = """
import json, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(0.5)
s.connect((sys.argv[1], 53))
print(flush=True)
for line in sys.stdin:
    try:
        s.send(b"?")
        print(json.loads(s.recv(4096))["name"], flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Asking:
    """A connected UDP socket in a pod, which asks when it is told to."""

    def __init__(self, world: Outer, address: str) -> None:
        self._process = world.client.popen([sys.executable, "-c", _ASK, address], stdin=-1, stdout=-1)
        self._line()

    def ask(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        return read_line(self._process).strip()


def test_udp_leaves_a_removed_endpoint_at_once(world: Outer) -> None:
    """Datagrams have no connection to lose: what a connected socket sends goes to another endpoint at once."""
    world.write_web(world.w1)
    agent = world.agent("--stale-tcp-seconds", "600").start()
    sockets = [Asking(world, address) for address in SERVICE_IPS.values()]
    assert [each.ask() for each in sockets] == ["w1"] * len(sockets)
    world.write_web(world.w2)
    for each in sockets:
        until(lambda each=each: each.ask() == "w2", "still with the endpoint that is gone")  # type: ignore[misc]
    agent.stop()


@pytest.mark.parametrize("returns", [True, False], ids=["back", "gone"])
def test_an_agent_that_starts_meanwhile_waits_as_well(world: Outer, returns: bool) -> None:
    """An agent that starts while the slice is away gives its endpoint the same time to come back."""
    world.write_web(world.w1)
    agent = world.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(world, 8.0, 0 if returns else 2 * len(THROUGH)), _flows(world)
    world.write_web()
    _refused(world)
    agent.kill()
    agent = world.agent("--stale-tcp-seconds", str(SECONDS)).start()
    assert [each.ask() for each in flows] == ["alive", "alive"]
    if returns:
        world.write_web(world.w1)
        _served(world)
    ended, _ = holder.result()
    assert ended == ({} if returns else dict.fromkeys(THROUGH, 2))
    assert [each.ask() == "alive" for each in flows] == [returns, returns]
    agent.stop()
