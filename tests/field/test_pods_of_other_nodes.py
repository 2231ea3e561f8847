"""What went wrong on real nodes, one test a fault, with real sockets and packets in the lab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT
from tests.lab import Lab, Pod, clients

pytestmark = pytest.mark.root

#: kubeadm writes this into kube-proxy's configuration: the pods of all nodes.
_PODS = ["--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]


@pytest.fixture(scope="module", params=[[], ["--bypass-netfilter"]], ids=["safe", "bypass"])
def outer(request: pytest.FixtureRequest) -> Iterator[Outer]:
    """An agent on node-a alone: what pods of node-b ask of node-a comes there in packets."""
    with Lab() as lab:
        made = Outer(lab)
        made.agent(*_PODS, *request.param).start()
        yield made


@pytest.fixture(scope="module")
def neighbour(outer: Outer) -> Pod:
    """A pod beside the backend w2."""
    return outer.b.pod("neighbour")


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_a_pod_asks_another_nodes_node_port_of_a_backend_beside_it(
    outer: Outer, neighbour: Pod, ask: Callable[..., Any], family: str
) -> None:
    """The backend's answers come back through the node that was asked: it sees that node's address, as with kube-proxy
    under policy Cluster, though the client is a pod.
    """
    address = outer.a.address if family == "v4" else outer.a.address6
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    names = {}
    for _ in range(clients.ENOUGH):
        answer = neighbour.call(ask, address, port)
        names[answer["name"]] = answer["peer"]
    assert set(names) == {"w1", "w2"}
    assert names["w2"] == address
