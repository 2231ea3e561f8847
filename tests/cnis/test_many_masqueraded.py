"""Two that masquerade, a CNI and this, share the node's ports without taking each other's replies."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator

import pytest

from tests.cnis.cluster import Cluster
from tests.cnis.flannel import Flannel
from tests.cnis.network import FAMILIES
from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.cnis]

_OPEN = 2000


@pytest.fixture(scope="module", params=[True, False], ids=["flannel, VXLAN", "flannel, host-gw"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Lab(routes_pods=not request.param) as lab:
        yield Cluster(lab, Flannel("flannel", vxlan=request.param, nftables=False))


def _fails(host: str, port: int) -> int:
    """Returns how many connections fail, each opened while those before it are open."""
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (2 * _OPEN + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    held, failed = [], 0
    for _ in range(_OPEN):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # A SYN that is sent again meets the same flow.
        sock.settimeout(5)
        held.append(sock)
        try:
            sock.connect((host, port))
            failed += b"name" not in sock.recv(4096)
        except OSError:
            failed += 1
    return failed


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_that_the_cni_masquerades_get_their_own_replies(cluster: Cluster, family: str) -> None:
    """Flannel masquerades clients outside by random ports, and no port of ours takes the replies of such a connection."""
    assert cluster.outside.call(_fails, cluster.address(cluster.a, family), cluster.node_port("far")) == 0
