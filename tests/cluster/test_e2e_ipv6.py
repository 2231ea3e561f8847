"""The e2e suite in a cluster whose first family is IPv6: of nodes, pods, Services that do not ask for one, and the DNS.

The suite asks Services by the first family, so here every spec is one of IPv6, not those about dual stack alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import e2e
from tests.cluster.cluster import Cluster
from tests.cluster.e2e import Outcome, Result
from tests.cluster.report import Report

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(3600)]

Results = dict[str, Result]

#: Specs that are the API server's alone show nothing else here, and "Granular Checks" are asked by IPv6 in
#: tests/cluster/test_e2e.py, as those of the secondary family.
_FOCUS = re.compile(r"\[sig-network\] (Conntrack|HostPort|KubeProxy|Services|Topology)")
_SKIP = re.compile(
    e2e.SKIP.pattern + r"|lifecycle|ExternalName|\bcollection\b|CRUD|NodePorts? on delete|secure master"
)


@pytest.fixture(scope="module")
def six(folder: Path) -> Iterator[Cluster]:
    if lacking := e2e.missing():
        pytest.skip(lacking)
    with Cluster(folder / "six", primary=6) as made:
        yield made.up()


@pytest.fixture(scope="module")
def with_agent(six: Cluster, report: Report) -> Results:
    six.install_agent()
    found = e2e.run(six, "ebpfproxy", e2e.specs(_FOCUS, _SKIP))
    report.e2e["ebpfproxy, IPv6 first"] = found
    return found


@pytest.fixture(scope="module")
def with_kube_proxy(six: Cluster, with_agent: Results) -> Results:
    """Those specs alone that the agent does not pass."""
    names = [name for name, result in with_agent.items() if result.outcome is Outcome.FAILED]
    if not names:
        return {}
    six.uninstall_agent()
    six.install_kube_proxy()
    return e2e.run(six, "kube-proxy", names)


def test_services_are_of_ipv6(six: Cluster, with_agent: Results) -> None:
    """Nodes, the API server's Service and the DNS have IPv6 addresses first."""
    assert all(":" in node["spec"]["podCIDR"] for node in six.get("nodes")["items"])
    for namespace, name in (("default", "kubernetes"), ("kube-system", "kube-dns")):
        assert ":" in six.get("-n", namespace, "service", name)["spec"]["clusterIP"]
    outcomes = [result.outcome for result in with_agent.values()]
    assert sum(outcome.good for outcome in outcomes) > 30
    assert Outcome.NOT_REACHED not in outcomes


def test_what_the_agent_does_not_pass_kube_proxy_does_not_pass_either(with_kube_proxy: Results) -> None:
    """Where IPv6 comes first, no spec fails with the agent that kube-proxy passes."""
    assert not [name for name, result in with_kube_proxy.items() if result.outcome.good]
