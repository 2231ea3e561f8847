"""``migrate plan``, ``run`` and ``rollback`` on a lab node with an agent and a process named kube-proxy."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
import yaml

from ebpfproxy.datapath.dump import BackendRef, FrontendRow
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.netlink.ctnetlink import Flow
from ebpfproxy.operator.migrate.node import steps
from tests.lab import Lab, clients
from tests.operator.migrate import rules
from tests.operator.migrate.kube_proxy_cluster import KubeProxyCluster
from tests.operator.migrate.test_running_kube_proxy import start


@pytest.fixture(scope="module")
def cluster() -> Iterator[KubeProxyCluster]:
    with Lab() as lab:
        yield KubeProxyCluster(lab)


@pytest.mark.root
def test_kube_proxy_is_stopped_only_after_the_agent_serves_all_frontends(cluster: KubeProxyCluster) -> None:
    """A complete migration of a node whose kube-proxy is a plain process."""
    cluster.kube_proxy("iptables-legacy")
    process = start(cluster.a, "--proxy-mode=iptables")
    rules_before = cluster.a.run(["iptables-legacy-save"])

    output = cluster.fails("plan")
    assert "no agent has run with this --bpf-root" in output
    assert "20 of 20 frontends differ between kube-proxy and maps" in output
    assert "no agent has run" in cluster.fails("run", "--terminate")

    agent = cluster.agent().start()
    cluster.remove_service("shop", "orders-api")
    cluster.wait_frontends(18)
    assert "2 of 20 frontends differ" in cluster.fails("run", "--terminate", "--timeout", "1s")
    found = json.loads(cluster.fails("plan", "--stopped", "--brief", "-o", "json"))
    assert found["differences"] == 2, "kube-proxy runs, so --stopped has no effect"
    cluster.write()
    cluster.wait_frontends(20)

    output = cluster.migrate("plan")
    assert "kube-proxy:           mode iptables" in output
    assert f"pid {process.pid}, started by: process, mode iptables" in output
    assert f"with --terminate: SIGTERM to kube-proxy, pid {process.pid}" in output
    assert "BLOCKERS" not in output
    planned = yaml.safe_load(cluster.migrate("run", "--dry-run", "-o", "yaml"))
    assert (planned["modes"], planned["blockers"], planned["daemon_set"]) == (["iptables"], [], None)
    assert f"with --terminate: SIGTERM to kube-proxy, pid {process.pid}" in cluster.fails("run")
    assert process.poll() is None
    assert _rules(cluster.a.run(["iptables-legacy-save"])) == _rules(rules_before)

    done = json.loads(cluster.migrate("run", "--terminate", "-o", "json"))["done"]
    assert done[0] == "the agent's maps serve all 20 frontends of kube-proxy's rules"
    assert done[1] == f"kube-proxy, pid {process.pid}, ended by SIGTERM"
    assert process.wait(5) == 0
    assert "KUBE-S" not in cluster.a.run(["iptables-legacy-save"])
    assert "nothing of kube-proxy is left" in cluster.migrate("run")
    assert cluster.client.call(clients.ask_tcp, rules.ORDERS, 80)["name"] in ("w1", "w2")
    agent.stop()


def _rules(saved: str) -> list[str]:
    return [line for line in saved.splitlines() if line.startswith("-A")]


@pytest.mark.root
def test_outdated_rules_of_a_stopped_kube_proxy_do_not_block(cluster: KubeProxyCluster) -> None:
    """A repeated call after an interrupted one finds such rules."""
    cluster.kube_proxy("nftables")
    agent = cluster.agent().start()
    cluster.remove_service("shop", "orders-api")
    cluster.wait_frontends(18)
    assert "2 of 20 frontends differ" in cluster.fails("run", "--timeout", "1s")
    assert (
        "2 of 20 frontends differ"
        in json.loads(cluster.migrate("plan", "--stopped", "-o", "json"))["warnings"][0]
    )
    output = cluster.migrate("run", "--stopped")
    assert "removed nftables table ip kube-proxy" in output
    assert "serve all" not in output
    cluster.write()
    cluster.wait_frontends(20)

    # A rollback that times out while the agent runs removes nothing.
    cluster.kube_proxy("nftables")
    output = cluster.fails("rollback", "--wait-for-agent", "--timeout", "1s")
    assert "waiting for the agent to end" in output
    assert "the agent still runs after 1 s" in output
    assert cluster.client.call(clients.ask_tcp, rules.ORDERS, 80)["name"] in ("w1", "w2")
    rollback = cluster.start_migrate("rollback", "--wait-for-agent")
    agent.stop()
    assert rollback.wait(30) == 0
    assert not pin_folder(cluster.a.bpf_root).exists()


@pytest.mark.root
def test_cleanup_without_an_agent_removes_leftovers_and_reports_when_none_exist(
    cluster: KubeProxyCluster,
) -> None:
    cluster.kube_proxy("nftables")
    command = [sys.executable, "-c", "from ebpfproxy.cli.migrate import cleanup_kube_proxy as c; c()"]
    output = cluster.a.run(command)
    assert "removed nftables table ip kube-proxy\nremoved nftables table ip6 kube-proxy" in output
    assert cluster.a.run(command) == "nothing of kube-proxy is left\n"


def _row(frontend: str, kind: str, *backends: str) -> FrontendRow:
    return FrontendRow(
        namespace="a",
        name="b",
        port_name="",
        type=kind,
        scope="internal",
        frontend=frontend,
        algorithm="random",
        affinity=0,
        backends=tuple(BackendRef(each, "active") for each in backends),
    )


@pytest.mark.parametrize(
    ("protocol", "frontend", "endpoint", "stale"),
    [
        (17, ("10.0.0.1", 53), ("10.1.0.1", 5353), False),
        (17, ("10.0.0.1", 53), ("10.1.0.9", 5353), True),
        (17, ("10.0.0.1", 53), ("10.1.0.1", 53), True),
        (6, ("10.0.0.1", 53), ("10.1.0.9", 5353), False),
        (17, ("10.0.0.2", 53), ("10.1.0.9", 5353), False),
        (17, ("192.168.0.7", 30053), ("10.1.0.9", 5353), True),
        (17, ("192.168.0.7", 30053), ("10.1.0.1", 5353), False),
        (17, ("10.0.0.3", 53), ("10.1.0.9", 5353), False),
        (17, ("fd00::1", 53), ("fd01::1", 5353), False),
        (17, ("fd00::1", 53), ("fd01::2", 5353), True),
    ],
)
def test_udp_flow_is_stale_if_its_endpoint_is_not_of_the_service(
    protocol: int, frontend: tuple[str, int], endpoint: tuple[str, int], stale: bool
) -> None:
    rows = [
        _row("10.0.0.1:53/UDP", "ClusterIP", "10.1.0.1:5353"),
        _row("192.168.0.1:30053/UDP", "NodePort", "10.1.0.1:5353"),
        _row("10.0.0.3:53/UDP", "ClusterIP"),
        _row("[fd00::1]:53/UDP", "ClusterIP", "[fd01::1]:5353"),
    ]
    client = ("10.9.9.9", 4711)
    assert steps.stale_datagrams(rows)(Flow(protocol, client, frontend, endpoint, client)) is stale
