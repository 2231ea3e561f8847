"""What an agent listens at: what docs/security.md names under "Open ports and files", and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

HEALTHZ, METRICS, CHECKED = 10256, 10249, 31234


@pytest.fixture
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        yield TwoNodeCluster(lab)


def listening(cluster: TwoNodeCluster, agent: Agent) -> set[str]:
    """Address, port and protocol of all sockets of the agent's that others can connect or send to."""
    assert agent.process is not None
    found = set()
    for kind in ("--tcp", "--udp", "--raw", "--sctp", "--mptcp", "--vsock", "--packet"):
        for line in cluster.a.run(["ss", "-Hnap", kind]).splitlines():
            state, local = line.split()[0], line.split()[3]
            if f"pid={agent.process.pid}," in line and state in ("LISTEN", "UNCONN"):
                found.add(f"{local}/{kind.strip('-')}")
    return found


def unix_listeners(cluster: TwoNodeCluster, agent: Agent) -> list[str]:
    """Names of its unix sockets that others can connect to."""
    assert agent.process is not None
    lines = cluster.a.run(["ss", "-Hnapx"]).splitlines()
    return [
        line.split()[4]
        for line in lines
        if f"pid={agent.process.pid}," in line and line.split()[1] == "LISTEN"
    ]


def test_an_agent_with_the_default_configuration_listens_at_health_checks_and_metrics_alone(
    cluster: TwoNodeCluster,
) -> None:
    """Metrics are for processes of the node alone, and no pod and no other node gets to them."""
    agent = cluster.agent().start()
    assert listening(cluster, agent) == {f"*:{HEALTHZ}/tcp", f"127.0.0.1:{METRICS}/tcp"}
    # Abstract ones: where commands ask, and where an agent that is to replace this one waits.
    first, second = sorted(unix_listeners(cluster, agent))
    assert re.fullmatch(r"@ebpfproxy/[0-9a-f]{32}", first)
    assert second == f"{first}/successor"
    assert cluster.a.call(clients.get, METRICS, "/metrics")[0] == 200
    for outsider in (cluster.client, cluster.b, cluster.lab.outside):
        assert outsider.call(clients.connect_error, cluster.a.address, METRICS) == "ECONNREFUSED"
        curl = ["curl", "-s", "-m", "60", f"http://{cluster.a.address}:{HEALTHZ}/livez"]
        assert '"healthy":true' in outsider.run(curl).replace(" ", "")
    agent.stop()


def test_health_check_node_ports_are_listened_at_while_their_service_is_there(
    cluster: TwoNodeCluster,
) -> None:
    usual = {f"*:{HEALTHZ}/tcp", f"127.0.0.1:{METRICS}/tcp"}
    agent = cluster.agent().start()
    file = cluster.manifests / "checked.yaml"
    checked = manifests.service(
        "checked",
        clusterIPs=["10.96.0.60"],
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=CHECKED,
    )
    manifests.write(file, checked)
    until(lambda: listening(cluster, agent) == {*usual, f"*:{CHECKED}/tcp"}, "the port is not listened at")
    file.unlink()
    until(lambda: listening(cluster, agent) == usual, "the port is listened at")
    agent.stop()


def test_addresses_of_the_configuration_are_the_only_ones(cluster: TwoNodeCluster) -> None:
    node = cluster.a.address
    options = ("--metrics-bind-address", f"{node}:{METRICS}", "--healthz-bind-address", "127.0.0.1:10300")
    agent = cluster.agent(*options).start()
    assert listening(cluster, agent) == {f"{node}:{METRICS}/tcp", "127.0.0.1:10300/tcp"}
    agent.stop()


def test_an_agent_may_listen_at_nothing(cluster: TwoNodeCluster) -> None:
    agent = cluster.agent("--metrics-bind-address", "", "--healthz-bind-address", "").start()
    assert listening(cluster, agent) == set()
    agent.stop()
