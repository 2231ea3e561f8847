"""Connections through kube-proxy survive a migration and a rollback, and no request fails meanwhile."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.migrate.node import conntrack_hold, hold_chains, leftovers, nftables, tools
from tests.lab import Lab, clients
from tests.lab.waiting import until
from tests.operator.migrate import rules, rules_ipv6
from tests.operator.migrate.kube_proxy_cluster import CONNTRACK_HOLD, KubeProxyCluster, broken
from tests.operator.migrate.traffic import LongConnection, no_request_fails

pytestmark = pytest.mark.root


@pytest.fixture
def cluster() -> Iterator[KubeProxyCluster]:
    with Lab() as lab:
        yield KubeProxyCluster(lab)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", rules.MODES)
def test_migration_and_rollback_under_load_keep_long_connections(
    cluster: KubeProxyCluster, mode: str
) -> None:
    cluster.kube_proxy(mode)
    connections = cluster.connections()
    assert broken(connections) == {}
    assert {each.server for each in connections} == {"w1", "w2"}

    with no_request_fails(*cluster.loads()):
        agent = cluster.agent().start()
        time.sleep(0.3)
        assert broken(connections) == {}, "kube-proxy and the agent run side by side"
        planned = json.loads(cluster.migrate("plan", "-o", "json"))
        assert (planned["blockers"], planned["differences"]) == ([], {})
        assert planned["flows"] >= len(connections)
        output = cluster.migrate("run")
        time.sleep(0.3)
        assert broken(connections) == {}, output
    assert "established flows of kube-proxy, left to netfilter: " in output
    assert cluster.leftovers_on(cluster.a) == (False, CONNTRACK_HOLD)

    # A restart of the agent during the handover keeps them, too.
    agent.stop()
    agent.start()
    assert broken(connections) == {}

    # A rollback keeps connections that socket hooks have translated and ends those of packet hooks.
    agent_connections = [
        LongConnection(cluster.client, "tcp", rules.ORDERS, 80),
        LongConnection(cluster.a, "tcp", rules.ORDERS, 80),
    ]
    assert "in use by another ebpfproxy agent" in _rejected_rollback(cluster, mode)
    agent.stop()
    with no_request_fails(*cluster.loads()[:2]):
        output = cluster.migrate("rollback")
        time.sleep(0.3)
        assert broken([*connections, *agent_connections]) == {}, output
    steps = output.splitlines()
    assert steps.index("detached sendmsg6") < steps.index("detached recvmsg4"), (
        "hooks that translate requests are detached before hooks of replies"
    )
    assert cluster.leftovers_on(cluster.a) == (True, [])
    assert cluster.outside.call(clients.spread_tcp, cluster.a.address, rules.PAYMENTS_NODE_PORT, 5)


def _rejected_rollback(cluster: KubeProxyCluster, mode: str) -> str:
    """Returns the error of a rollback with kube-proxy's rules in place while the agent still runs."""
    assert "start kube-proxy, then call this again" in cluster.fails("rollback", "--timeout", "1s")
    cluster.kube_proxy(mode)
    return cluster.fails("rollback")


@pytest.mark.parametrize("mode", rules.MODES)
def test_rollback_ends_entries_of_datagrams_that_netfilter_does_not_translate(mode: str) -> None:
    """Netfilter's entry ends while the agent serves; the next request begins one without NAT.

    Only sockets outside the socket hooks begin one: they were connected before the agent ran.
    """
    with Lab() as lab:
        cluster = KubeProxyCluster(lab, dual_stack=True)
        cluster.kube_proxy(mode)
        hosts = (rules.DNS, rules_ipv6.address(rules.DNS))
        connections = [LongConnection(cluster.a, "udp", host, 53) for host in hosts]
        agent = cluster.agent().start()
        cluster.migrate("run")
        assert cluster.a.call(_end_flows) == len(connections)
        assert broken(connections) == {}, "the agent's packet hooks translate them"
        agent.stop()
        cluster.kube_proxy(mode)
        output = cluster.migrate("rollback")
        assert broken(connections) == {}, output


def _end_flows() -> int:
    return ctnetlink.remove(lambda flow: True)


def test_rollback_with_drain_fails_no_request_of_external_clients(cluster: KubeProxyCluster) -> None:
    agent = cluster.agent().start()
    cluster.kube_proxy("nftables")
    agent.stop()
    cluster.drain_fails_no_request(cluster.a.address)


def test_cleanup_while_kube_proxy_runs_fails_no_request_of_pods(cluster: KubeProxyCluster) -> None:
    """The first step ends new translations; replies in flight arrive before the last step."""
    cluster.kube_proxy("nftables")
    cluster.agent().start().stop()
    with no_request_fails(*cluster.loads()[:2]):
        steps = cluster.a.cli("cleanup").splitlines()
        time.sleep(0.3)
    assert steps.index("detached sendmsg6") < steps.index("detached recvmsg4")
    assert cluster.outside.call(clients.spread_tcp, cluster.a.address, rules.PAYMENTS_NODE_PORT, 5)


def test_cleanup_removes_the_conntrack_hold_of_a_migration(cluster: KubeProxyCluster) -> None:
    cluster.kube_proxy("nftables")
    connections = [LongConnection(cluster.client, "tcp", rules.ORDERS, 80)]
    agent = cluster.agent().start()
    cluster.migrate("run")
    assert broken(connections) == {}
    agent.stop()
    assert cluster.leftovers_on(cluster.a) == (False, CONNTRACK_HOLD)
    output = cluster.a.cli("cleanup")
    assert all(f"removed {each}" in output for each in CONNTRACK_HOLD)
    assert cluster.leftovers_on(cluster.a) == (False, [])
    assert "nothing is pinned" in cluster.a.cli("cleanup")


def _remove(hold_conntrack: bool) -> int:
    """Removes kube-proxy's tables and returns the number of its flows; only ours keeps conntrack enabled."""
    if hold_conntrack:
        assert not leftovers.remove(leftovers.find()).failed
    else:
        nftables.remove(nftables.find())
    return len(ctnetlink.find())


@pytest.mark.parametrize("hold", [True, False])
def test_translated_connections_need_a_rule_that_enables_conntrack(
    cluster: KubeProxyCluster, hold: bool
) -> None:
    """Without any rule that uses conntrack its entries remain, but it processes no packets."""
    cluster.kube_proxy("nftables")
    connections = [
        LongConnection(cluster.client, "tcp", rules.ORDERS, 80),
        LongConnection(cluster.a, "tcp", rules.ORDERS, 80),
    ]
    assert cluster.a.call(_remove, hold) == 2
    assert set(broken(connections)) == (set() if hold else {each.name for each in connections})


def _without_nft() -> tuple[list[str], list[str]]:
    has = tools.has
    tools.has = lambda tool: tool != "nft" and has(tool)
    try:
        removed = leftovers.remove(leftovers.find())
        assert not removed.failed
    finally:
        tools.has = has
    nftables.remove(nftables.find())
    return list(removed.done[:2]), conntrack_hold.find()


def test_without_nft_an_iptables_chain_keeps_conntrack_enabled(cluster: KubeProxyCluster) -> None:
    """The node has rules of both modes, as after a change of mode."""
    cluster.kube_proxy("nftables")
    cluster.kube_proxy("iptables-legacy")
    connections = [
        LongConnection(cluster.client, "tcp", rules.ORDERS, 80),
        LongConnection(cluster.a, "tcp", rules.ORDERS, 80),
    ]
    chains = [
        f"{family}-legacy chain {hold_chains.CHAIN} of table nat" for family in ("iptables", "ip6tables")
    ]
    assert cluster.a.call(_without_nft) == ([f"made {each}" for each in chains], chains)
    assert broken(connections) == {}
    assert cluster.a.call(conntrack_hold.end) == chains
    assert set(broken(connections)) == {each.name for each in connections}


def test_masquerade_ports_that_netfilter_uses_are_not_allocated(cluster: KubeProxyCluster) -> None:
    """Both masquerade with the same few ports; no port of an established connection is allocated again."""
    cluster.a.call(_load_with_masquerade_ports, "20000-20029")
    port = rules.PAYMENTS_NODE_PORT
    connections = [LongConnection(cluster.outside, "tcp", cluster.a.address, port) for _ in range(10)]
    cluster.agent("--masquerade-ports", "20000-20059").start()
    agent_connections = [LongConnection(cluster.outside, "tcp", cluster.a.address, port) for _ in range(35)]
    assert broken([*connections, *agent_connections]) == {}
    cluster.migrate("run")
    assert broken([*connections, *agent_connections]) == {}


def test_netfilter_takes_no_masquerade_ports_of_flows_that_drain(cluster: KubeProxyCluster) -> None:
    """kube-proxy masquerades new connections with the same few ports as the agent its own."""
    agent = cluster.agent("--masquerade-ports", "20000-20029").start()
    port = rules.PAYMENTS_NODE_PORT
    connections = [LongConnection(cluster.outside, "tcp", cluster.a.address, port) for _ in range(10)]
    cluster.a.call(_load_with_masquerade_ports, "20000-20029")
    agent.stop()
    rollback = cluster.start_migrate("rollback", "--drain", "30s")
    until(lambda: not list(cluster.a.bpf_root.rglob("links/connect4")), "the agent's programs begin flows")
    later = [LongConnection(cluster.outside, "tcp", cluster.a.address, port) for _ in range(20)]
    assert broken([*connections, *later]) == {}
    assert rollback.poll() is None, "the connections of the agent are still open"
    for each in connections:
        each.socket.close()
    assert rollback.wait(60) == 0
    assert broken(later) == {}


def _load_with_masquerade_ports(ports: str) -> None:
    rules.load("iptables-legacy", lab=True)
    chain = ["iptables-legacy", "-t", "nat", "-R", "KUBE-POSTROUTING", "3"]
    subprocess.run([*chain, "-p", "tcp", "-j", "MASQUERADE", "--to-ports", ports, "--random"], check=True)
