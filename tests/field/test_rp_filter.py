"""Reverse path filtering (rp_filter) of the kernel, strict and loose, drops no replies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster, ask_by_socat
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Lab, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

BALANCER = "203.0.113.60"


@pytest.fixture(scope="module", params=["1", "2"], ids=["strict", "loose"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.a.run(
            ["sh", "-c", f"for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {request.param} >$f; done"]
        )
        made.agent().start()
        yield made


def test_host_client_without_a_hook_reaches_every_backend(cluster: OutsideClientCluster) -> None:
    """The client is in the kernel or outside the agent's cgroup; one backend is local."""
    for address in (f"{SERVICE_IPS['v4']}:80", f"[{SERVICE_IPS['v6']}]:80"):
        found = [ask_by_socat(cluster.a, address).get("name") for _ in range(24)]
        assert set(found) == {"w1", "w2"}


def test_host_client_reaches_a_load_balancer_with_source_ranges(cluster: OutsideClientCluster) -> None:
    """Source ranges are applied in packets; replies of a local backend are not dropped."""
    ranges = {"loadBalancerSourceRanges": [f"{cluster.a.address}/32"]}
    cluster.add_load_balancer("ranged", "10.96.1.60", BALANCER, [cluster.endpoint_on_a()], **ranges)
    until(lambda: "ranged" in cluster.a.cli("service", "list"), "the Service is not programmed")
    assert [ask_by_socat(cluster.a, f"{BALANCER}:80").get("name") for _ in range(6)] == ["w1"] * 6


def test_pod_without_a_hook_reaches_a_local_pod_and_itself(cluster: OutsideClientCluster) -> None:
    """Packets of pods are forwarded, masqueraded or not."""
    cluster.add("mirror", "10.96.1.61", [manifests.endpoint(cluster.w1.address, "node-a")])
    until(lambda: "mirror" in cluster.a.cli("service", "list"), "the Service is not programmed")
    for pod in (cluster.client, cluster.w1):
        assert [ask_by_socat(pod, "10.96.1.61:80").get("name") for _ in range(4)] == ["w1"] * 4
