"""A pod of another node that connects to a NodePort, with detectLocalMode ClusterCIDR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import pytest

from tests.e2e.outside_client import PORTS, SLICE_PORTS, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Lab, Pod, clients, manifests

pytestmark = pytest.mark.root

#: NodePorts of a Service with externalTrafficPolicy Local, for TCP and UDP.
LOCAL_NODE_PORTS = (30081, 30054)
#: kubeadm configures kube-proxy with the CIDRs of the pods of all nodes.
_PODS = ["--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]


@pytest.fixture(scope="module", params=[[], ["--bypass-netfilter"]], ids=["default", "bypass"])
def cluster(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    """An agent on node-a only, so that connections of pods of node-b reach node-a untranslated."""
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        ports = [{**port, "nodePort": number} for port, number in zip(PORTS, LOCAL_NODE_PORTS, strict=True)]
        pods = (made.w1, made.w2)
        endpoints = [
            [manifests.endpoint(address(pod), pod.node.name) for pod in pods]
            for address in (attrgetter("address"), attrgetter("address6"))
        ]
        manifests.write(
            made.manifests / "local.yaml",
            manifests.service(
                "local",
                type="NodePort",
                externalTrafficPolicy="Local",
                clusterIPs=["10.96.0.50", "fd00:10:96::50"],
                ports=ports,
            ),
            *(manifests.slice_of("local", each, ports=SLICE_PORTS) for each in endpoints),
        )
        made.agent(*_PODS, *request.param).start()
        yield made


@pytest.fixture(scope="module")
def neighbour(cluster: OutsideClientCluster) -> Pod:
    """A pod on the node of the backend w2."""
    return cluster.b.pod("neighbour")


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_node_port_of_another_node_masquerades_a_remote_pod(
    cluster: OutsideClientCluster, neighbour: Pod, ask: Callable[..., Any], family: str
) -> None:
    """The client is a pod, but replies have to return through node-a: it is masqueraded, as with kube-proxy."""
    address = cluster.a.address if family == "v4" else cluster.a.address6
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    names = {}
    for _ in range(clients.ENOUGH):
        reply = neighbour.call(ask, address, port)
        names[reply["name"]] = reply["peer"]
    assert set(names) == {"w1", "w2"}
    assert names["w2"] == address


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_external_traffic_policy_local_holds_for_a_remote_pod(
    cluster: OutsideClientCluster, neighbour: Pod, ask: Callable[..., Any], family: str
) -> None:
    """Endpoints of the asked node reply, and see the pod.

    kube-proxy takes the pod for one of its own node, by its address, and chooses among all endpoints without
    masquerading: one on another node replies to the pod directly, from an address that it did not ask.
    """
    address = cluster.a.address if family == "v4" else cluster.a.address6
    for _ in range(clients.ENOUGH):
        reply = neighbour.call(ask, address, LOCAL_NODE_PORTS[ask is not clients.ask_tcp])
        assert reply["name"] == "w1"
        assert reply["peer"] == (neighbour.address if family == "v4" else neighbour.address6)


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_external_traffic_policy_local_does_not_hold_for_a_local_pod(
    cluster: OutsideClientCluster, family: str
) -> None:
    """A pod of the node reaches all endpoints, as with kube-proxy: also where its packets are translated."""
    address = cluster.a.address if family == "v4" else cluster.a.address6
    names = {
        cluster.client.call(clients.ask_tcp, address, LOCAL_NODE_PORTS[0])["name"]
        for _ in range(clients.ENOUGH)
    }
    assert names == {"w1", "w2"}
