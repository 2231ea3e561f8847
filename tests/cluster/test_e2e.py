"""The Kubernetes e2e suite's specs about Services: first with kube-proxy, then with the agent, in one cluster.

Pods are reached by routes; the nodes have two networks, and InternalIP is on the one without the default route. Some
specs want three nodes in three zones, so a third one is there for as long as they run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import e2e
from tests.cluster.cluster import Cluster
from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(3600)]

Results = dict[str, Result]


@pytest.fixture(scope="module")
def names() -> list[str]:
    if lacking := e2e.missing():
        pytest.skip(lacking)
    return e2e.specs()


@pytest.fixture(scope="module")
def three(cluster: Cluster, names: list[str]) -> Iterator[Cluster]:
    with cluster.one_more_node():
        yield cluster


@pytest.fixture(scope="module")
def with_kube_proxy(three: Cluster, names: list[str], report: Report) -> Results:
    three.install_kube_proxy()
    found = e2e.run(three, "kube-proxy", names)
    three.remove_kube_proxy()
    report.e2e["kube-proxy (nftables)"] = found
    return found


@pytest.fixture(scope="module")
def with_agent(
    three: Cluster, names: list[str], with_kube_proxy: Results, report: Report
) -> Iterator[Results]:
    three.install_agent()
    found = e2e.run(three, "ebpfproxy", names)
    report.e2e["ebpfproxy"] = found
    yield found
    three.uninstall_agent()


def test_kube_proxy_passes_most_specs(with_kube_proxy: Results) -> None:
    """The cluster is good enough to say something: kube-proxy passes nine of ten specs that are not skipped."""
    counted = [result.outcome for result in with_kube_proxy.values() if result.outcome is not Outcome.SKIPPED]
    assert len(counted) > 50
    assert sum(outcome.good for outcome in counted) / len(counted) > 0.9
    assert Outcome.NOT_REACHED not in counted


def test_the_agent_passes_what_kube_proxy_passes(with_kube_proxy: Results, with_agent: Results) -> None:
    """Every spec that passes with kube-proxy passes with the agent, with the default configuration."""
    worse = {
        name: with_agent[name].message
        for name, result in with_kube_proxy.items()
        if result.outcome.good and not with_agent[name].outcome.good
    }
    assert not worse
