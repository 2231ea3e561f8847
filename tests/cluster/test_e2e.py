"""The Kubernetes e2e suite's specs about Services, in a cluster of each first family.

The suite asks Services by the first family, so the second cluster makes specs of IPv6 of those that are not about dual
stack. Pods are reached by routes; the nodes have two networks, and InternalIP is on the one without the default route.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cluster import e2e
from tests.cluster.cluster import Cluster
from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(3600)]

Results = dict[str, Result]

#: Specs for clusters with IPv6 first. Specs that are the API server's alone show nothing else there, and "Granular Checks" are asked by IPv6
#: with IPv4 first, as those of the secondary family.
_FOCUS_6 = re.compile(r"\[sig-network\] (Conntrack|HostPort|KubeProxy|Services|Topology)")
_SKIP_6 = re.compile(
    e2e.SKIP.pattern + r"|lifecycle|ExternalName|\bcollection\b|CRUD|NodePorts? on delete|secure master"
)


class Case(NamedTuple):
    """``nodes``: their number; some specs need three, in three zones.

    ``least``: the number of specs that have to pass.
    """

    primary: int
    nodes: int
    focus: re.Pattern[str]
    skip: re.Pattern[str]
    least: int


_CASES = {
    "IPv4 first": Case(4, 3, e2e.FOCUS, e2e.SKIP, 110),
    "IPv6 first": Case(6, 2, _FOCUS_6, _SKIP_6, 40),
}


class Found(NamedTuple):
    cluster: Cluster
    case: Case
    agent: Results
    #: Those specs alone that do not pass with the agent.
    kube_proxy: Results


@pytest.fixture(scope="module", params=_CASES)
def found(request: pytest.FixtureRequest, folder: Path, report: Report) -> Iterator[Found]:
    if lacking := e2e.missing():
        pytest.skip(lacking)
    case = _CASES[request.param]
    with Cluster(folder / f"e2e-{case.primary}", primary=case.primary, count=case.nodes) as cluster:
        cluster.up()
        cluster.install_agent()
        agent = e2e.run(cluster, "ebpfproxy", e2e.specs(case.focus, case.skip))
        report.e2e[f"ebpfproxy, {request.param}"] = agent
        kube_proxy: Results = {}
        if names := [name for name, result in agent.items() if result.outcome in e2e.UNPROVEN]:
            cluster.uninstall_agent()
            cluster.install_kube_proxy()
            kube_proxy = e2e.run(cluster, "kube-proxy", names)
            report.e2e[f"kube-proxy, {request.param}"] = kube_proxy
        yield Found(cluster, case, agent, kube_proxy)


def test_nodes_and_services_have_the_family_as_first(found: Found) -> None:
    """Nodes, pods, the API server's Service and the DNS have addresses of the family that the cluster has first."""
    colon = found.case.primary == 6
    for node in found.cluster.get("nodes")["items"]:
        assert (":" in node["spec"]["podCIDR"]) is colon
        assert (":" in node["status"]["addresses"][0]["address"]) is colon
    for namespace, name in (("default", "kubernetes"), ("kube-system", "kube-dns")):
        spec = found.cluster.get("-n", namespace, "service", name)["spec"]
        assert (":" in spec["clusterIP"]) is colon


def test_all_specs_ran_and_nearly_all_pass(found: Found) -> None:
    """Every spec that was chosen ran or says why it does not, and nearly all pass with the agent."""
    outcomes = [result.outcome for result in found.agent.values()]
    assert Outcome.NOT_REACHED not in outcomes
    assert sum(outcome.good for outcome in outcomes) >= found.case.least


def test_specs_that_pass_with_kube_proxy_pass_with_the_agent(found: Found) -> None:
    """No spec that does not pass with the agent, in its default configuration, passes with kube-proxy (nftables)."""
    worse = {
        name: found.agent[name].message
        for name, result in found.kube_proxy.items()
        if result.outcome.good and not found.agent[name].outcome.good
    }
    assert not worse
