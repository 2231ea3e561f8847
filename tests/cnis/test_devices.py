"""Nodes and pods on kinds of devices that not every kernel has; ``make test-kernels`` runs them where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cnis import kinds, tunnels, uplinks
from tests.cnis.checks import CHECKS, Check
from tests.cnis.cluster import Cluster, unhooked
from tests.cnis.network import FAMILIES
from tests.cnis.test_mtu import datagrams
from tests.cnis.uplinks import Devices
from tests.lab import Lab, clients

pytestmark = [pytest.mark.root, pytest.mark.cnis]

NETWORKS: list[Devices] = [*uplinks.NETWORKS, *tunnels.NETWORKS]


#: Around the sizes that fit into tunnels of 1400 and 1420 bytes and into 1500, and beyond.
_SIZES = (1352, 1373, 1393, 1473, 1900)
_BULK = 200_000


def large(cluster: Cluster, family: str) -> None:
    """Bulk data and datagrams of all sizes pass both ways between clients and the endpoint on the other node."""
    service, node = cluster.cluster_ip("far", family), cluster.address(cluster.a, family)
    inside = [cluster.client, cluster.a, unhooked(cluster.a)]
    if "ClusterIP, in packets" not in cluster.network.lacks:
        inside.append(unhooked(cluster.client))
    ports = cluster.node_port("far"), cluster.node_port("far", "UDP")
    for space, address, tcp, udp in [
        (cluster.outside, node, *ports),
        *((each, service, 80, 53) for each in inside),
    ]:
        assert space.call(clients.is_echoed, address, tcp, _BULK), space
        assert space.call(datagrams, address, udp, _SIZES)[0] == [*_SIZES], space


_CHECKS: dict[str, Check] = {
    **{name: check for name, check in CHECKS.items() if name != "hostPort"},
    "MTU": large,
}


@pytest.fixture(scope="module", params=NETWORKS, ids=[f"{each.title};" for each in NETWORKS])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        if lacks := kinds.lacking(lab.switch, request.param.needs):
            pytest.skip(f"this kernel has no devices of the kind {lacks}")
        yield Cluster(lab, request.param)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", _CHECKS)
def test_devices(cluster: Cluster, check: str, family: str) -> None:
    """Everything that a Service promises holds on these devices, in both families."""
    if check in cluster.network.lacks:
        pytest.skip(cluster.network.lacks[check])
    _CHECKS[check](cluster, family)
