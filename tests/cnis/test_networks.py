"""Each network with each check in both families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cnis import calico, cilium, flannel, nodes, plugins
from tests.cnis.checks import CHECKS
from tests.cnis.cluster import Cluster
from tests.cnis.network import FAMILIES, Network
from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.cnis]

NETWORKS: list[Network] = [
    each for module in (plugins, flannel, calico, cilium, nodes) for each in module.NETWORKS
]


@pytest.fixture(scope="module", params=NETWORKS, ids=[f"{each.title};" for each in NETWORKS])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        yield Cluster(lab, request.param)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_network(cluster: Cluster, check: str, family: str, record_property: Any) -> None:
    """Everything that a Service promises holds in every network, in both families."""
    record_property("cell", (cluster.network.title, check, family))
    if family not in cluster.network.families:
        pytest.skip(f"no {family} there")
    if check in cluster.network.lacks:
        pytest.skip(cluster.network.lacks[check])
    if check == "hostPort" and not cluster.network.host_port:
        pytest.skip("no portmap there")
    CHECKS[check](cluster, family)
