"""A sample of the networks, in ``make test``: tunnels, marks and policies of a CNI that uses all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cnis import checks
from tests.cnis.calico import Calico
from tests.cnis.cluster import Cluster
from tests.cnis.network import FAMILIES
from tests.lab import Lab

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab(routes_pods=False) as lab:
        yield Cluster(lab, Calico("Calico, VXLAN, nftables", vxlan=True, nftables=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_services_work_where_calico_has_tunnels_and_rules(cluster: Cluster, family: str) -> None:
    """Clients outside, on the node and in pods reach Services where Calico's devices and rules are, in both families."""
    for check in (checks.pods_packets, checks.node_port, checks.local_policy, checks.hairpin_packets):
        check(cluster, family)
