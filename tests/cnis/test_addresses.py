"""Addresses of a node that are renewed and replaced, as by a DHCP client, while connections come and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cnis.cluster import Cluster
from tests.cnis.flannel import Flannel
from tests.cnis.network import FAMILIES, Network, ip
from tests.e2e import connection_load
from tests.lab import Lab, clients
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.cnis]

NETWORKS: list[Network] = [
    Network("pods by routes"),
    Flannel("flannel, VXLAN, iptables", vxlan=True, nftables=False),
]


@pytest.fixture(scope="module", params=NETWORKS, ids=[each.title for each in NETWORKS])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        yield Cluster(lab, request.param)


def _length(family: str) -> int:
    return 24 if family == "IPv4" else 64


def _renew(cluster: Cluster, address: str, length: int, seconds: int) -> None:
    ip(cluster.a, f"address replace {address}/{length} dev eth0 valid_lft {seconds} preferred_lft {seconds}")


@pytest.mark.parametrize("family", FAMILIES)
def test_renewed_leases_disturb_no_connection(cluster: Cluster, family: str) -> None:
    """Each renewal of the node's address is an event of netlink, and no connection notices one."""
    address, port = cluster.address(cluster.a, family), cluster.node_port("web")
    with (
        connection_load.running(cluster.outside, address, port) as outside,
        connection_load.running(cluster.client, cluster.cluster_ip("web", family), 80) as inside,
    ):
        for number in range(100):
            _renew(cluster, address, _length(family), 3600 + number)
    for load in (outside, inside):
        assert load.result["errors"] == []
        assert load.result["count"] > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_address_is_served_and_the_old_one_no_more(cluster: Cluster, family: str) -> None:
    """Where a lease brings another address, NodePorts move there; clients of addresses that stay notice nothing."""
    old, new = ("172.18.0.61", "172.18.0.62") if family == "IPv4" else ("fd00:172:18::61", "fd00:172:18::62")
    nodad = "nodad" if family == "IPv6" else ""
    port = cluster.node_port("web")

    def found(address: str) -> str:
        return cluster.outside.call(clients.connect_error, address, port, 0.3)

    stays = cluster.address(cluster.a, family)
    with connection_load.running(cluster.outside, stays, port) as load:
        for first, second in ((old, new), (new, old)) * 3:
            ip(cluster.a, f"address add {first}/{_length(family)} dev eth0 {nodad}")
            until(lambda first=first: found(first) == "connected", f"no NodePort at {first}")  # type: ignore[misc]
            ip(cluster.a, f"address del {first}/{_length(family)} dev eth0")
            ip(cluster.a, f"address add {second}/{_length(family)} dev eth0 {nodad}")
            until(lambda second=second: found(second) == "connected", f"no NodePort at {second}")  # type: ignore[misc]
            assert found(first) != "connected"
            ip(cluster.a, f"address del {second}/{_length(family)} dev eth0")
    assert load.result["errors"] == []
