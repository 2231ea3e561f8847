"""The Kubernetes e2e suite's specs about Services, in a cluster of each first family.

The suite asks Services by the first family, so the second cluster makes specs of IPv6 of those that are not about dual
stack. Pods are reached by routes; the nodes have two networks, and InternalIP is on the one without the default route.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ebpfproxy.operator import names
from tests.cluster import e2e
from tests.cluster.cluster import Cluster
from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(3600)]

Results = dict[str, Result]

#: Specs that have to pass with either family, of the 127 that are chosen; others may skip themselves.
_LEAST = 115
_PRIMARIES = {"IPv4 first": 4, "IPv6 first": 6}


class Found(NamedTuple):
    """``primary``: 4 or 6."""

    cluster: Cluster
    primary: int
    agent: Results
    #: Those specs alone that do not pass with the agent.
    kube_proxy: Results


@pytest.fixture(scope="module", params=_PRIMARIES)
def found(request: pytest.FixtureRequest, folder: Path, report: Report) -> Iterator[Found]:
    if lacking := e2e.missing():
        pytest.skip(lacking)
    primary = _PRIMARIES[request.param]
    # Some specs need three nodes, in three zones.
    with Cluster(folder / f"e2e-{primary}", primary=primary, count=3) as cluster:
        cluster.up()
        cluster.install_agent()
        agent = e2e.run(cluster, "ebpfproxy", e2e.specs())
        with _label_of_kube_proxy(cluster):
            agent |= e2e.run(cluster, "ebpfproxy-restart", e2e.specs(e2e.RESTART))
        report.e2e[f"ebpfproxy, {request.param}"] = agent
        kube_proxy: Results = {}
        if unproven := [name for name, result in agent.items() if result.outcome in e2e.UNPROVEN]:
            cluster.uninstall_agent()
            cluster.install_kube_proxy()
            kube_proxy = e2e.run(cluster, "kube-proxy", unproven)
            report.e2e[f"kube-proxy, {request.param}"] = kube_proxy
        yield Found(cluster, primary, agent, kube_proxy)


@contextmanager
def _label_of_kube_proxy(cluster: Cluster) -> Iterator[None]:
    """Gives the agents' pods the label by which a spec finds the pods of kube-proxy, to delete them."""
    original = cluster.get("-n", "kube-system", "daemonset", names.AGENT)
    changed = copy.deepcopy(original)
    for labels in (
        changed["spec"]["selector"]["matchLabels"],
        changed["spec"]["template"]["metadata"]["labels"],
    ):
        labels[names.APP] = "kube-proxy"
    _replace(cluster, changed)
    yield
    _replace(cluster, original)


def _replace(cluster: Cluster, daemon_set: dict[str, Any]) -> None:
    """Replaces the DaemonSet by another whose selector differs, which an update may not change."""
    given = {**daemon_set, "status": {}}
    given["metadata"] = {key: daemon_set["metadata"][key] for key in ("name", "namespace", "labels")}
    cluster.kubectl("replace", "--force", "--timeout=120s", "-f", "-", stdin=json.dumps(given))
    cluster.kubectl("-n", "kube-system", "rollout", "status", f"daemonset/{names.AGENT}", "--timeout=240s")


def test_nodes_and_services_have_the_family_as_first(found: Found) -> None:
    """Nodes, pods, the API server's Service and the DNS have addresses of the family that the cluster has first."""
    colon = found.primary == 6
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
    assert sum(outcome.good for outcome in outcomes) >= _LEAST


def test_specs_that_pass_with_kube_proxy_pass_with_the_agent(found: Found) -> None:
    """No spec that does not pass with the agent, in its default configuration, passes with kube-proxy (nftables)."""
    worse = {
        name: found.agent[name].message
        for name, result in found.kube_proxy.items()
        if result.outcome.good and not found.agent[name].outcome.good
    }
    assert not worse
