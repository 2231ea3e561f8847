"""MPTCP clients: the socket of the application is not the subflow socket that connects to a Service."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.field.records import fill, open_sockets, origins
from tests.field.remote import Remote
from tests.lab import Lab, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IPPROTO_MPTCP = 262
#: A Service whose backend supports MPTCP; with others, connections fall back to TCP.
MULTIPATH = {"v4": "10.96.0.50", "v6": "fd00:10:96::50", "mapped": "::ffff:10.96.0.50"}
PORTS = [{"name": "http", "port": 80, "protocol": "TCP"}]
SERVES = """
import socket
server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 262)
server.bind(("::", 8090))
server.listen()
print("ready", flush=True)
held = []
while True:
    held.append(server.accept())
"""


class MptcpCluster(TwoNodeCluster):
    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        server = self.w1.popen([sys.executable, "-c", SERVES], stdout=-1)
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        slice_ports = [{**PORTS[0], "port": 8090}]
        manifests.write(
            self.manifests / "multipath.yaml",
            manifests.service("multipath", clusterIPs=[MULTIPATH["v4"], MULTIPATH["v6"]], ports=PORTS),
            *(
                manifests.slice_of("multipath", [manifests.endpoint(a, "node-a")], ports=slice_ports)
                for a in (self.w1.address, self.w1.address6)
            ),
        )

    def records(self) -> tuple[int, int, int]:
        """The number of records of sockets, of MPTCP subflows, and of counted open connections."""
        return origins(self.a)[0], fill(self.a, "mptcp_subflows"), open_sockets(self.a)

    def client_in(self, space: Space, host: str) -> Remote:
        return Remote(space, host, protocol=IPPROTO_MPTCP, kind=socket.SOCK_STREAM)


@pytest.fixture(scope="module")
def cluster() -> Iterator[MptcpCluster]:
    with Lab() as lab:
        found = MptcpCluster(lab)
        found.agent().start()
        yield found


@pytest.mark.parametrize("where", ["pod", "host"])
@pytest.mark.parametrize("family", SERVICE_IPS)
@pytest.mark.parametrize("server", ["mptcp", "tcp"])
def test_mptcp_peer_is_the_service_and_close_removes_all_records(
    cluster: MptcpCluster, where: str, family: str, server: str
) -> None:
    """The backend supports MPTCP, or the connection falls back to TCP."""
    host = (MULTIPATH if server == "mptcp" else SERVICE_IPS)[family]
    with cluster.client_in(cluster.client if where == "pod" else cluster.a, host) as client:
        assert client.connect(host, 80) is None
        assert client.peer() == [host, 80]
        assert cluster.records() == (1, 1, 1)
    until(lambda: cluster.records() == (0, 0, 0), "the record of a closed socket is left")


def test_refused_mptcp_socket_connects_to_another_service(cluster: MptcpCluster) -> None:
    """It can connect again, and has the last Service as its peer."""
    host = MULTIPATH["v4"]
    with cluster.client_in(cluster.client, host) as client:
        assert client.connect("10.96.0.20", 80) == cluster.refused
        # No Service and no socket has this address and port of the pod's node.
        assert client.connect(cluster.a.address, 81) == "ECONNREFUSED"
        assert client.connect(host, 80) is None
        assert client.peer() == [host, 80]
    until(lambda: cluster.records() == (0, 0, 0), "the record of a closed socket is left")


def test_direct_mptcp_connections_are_not_recorded(cluster: MptcpCluster) -> None:
    """getpeername() of a direct connection is not translated."""
    with cluster.client_in(cluster.client, cluster.w1.address) as client:
        assert client.connect(cluster.w1.address, 8090) is None
        assert client.peer() == [cluster.w1.address, 8090]
        assert cluster.records() == (0, 0, 0)


def test_mptcp_peer_survives_an_agent_restart_with_other_map_sizes(cluster: MptcpCluster) -> None:
    """A new agent copies records of open sockets to maps of other sizes."""
    host = MULTIPATH["v4"]
    with cluster.client_in(cluster.client, host) as client:
        assert client.connect(host, 80) is None
        cluster.lab.agents[-1].stop()
        cluster.agent("--max-services", "1000").start()
        assert client.peer() == [host, 80]
    until(lambda: cluster.records() == (0, 0, 0), "the record of a closed socket is left")
