"""The number of open sockets and flows per backend is exact, also across restarts of the agent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e import connection_load
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS, TwoNodeCluster
from tests.lab import Agent, Lab
from tests.lab.holders import Holder
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IP = SERVICE_IPS["v4"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        yield TwoNodeCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: TwoNodeCluster) -> Agent:
    cluster.write_web(cluster.w1)
    return cluster.agent().start()


def open_to(cluster: TwoNodeCluster, port: str = "8080/TCP") -> int:
    """The number of open sockets and flows to the pod w1."""
    address, _, protocol = port.partition("/")
    rows = json.loads(cluster.a.cli("backend", "list", "-o", "json"))
    found: int = sum(
        row["open"]
        for row in rows
        if row["address"] == f"{cluster.w1.address}:{address}" and row["protocol"] == protocol
    )
    return found


def test_open_count_covers_sockets_and_flows_until_they_close(cluster: TwoNodeCluster, agent: Agent) -> None:
    inside = Holder(cluster.client, [("tcp", "tcp", IP, 80, 7)])
    outside = Holder(cluster.lab.outside, [("tcp", "tcp", cluster.a.address, NODE_PORT, 5)])
    inside.wait()
    outside.wait()
    assert open_to(cluster) == 12
    outside.close()
    until(lambda: open_to(cluster) == 7)
    agent.kill()
    inside.close()
    until(lambda: open_to(cluster) == 0)
    again = cluster.agent().start()
    assert open_to(cluster) == 0
    again.stop()


def test_open_count_is_zero_after_load_with_agent_restarts(cluster: TwoNodeCluster, agent: Agent) -> None:
    """The load uses sockets and packets, while the agent is killed and restarted."""
    running = cluster.agent().start()
    with (
        connection_load.running(cluster.client, IP, 80),
        connection_load.running(cluster.lab.outside, cluster.a.address, NODE_PORT),
    ):
        time.sleep(1)
        running.kill()
        time.sleep(1)
        running = cluster.agent().start()
    until(lambda: open_to(cluster) == 0)
    running.stop()


def test_open_count_has_a_socket_that_connects_twice_once(cluster: TwoNodeCluster, agent: Agent) -> None:
    running = cluster.agent().start()
    holder = Holder(cluster.client, [("again", "udp-again", IP, 53, 20)])
    holder.wait()
    assert open_to(cluster, "8053/UDP") == 20
    holder.close()
    until(lambda: open_to(cluster, "8053/UDP") == 0)
    running.stop()


def test_open_count_drops_when_the_sweeper_deletes_expired_flows(
    cluster: TwoNodeCluster, agent: Agent
) -> None:
    running = cluster.agent("--conntrack-udp-timeout", "1s", "--conntrack-udp-timeout-stream", "1s").start()
    holder = Holder(cluster.lab.outside, [("udp", "udp-asking", cluster.a.address, 30053, 9)])
    holder.wait()
    until(lambda: open_to(cluster, "8053/UDP") == 9)
    until(lambda: open_to(cluster, "8053/UDP") == 0)
    holder.close()
    running.stop()
