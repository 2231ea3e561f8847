"""Explanations of other set-ups of the agent, against what backends of real connections see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import SERVICE_IPS
from tests.explain.test_connect import Json, agrees, explained, masked_as
from tests.lab import Lab, clients
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

POD_CIDRS = "10.244.0.0/16,fd00:10:244::/48"
VARIANTS = {
    "packets": ["--no-pod-sockets", "--without", "tcx"],
    "masquerade-all": ["--no-pod-sockets", "--masquerade-all"],
    "cluster-cidr": ["--no-pod-sockets", "--detect-local-mode", "ClusterCIDR", "--cluster-cidr", POD_CIDRS],
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[tuple[str, Outer]]:
    with Lab() as lab:
        outer = Outer(lab)
        outer.agent(*VARIANTS[request.param]).start()
        yield request.param, outer


def one(outer: Outer, source: str, target: str) -> Json:
    (answer,) = explained(outer, source, target)
    return answer


def sees(outer: Outer, space: Space, answer: Json, own: str) -> None:
    """Asserts that backends see what was explained: the client's ``own`` address, unless it is masqueraded."""
    masquerade = answer["masquerade"]
    is_seen = masquerade["applies"] or masquerade["hairpin"]
    assert masked_as(outer, space, answer) == (set(masquerade["addresses"]) if is_seen else {own}), answer


def test_pods_packets_are_explained(variant: tuple[str, Outer]) -> None:
    name, outer = variant
    pod = outer.client
    for own, target in (
        (pod.address, f"{SERVICE_IPS['v4']}:80"),
        (pod.address6, f"[{SERVICE_IPS['v6']}]:80"),
        (pod.address, f"{outer.a.address}:30080"),
    ):
        answer = one(outer, "shop/client", target)
        assert (answer["hook"], answer["scope"]) == ("tc-ingress", "internal")
        assert answer["steps"] == ["pods' sockets are left to their packets (podSockets is off)"]
        assert answer["masquerade"]["applies"] is (name == "masquerade-all")
        agrees(outer, pod, answer)
        sees(outer, pod, answer, own)
    for service in ("empty", "elsewhere"):
        for answer in explained(outer, "shop/client", f"shop/{service}:http"):
            assert (answer["hook"], answer["works"]) == ("tc-ingress", False)
            agrees(outer, pod, answer)


def test_a_pod_that_is_its_own_backend_is_masqueraded(variant: tuple[str, Outer]) -> None:
    _, outer = variant
    answer = one(outer, "shop/w1", "10.96.0.40:80")
    masquerade = answer["masquerade"]
    assert masquerade["applies"] or masquerade["hairpin"]
    sees(outer, outer.w1, answer, outer.w1.address)


def test_clients_outside_and_the_host_are_explained(variant: tuple[str, Outer]) -> None:
    _, outer = variant
    answer = one(outer, outer.outside.address, f"{outer.a.address}:30080")
    assert answer["masquerade"]["applies"]
    agrees(outer, outer.outside, answer)
    sees(outer, outer.outside, answer, outer.outside.address)
    answer = one(outer, "host", f"{SERVICE_IPS['v4']}:80")
    assert answer["hook"] == "socket"
    agrees(outer, outer.a, answer)


def test_pods_of_other_nodes_are_explained(variant: tuple[str, Outer]) -> None:
    """Their packets come by the uplink: addresses may say that they are pods, the device does not."""
    name, outer = variant
    answer = one(outer, outer.w2.address, f"{outer.a.address}:30080")
    assert (answer["place"], answer["masquerade"]["applies"]) == ("outside", True)
    assert answer["scope"] == ("internal" if name == "cluster-cidr" else "external")
    assert outer.w2.call(clients.connect_error, outer.a.address, 30080) == "connected"
    sees(outer, outer.w2, answer, outer.w2.address)
