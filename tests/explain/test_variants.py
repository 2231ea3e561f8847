"""Explanations of other set-ups of the agent, against what backends of real connections see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.explain.test_connect import Json, agrees, ask, explained, masked_as, run
from tests.field.test_xdp_forwarding import PACKETS, UDP_PORT, XdpCluster, echo, links
from tests.lab import Lab, Pod, clients
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
def variant(request: pytest.FixtureRequest) -> Iterator[tuple[str, OutsideClientCluster]]:
    with Lab() as lab:
        cluster = OutsideClientCluster(lab)
        cluster.agent(*VARIANTS[request.param]).start()
        # Addresses of IPv6 may still be tentative.
        until(lambda: cluster.client.call(clients.connect_error, SERVICE_IPS["v6"], 80) == "connected")
        yield request.param, cluster


def one(cluster: OutsideClientCluster, source: str, target: str) -> Json:
    (answer,) = explained(cluster, source, target)
    return answer


def sees(cluster: OutsideClientCluster, space: Space, answer: Json, own: str) -> None:
    """Asserts that backends see what was explained: the client's ``own`` address, unless it is masqueraded."""
    masquerade = answer["masquerade"]
    is_seen = masquerade["applies"] or masquerade["hairpin"]
    assert masked_as(cluster, space, answer) == (set(masquerade["addresses"]) if is_seen else {own}), answer


def test_pods_packets_are_explained(variant: tuple[str, OutsideClientCluster]) -> None:
    name, cluster = variant
    pod = cluster.client
    for own, target in (
        (pod.address, f"{SERVICE_IPS['v4']}:80"),
        (pod.address6, f"[{SERVICE_IPS['v6']}]:80"),
        (pod.address, f"{cluster.a.address}:30080"),
    ):
        answer = one(cluster, "shop/client", target)
        assert (answer["hook"], answer["scope"]) == ("tc-ingress", "internal")
        assert answer["steps"] == ["pods' sockets are left to their packets (podSockets is off)"]
        assert answer["masquerade"]["applies"] is (name == "masquerade-all")
        agrees(cluster, pod, answer)
        sees(cluster, pod, answer, own)
    for service in ("empty", "elsewhere"):
        for answer in explained(cluster, "shop/client", f"shop/{service}:http"):
            assert (answer["hook"], answer["works"]) == ("tc-ingress", False)
            agrees(cluster, pod, answer)


def test_a_pod_that_is_its_own_backend_is_masqueraded(variant: tuple[str, OutsideClientCluster]) -> None:
    _, cluster = variant
    answer = one(cluster, "shop/w1", "10.96.0.40:80")
    masquerade = answer["masquerade"]
    assert masquerade["applies"] or masquerade["hairpin"]
    sees(cluster, cluster.w1, answer, cluster.w1.address)


def test_clients_outside_and_the_host_are_explained(variant: tuple[str, OutsideClientCluster]) -> None:
    _, cluster = variant
    answer = one(cluster, cluster.outside.address, f"{cluster.a.address}:30080")
    assert answer["masquerade"]["applies"]
    agrees(cluster, cluster.outside, answer)
    sees(cluster, cluster.outside, answer, cluster.outside.address)
    answer = one(cluster, "host", f"{SERVICE_IPS['v4']}:80")
    assert answer["hook"] == "socket"
    agrees(cluster, cluster.a, answer)


def test_policy_local_keeps_the_address_of_clients_outside(
    variant: tuple[str, OutsideClientCluster],
) -> None:
    _, cluster = variant
    cluster.add_load_balancer(
        "kept", "10.96.0.70", "203.0.113.70", [cluster.endpoint_on_a()], externalTrafficPolicy="Local"
    )
    until(lambda: cluster.outside.call(clients.connect_error, "203.0.113.70", 80, 0.3) == "connected")
    for space in (cluster.outside, cluster.client):
        answer = one(cluster, space.address, "203.0.113.70:80")
        assert not answer["masquerade"]["applies"]
        agrees(cluster, space, answer)
        sees(cluster, space, answer, space.address)


def test_pods_of_other_nodes_are_explained(variant: tuple[str, OutsideClientCluster]) -> None:
    """Their packets come by the uplink: addresses may say that they are pods, the device does not."""
    name, cluster = variant
    answer = one(cluster, cluster.w2.address, f"{cluster.a.address}:30080")
    assert (answer["place"], answer["masquerade"]["applies"]) == ("outside", True)
    assert answer["scope"] == "external"
    says = {"cluster-cidr": "pod of another node", "masquerade-all": "masqueradeAll"}
    assert says.get(name, "traffic from outside") in answer["masquerade"]["why"]
    assert cluster.w2.call(clients.connect_error, cluster.a.address, 30080) == "connected"
    sees(cluster, cluster.w2, answer, cluster.w2.address)


@pytest.fixture(scope="module")
def forwarding() -> Iterator[XdpCluster]:
    with Lab(takes_xdp=True) as lab:
        yield XdpCluster(lab)


def from_outside(cluster: XdpCluster, address: str) -> Json:
    is_v6 = ":" in address
    client = cluster.outside.address6 if is_v6 else cluster.outside.address
    target = f"[{address}]:30053" if is_v6 else f"{address}:30053"
    (answer,) = ask(cluster, client, target, "--protocol", "UDP")["explanations"]
    return answer  # type: ignore[no-any-return]


def past_netfilter(cluster: XdpCluster, address: str) -> Json:
    answer = from_outside(cluster, address)
    agrees(cluster, cluster.outside, answer)
    found: Json = answer["masquerade"]["forwarded"]
    return found


def goes_to(cluster: XdpCluster, pod: Pod) -> bool:
    """Says if the pod is the only one that explain names for a client outside."""
    endpoints = from_outside(cluster, cluster.a.address)["endpoints"]
    return [each["address"] for each in endpoints if each["used"]] == [f"{pod.address}:8053"]


def forwards(cluster: XdpCluster, address: str) -> int:
    """How many packets of a new flow XDP forwards, with those that come back."""
    before = cluster.forwarded()
    assert cluster.outside.call(echo, address, UDP_PORT, PACKETS) == PACKETS
    return cluster.forwarded() - before


def test_what_xdp_forwards_is_explained(forwarding: XdpCluster) -> None:
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
    until(lambda: goes_to(forwarding, forwarding.w1))
    assert past_netfilter(forwarding, forwarding.a.address) == {}
    assert forwards(forwarding, forwarding.a.address) == 0
    forwarding.write_web(forwarding.w2)
    until(lambda: goes_to(forwarding, forwarding.w2))
    assert past_netfilter(forwarding, forwarding.a.address) != {}
    agent.stop()
    for link in links(forwarding):
        link.unlink()
    assert forwards(forwarding, forwarding.a.address) == 0
    assert past_netfilter(forwarding, forwarding.a.address).keys() == {"tc-ingress"}


@pytest.mark.parametrize("options", [[], ["--bypass-netfilter"]], ids=["default", "bypass"])
def test_without_xdp_netfilter_is_passed_where_that_is_set(
    forwarding: XdpCluster, options: list[str]
) -> None:
    agent = forwarding.agent(*options).start()
    assert forwards(forwarding, forwarding.a.address) == 0
    expected = {"tc-ingress": [f"{forwarding.w2.address}:8053"]} if options else {}
    assert past_netfilter(forwarding, forwarding.a.address) == expected
    agent.stop()
