"""A migration and a rollback of a dual-stack cluster break no connection, as in test_handover.py for IPv4."""

from __future__ import annotations

import difflib
import json
import re
import time
from collections.abc import Iterator

import pytest

from ebpfproxy.operator.migrate.node import kube_proxy_frontends
from tests.lab import Lab, clients
from tests.operator.migrate import rules, rules_ipv6
from tests.operator.migrate.kube_proxy_cluster import CONNTRACK_HOLD, KubeProxyCluster, broken
from tests.operator.migrate.traffic import LongConnection, no_request_fails

ORDERS, DNS = rules_ipv6.address(rules.ORDERS), rules_ipv6.address(rules.DNS)


def _nft_base_rules(listed: str) -> list[str]:
    """Returns the lines of a table without elements and without chains and sets of Services."""
    listed = re.sub(r"\n\t(?:chain|set) \S*/\S* \{.*?\n\t\}\n", "\n", listed, flags=re.DOTALL)
    listed = re.sub(r"\n\t\telements = \{.*?\}\n", "\n", listed, flags=re.DOTALL)
    return [line for line in listed.splitlines() if line.strip()]


def _iptables_base_rules(saved: str) -> list[str]:
    service_rules = re.compile(
        r"KUBE-(SVC|SVL|SEP|EXT|FW)-|^#|has no endpoints|health check node port|^:|KUBE-FIREWALL"
    )
    return [line for line in saved.splitlines() if not service_rules.search(line)]


def test_generated_ipv6_rules_have_the_base_rules_of_a_real_kube_proxy() -> None:
    listed = rules.text("nft-list-ruleset.txt")
    real = listed[listed.index("table ip6 kube-proxy") :]
    generated = rules_ipv6.of_nft(listed)
    assert list(difflib.unified_diff(_nft_base_rules(real), _nft_base_rules(generated))) == []
    real = rules.text("ip6tables-legacy-save.txt")
    generated = rules_ipv6.of_iptables(rules.text("iptables-legacy-save.txt"))
    assert list(difflib.unified_diff(_iptables_base_rules(real), _iptables_base_rules(generated))) == []
    assert len(kube_proxy_frontends.of_iptables(generated)) == 19


@pytest.fixture
def cluster() -> Iterator[KubeProxyCluster]:
    with Lab() as lab:
        yield KubeProxyCluster(lab, dual_stack=True)


@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", rules.MODES)
def test_migration_and_rollback_under_load_keep_long_connections(
    cluster: KubeProxyCluster, mode: str
) -> None:
    cluster.kube_proxy(mode)
    connections = cluster.connections()
    assert broken(connections) == {}
    assert {each.server for each in connections if ":" in each.host} == {"w1", "w2"}

    with no_request_fails(*cluster.loads()):
        agent = cluster.agent().start()
        time.sleep(0.3)
        assert broken(connections) == {}, "kube-proxy and the agent run side by side"
        planned = json.loads(cluster.migrate("plan", "-o", "json"))
        assert (planned["blockers"], planned["differences"]) == ([], {})
        # A NodePort is one frontend in each family.
        assert planned["kube_proxy_frontends"] == planned["agent_frontends"] == 40
        assert planned["flows"] >= len(connections)
        output = cluster.migrate("run")
        time.sleep(0.3)
        assert broken(connections) == {}, output
    assert cluster.leftovers_on(cluster.a) == (False, CONNTRACK_HOLD)

    agent.stop()
    agent.start()
    assert broken(connections) == {}, "after a restart"

    agent_connections = [
        LongConnection(space, kind, to, port)
        for space in (cluster.client, cluster.a)
        for kind, to, port in (("tcp", ORDERS, 80), ("udp", DNS, 53))
    ]
    agent.stop()
    cluster.kube_proxy(mode)
    with no_request_fails(*[each for each in cluster.loads() if each.space is cluster.client]):
        output = cluster.migrate("rollback")
        time.sleep(0.3)
        assert broken([*connections, *agent_connections]) == {}, output
    assert cluster.leftovers_on(cluster.a) == (True, [])
    for space, to, port in (
        (cluster.client, ORDERS, 80),
        (cluster.a, ORDERS, 80),
        (cluster.outside, cluster.a.address6, rules.PAYMENTS_NODE_PORT),
    ):
        assert space.call(clients.spread_tcp, to, port, 3)


@pytest.mark.root
def test_rollback_with_drain_fails_no_request_of_external_clients(cluster: KubeProxyCluster) -> None:
    agent = cluster.agent().start()
    cluster.kube_proxy("nftables")
    agent.stop()
    cluster.drain_fails_no_request(cluster.a.address6)
