"""Connections to a removed endpoint are closed after ``--stale-tcp-seconds``, unless it is added again."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import EXTERNAL, SERVICE_IPS
from tests.lab import Lab, clients
from tests.lab.holders import Holder
from tests.lab.processes import read_line
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: The agent runs with this value; its default is 5.
SECONDS = 3.0
THROUGH = {"v4", "v6", "mapped"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


def _hold(cluster: OutsideClientCluster, seconds: float, expected: int = 0) -> Holder:
    """Sockets of a pod that are connected to w1, watched for ``seconds`` and until ``expected`` are closed."""
    holder = Holder(cluster.client, [(f, "tcp", ip, 80, 2) for f, ip in SERVICE_IPS.items()], seconds)
    holder.wait()
    holder.watch(expected)
    return holder


def _wait_refused(cluster: OutsideClientCluster) -> None:
    until(
        lambda: cluster.client.call(clients.connect_error, SERVICE_IPS["v4"], 80) == "ECONNREFUSED",
        "new connections are not refused",
    )


def _wait_served(cluster: OutsideClientCluster) -> None:
    until(
        lambda: cluster.client.call(clients.connect_error, SERVICE_IPS["v4"], 80) == "connected",
        "the added endpoint is not served",
    )


def _flows(cluster: OutsideClientCluster) -> list[HeldConnection]:
    """Connections of an external client in both families."""
    return [HeldConnection(cluster.outside, ip, 80) for ip in (EXTERNAL, SERVICE_IPS["v6"])]


def test_connections_survive_a_slice_removed_for_less_than_stale_tcp_seconds(
    cluster: OutsideClientCluster,
) -> None:
    """New connections are refused in the meantime; established ones persist, of sockets and of packets."""
    cluster.write_web(cluster.w1)
    agent = cluster.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(cluster, SECONDS + 2.0), _flows(cluster)
    ids = cluster.a.cli("backend", "list", "-o", "json")
    cluster.write_web()
    _wait_refused(cluster)
    time.sleep(0.7)
    assert [each.ask() for each in flows] == ["alive", "alive"]
    cluster.write_web(cluster.w1)
    _wait_served(cluster)
    ended, _ = holder.result()
    assert ended == {}
    assert [each.ask() for each in flows] == ["alive", "alive"]
    assert "shop/web" in ids
    assert "closed stale sockets" not in agent.text
    agent.stop()


def test_connections_are_closed_after_stale_tcp_seconds(cluster: OutsideClientCluster) -> None:
    """They are not closed before, and not much later."""
    cluster.write_web(cluster.w1)
    agent = cluster.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(cluster, SECONDS + 3.0, 2 * len(THROUGH)), _flows(cluster)
    began = time.time()
    cluster.write_web()
    _wait_refused(cluster)
    assert [each.ask() for each in flows] == ["alive", "alive"]
    ended, last = holder.result()
    assert ended == dict.fromkeys(THROUGH, 2)
    assert SECONDS <= last - began < SECONDS + 2.5
    assert all(each.ask() != "alive" for each in flows)
    agent.stop()


_ASK = """
import json, socket, sys
s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(3)
s.connect((sys.argv[1], 53))
print(flush=True)
for line in sys.stdin:
    try:
        s.send(b"?")
        print(json.loads(s.recv(4096))["name"], flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class ConnectedUdp:
    """A connected UDP socket in a pod, which sends a request for each call."""

    def __init__(self, cluster: OutsideClientCluster, address: str) -> None:
        self._process = cluster.client.popen([sys.executable, "-c", _ASK, address], stdin=-1, stdout=-1)
        self._line()

    def ask(self) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        return read_line(self._process).strip()


def test_udp_is_redirected_before_stale_tcp_seconds(cluster: OutsideClientCluster) -> None:
    """A connected UDP socket is redirected to another endpoint immediately."""
    cluster.write_web(cluster.w1)
    agent = cluster.agent("--stale-tcp-seconds", "600").start()
    sockets = [ConnectedUdp(cluster, address) for address in SERVICE_IPS.values()]
    assert [each.ask() for each in sockets] == ["w1"] * len(sockets)
    cluster.write_web(cluster.w2)
    for each in sockets:
        until(lambda each=each: each.ask() == "w2", "datagrams still go to the removed endpoint")  # type: ignore[misc]
    agent.stop()


@pytest.mark.parametrize("is_added_again", [True, False], ids=["added-again", "removed"])
def test_agent_that_starts_while_the_slice_is_removed_waits_for_stale_tcp_seconds(
    cluster: OutsideClientCluster, is_added_again: bool
) -> None:
    """The removed endpoint may be added again within the same time after the start."""
    cluster.write_web(cluster.w1)
    agent = cluster.agent("--stale-tcp-seconds", str(SECONDS)).start()
    holder, flows = _hold(cluster, 8.0, 0 if is_added_again else 2 * len(THROUGH)), _flows(cluster)
    cluster.write_web()
    _wait_refused(cluster)
    agent.kill()
    agent = cluster.agent("--stale-tcp-seconds", str(SECONDS)).start()
    assert [each.ask() for each in flows] == ["alive", "alive"]
    if is_added_again:
        cluster.write_web(cluster.w1)
        _wait_served(cluster)
    ended, _ = holder.result()
    assert ended == ({} if is_added_again else dict.fromkeys(THROUGH, 2))
    assert [each.ask() == "alive" for each in flows] == [is_added_again, is_added_again]
    agent.stop()
