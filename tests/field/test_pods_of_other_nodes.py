"""A pod of another node that connects to a NodePort, with detectLocalMode ClusterCIDR."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT
from tests.lab import Lab, Pod, clients

pytestmark = pytest.mark.root

#: kubeadm configures kube-proxy with the CIDRs of the pods of all nodes.
_PODS = ["--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48"]


@pytest.fixture(scope="module", params=[[], ["--bypass-netfilter"]], ids=["default", "bypass"])
def outer(request: pytest.FixtureRequest) -> Iterator[Outer]:
    """An agent on node-a only, so that connections of pods of node-b reach node-a untranslated."""
    with Lab() as lab:
        made = Outer(lab)
        made.agent(*_PODS, *request.param).start()
        yield made


@pytest.fixture(scope="module")
def neighbour(outer: Outer) -> Pod:
    """A pod on the node of the backend w2."""
    return outer.b.pod("neighbour")


@pytest.mark.parametrize("family", ["v4", "v6"])
@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_node_port_of_another_node_masquerades_a_remote_pod(
    outer: Outer, neighbour: Pod, ask: Callable[..., Any], family: str
) -> None:
    """The client is a pod, but replies have to return through node-a: it is masqueraded, as with kube-proxy."""
    address = outer.a.address if family == "v4" else outer.a.address6
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    names = {}
    for _ in range(clients.ENOUGH):
        reply = neighbour.call(ask, address, port)
        names[reply["name"]] = reply["peer"]
    assert set(names) == {"w1", "w2"}
    assert names["w2"] == address
