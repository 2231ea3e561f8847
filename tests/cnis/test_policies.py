"""NetworkPolicy by rules at the pods' own nodes holds for translated traffic: what they accept, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cnis.calico import Calico, Policy
from tests.cnis.cluster import Cluster, unhooked
from tests.cnis.filtered import Filtered
from tests.cnis.network import FAMILIES, Network, ip
from tests.lab import Lab, clients
from tests.lab.lab import OUTSIDE, OUTSIDE6
from tests.lab.spaces import Space

pytestmark = [pytest.mark.root, pytest.mark.cnis]

CLIENT, CLIENT6 = "10.244.1.2", "fd00:10:244:1::2"
W1, W1_6 = "10.244.1.3", "fd00:10:244:1::3"
W2, W2_6 = "10.244.2.2", "fd00:10:244:2::2"
#: w1 may be reached by the client alone, and w2 by the pods of node-a; the client may reach these two, and "picky" only w1.
BY_PODS = (
    Policy("client", egress=(W1, W1_6, W2, W2_6)),
    Policy("w1", ingress=(CLIENT, CLIENT6), egress=("10.244.0.0/16", "fd00:10:244::/48")),
    Policy("w2", ingress=("10.244.1.0/24", "fd00:10:244:1::/64")),
    Policy("picky", egress=(W1, W1_6)),
)
#: w1 may be reached by one host outside alone.
BY_HOST = (Policy("w1", ingress=(OUTSIDE, OUTSIDE6)),)


def _engines(policies: tuple[Policy, ...]) -> list[Network]:
    return [
        Calico("Calico, VXLAN, iptables", vxlan=True, nftables=False, policies=policies),
        Calico("Calico, BGP, nftables", vxlan=False, nftables=True, policies=policies),
        Filtered("chains by address, nftables", policies),
    ]


class PolicyCluster(Cluster):
    """``picky`` is a pod of node-a and ``stranger`` one of node-b."""

    more_pods = (("a", "picky"), ("b", "stranger"))


@pytest.fixture(scope="module", params=_engines(BY_PODS), ids=lambda each: each.title)
def pods(request: pytest.FixtureRequest) -> Iterator[PolicyCluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        yield PolicyCluster(lab, request.param)


@pytest.fixture(scope="module", params=_engines(BY_HOST), ids=lambda each: each.title)
def host(request: pytest.FixtureRequest) -> Iterator[PolicyCluster]:
    with Lab(routes_pods=request.param.routes_pods) as lab:
        yield PolicyCluster(lab, request.param)


_SECONDS = 0.6


def _passes(space: Space, address: str, tcp: int, udp: int) -> bool:
    """Whether connections and datagrams get replies; asserts that both agree."""
    found = {space.call(clients.connect_error, address, tcp, _SECONDS), space.call(_udp_error, address, udp)}
    assert found in ({"connected"}, {"TimeoutError"})
    return found == {"connected"}


def _udp_error(address: str, port: int) -> str:
    try:
        clients.ask_udp(address, port, timeout=_SECONDS)
    except OSError as error:
        return type(error).__name__
    return "connected"


def _reaches(cluster: Cluster, space: Space, service: str, family: str) -> bool:
    """Whether a pod reaches a Service; asserts that its endpoint's own address is as (un)reachable."""
    through = _passes(space, cluster.cluster_ip(service, family), 80, 53)
    pod = {"self": cluster.w1, "far": cluster.w2}[service]
    assert through == _passes(space, cluster.address(pod, family), 8080, 8053)
    return through


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hooked", [True, False], ids=["sockets", "packets"])
def test_policies_of_pods_accept_and_refuse_through_services(
    pods: PolicyCluster, family: str, hooked: bool
) -> None:
    """A pod reaches a Service's endpoint if, and only if, policies let it reach the pod: its egress rules see the
    endpoint's address, and the endpoint's ingress rules the pod's."""
    cluster = pods
    expected = {
        "client": {"self": True, "far": True},
        "picky": {"self": False, "far": False},
        "stranger": {"self": False, "far": False},
        "w1": {"far": True},
    }
    for name, services in expected.items():
        pod = next(each for node in (cluster.a, cluster.b) for each in node.pods if each.name == name)
        space: Space = pod if hooked else unhooked(pod)
        found = {service: _reaches(cluster, space, service, family) for service in services}
        assert found == services, name


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_accept_the_address_of_a_client_outside(host: PolicyCluster, family: str) -> None:
    """An ingress rule of a host outside accepts it through a NodePort of the endpoint's node, masqueraded or not: rules
    of that node see the client's own address. They do not accept another host."""
    cluster = host
    address = cluster.address(cluster.a, family)
    other, bits = ("172.18.0.200", 24) if family == "IPv4" else ("fd00:172:18::c8", 64)
    ip(
        cluster.outside,
        f"address add {other}/{bits} dev eth0 preferred_lft 0 {'nodad' if bits == 64 else ''}",
    )
    for service in ("local", "self"):
        ports = cluster.node_port(service), cluster.node_port(service, "UDP")
        assert _passes(cluster.outside, address, *ports)
        ip(cluster.outside, f"route add {address} dev eth0 src {other}")
        assert not _passes(cluster.outside, address, *ports)
        ip(cluster.outside, f"route del {address}")


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_see_a_node_where_the_client_came_by_another_one(host: PolicyCluster, family: str) -> None:
    """Through a NodePort of another node than the endpoint's the client outside is masqueraded, so that a rule with its
    address does not accept it, as with kube-proxy."""
    cluster = host
    ports = cluster.node_port("self"), cluster.node_port("self", "UDP")
    assert not _passes(cluster.outside, cluster.address(cluster.b, family), *ports)
