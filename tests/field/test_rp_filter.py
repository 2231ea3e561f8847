"""Reverse path filtering (rp_filter) of the kernel, strict and loose, drops no replies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outer import Outer, ask_by_socat
from tests.e2e.world import SERVICE_IPS
from tests.lab import Lab, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

BALANCER = "203.0.113.60"


@pytest.fixture(scope="module", params=["1", "2"], ids=["strict", "loose"])
def outer(request: pytest.FixtureRequest) -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.a.run(
            ["sh", "-c", f"for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo {request.param} >$f; done"]
        )
        made.agent().start()
        yield made


def test_host_client_without_a_hook_reaches_every_backend(outer: Outer) -> None:
    """The client is in the kernel or outside the agent's cgroup; one backend is local."""
    for address in (f"{SERVICE_IPS['v4']}:80", f"[{SERVICE_IPS['v6']}]:80"):
        found = [ask_by_socat(outer.a, address).get("name") for _ in range(24)]
        assert set(found) == {"w1", "w2"}


def test_host_client_reaches_a_load_balancer_with_source_ranges(outer: Outer) -> None:
    """Source ranges are applied in packets; replies of a local backend are not dropped."""
    ranges = {"loadBalancerSourceRanges": [f"{outer.a.address}/32"]}
    outer.balanced("ranged", "10.96.1.60", BALANCER, [outer.on_a()], **ranges)
    until(lambda: "ranged" in outer.a.cli("service", "list"), "the Service is not programmed")
    assert [ask_by_socat(outer.a, f"{BALANCER}:80").get("name") for _ in range(6)] == ["w1"] * 6


def test_pod_without_a_hook_reaches_a_local_pod_and_itself(outer: Outer) -> None:
    """Packets of pods are forwarded, masqueraded or not."""
    outer.add("mirror", "10.96.1.61", [manifests.endpoint(outer.w1.address, "node-a")])
    until(lambda: "mirror" in outer.a.cli("service", "list"), "the Service is not programmed")
    for pod in (outer.client, outer.w1):
        assert [ask_by_socat(pod, "10.96.1.61:80").get("name") for _ in range(4)] == ["w1"] * 4
