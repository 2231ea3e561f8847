"""Explanations of other set-ups of the agent, against what backends of real connections see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import SERVICE_IPS
from tests.explain.test_connect import Json, agrees, ask, explained, masked_as, run
from tests.field.test_xdp import PACKETS, UDP_PORT, World, echo, links
from tests.lab import Lab, clients
from tests.lab.spaces import Space
from tests.lab.waiting import until

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
    assert answer["scope"] == "external"
    says = {"cluster-cidr": "pod of another node", "masquerade-all": "masqueradeAll"}
    assert says.get(name, "traffic from outside") in answer["masquerade"]["why"]
    assert outer.w2.call(clients.connect_error, outer.a.address, 30080) == "connected"
    sees(outer, outer.w2, answer, outer.w2.address)


@pytest.fixture(scope="module")
def forwarding() -> Iterator[World]:
    with Lab(takes_xdp=True) as lab:
        yield World(lab)


def past_netfilter(world: World, address: str) -> Json:
    is_v6 = ":" in address
    client = world.outside.address6 if is_v6 else world.outside.address
    target = f"[{address}]:30053" if is_v6 else f"{address}:30053"
    (answer,) = ask(world, client, target, "--protocol", "UDP")["explanations"]
    agrees(world, world.outside, answer)
    found: Json = answer["masquerade"]["forwarded"]
    return found


def forwards(world: World, address: str) -> int:
    """How many packets of a new flow XDP forwards, with those that come back."""
    before = world.forwarded()
    assert world.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
    return world.forwarded() - before


def test_what_xdp_forwards_is_explained(forwarding: World) -> None:
    """Flows to a backend on another node, while the program is attached; SCTP and this node's pods are tc's."""
    agent = forwarding.agent("--xdp", "native", "--drift-check-seconds", "0").start()
    for address, pod in (
        (forwarding.a.address, forwarding.w2.address),
        (forwarding.a.address6, forwarding.w2.address6),
    ):
        # Once in a while the kernel sends a packet to each of the two next hops.
        assert PACKETS < forwards(forwarding, address) <= 2 * PACKETS - 1
        backend = f"[{pod}]:8053" if ":" in pod else f"{pod}:8053"
        assert past_netfilter(forwarding, address) == {"xdp": [backend]}
    text = run(forwarding, forwarding.outside.address, f"{forwarding.a.address}:30080").output
    assert f"packets to {forwarding.w2.address}:8080, at XDP, but the first of a flow" in text
    forwarding.write_web(forwarding.w1)
    until(lambda: past_netfilter(forwarding, forwarding.a.address) == {})
    assert forwards(forwarding, forwarding.a.address) == 0
    forwarding.write_web(forwarding.w2)
    until(lambda: past_netfilter(forwarding, forwarding.a.address) != {})
    agent.stop()
    for link in links(forwarding):
        link.unlink()
    assert forwards(forwarding, forwarding.a.address) == 0
    assert past_netfilter(forwarding, forwarding.a.address).keys() == {"tc-ingress"}


@pytest.mark.parametrize("options", [[], ["--bypass-netfilter"]], ids=["default", "bypass"])
def test_without_xdp_netfilter_is_passed_where_that_is_set(forwarding: World, options: list[str]) -> None:
    agent = forwarding.agent(*options).start()
    assert forwards(forwarding, forwarding.a.address) == 0
    expected = {"tc-ingress": [f"{forwarding.w2.address}:8053"]} if options else {}
    assert past_netfilter(forwarding, forwarding.a.address) == expected
    agent.stop()
