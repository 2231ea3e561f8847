"""The Kubernetes e2e suite's specs about Services: first with kube-proxy, then with the agent, in one cluster.

Pods are reached by routes; the nodes have two networks, and InternalIP is on the one without the default route.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import binaries, e2e
from tests.cluster.cluster import Cluster
from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(3600)]

Results = dict[str, Result]


@pytest.fixture(scope="module")
def names() -> list[str]:
    for name in ("e2e.test", "agnhost", "kube-proxy"):
        if not binaries.has(name):
            pytest.skip(f"KUBE_BIN ({binaries.KUBE_BIN}) has no {name}")
    return e2e.specs()


@pytest.fixture(scope="module")
def with_kube_proxy(cluster: Cluster, names: list[str], report: Report) -> Results:
    cluster.install_kube_proxy()
    found = e2e.run(cluster, "kube-proxy", names)
    cluster.remove_kube_proxy()
    report.e2e["kube-proxy (nftables)"] = found
    return found


@pytest.fixture(scope="module")
def with_agent(
    cluster: Cluster, names: list[str], with_kube_proxy: Results, report: Report
) -> Iterator[Results]:
    cluster.install_agent()
    found = e2e.run(cluster, "ebpfproxy", names)
    report.e2e["ebpfproxy"] = found
    yield found
    cluster.uninstall_agent()


def test_kube_proxy_passes_most_specs(with_kube_proxy: Results) -> None:
    """The cluster is good enough to say something: kube-proxy passes nine of ten specs that are not skipped."""
    counted = [result.outcome for result in with_kube_proxy.values() if result.outcome is not Outcome.SKIPPED]
    assert len(counted) > 50
    assert counted.count(Outcome.PASSED) / len(counted) > 0.9


def test_the_agent_passes_what_kube_proxy_passes(with_kube_proxy: Results, with_agent: Results) -> None:
    """Every spec that passes with kube-proxy passes with the agent, with the default configuration."""
    worse = {
        name: with_agent[name].message
        for name, result in with_kube_proxy.items()
        if result.outcome is Outcome.PASSED and with_agent[name].outcome is not Outcome.PASSED
    }
    assert not worse
