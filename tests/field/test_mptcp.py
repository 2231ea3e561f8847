"""MPTCP clients: the socket that the application has is not the one that connects to a Service."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.world import SERVICE_IPS, World
from tests.field.records import fill, open_sockets
from tests.field.remote import Remote
from tests.lab import Lab, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IPPROTO_MPTCP = 262
#: With a backend that speaks MPTCP; others' speak TCP alone, and the connection falls back to that.
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


class Multipath(World):
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
        """Of sockets, of MPTCP sockets, and how many connections are counted as open."""
        return fill(self.a, "sock_origin"), fill(self.a, "mptcp_subflows"), open_sockets(self.a)

    def client_in(self, space: Space, host: str) -> Remote:
        return Remote(space, host, protocol=IPPROTO_MPTCP, kind=socket.SOCK_STREAM)


@pytest.fixture(scope="module")
def world() -> Iterator[Multipath]:
    with Lab() as lab:
        found = Multipath(lab)
        found.agent().start()
        yield found


@pytest.mark.parametrize("where", ["pod", "host"])
@pytest.mark.parametrize("family", SERVICE_IPS)
@pytest.mark.parametrize("server", ["mptcp", "tcp"])
def test_the_peer_is_the_service_and_nothing_stays_when_it_is_closed(
    world: Multipath, where: str, family: str, server: str
) -> None:
    """Whether the backend speaks MPTCP or the connection falls back to TCP."""
    host = (MULTIPATH if server == "mptcp" else SERVICE_IPS)[family]
    with world.client_in(world.client if where == "pod" else world.a, host) as client:
        assert client.connect(host, 80) is None
        assert client.peer() == [host, 80]
        assert world.records() == (1, 1, 1)
    until(lambda: world.records() == (0, 0, 0), "the record of a closed socket stays")


def test_one_that_was_refused_connects_to_another_service(world: Multipath) -> None:
    """A refused MPTCP socket may connect again, and has the last Service as its peer."""
    host = MULTIPATH["v4"]
    with world.client_in(world.client, host) as client:
        assert client.connect("10.96.0.20", 80) == world.refused
        # There is no Service at this address of the pod's own node, and nobody listens.
        assert client.connect(world.a.address, 81) == "ECONNREFUSED"
        assert client.connect(host, 80) is None
        assert client.peer() == [host, 80]
    until(lambda: world.records() == (0, 0, 0), "the record of a closed socket stays")


def test_what_asks_no_service_is_left_alone(world: Multipath) -> None:
    """A direct connection, and the server's own side, have the peers that they have."""
    with world.client_in(world.client, world.w1.address) as client:
        assert client.connect(world.w1.address, 8090) is None
        assert client.peer() == [world.w1.address, 8090]
        assert world.records() == (0, 0, 0)


def test_the_peer_outlives_the_agent_and_other_map_sizes(world: Multipath) -> None:
    """A new agent with maps of other sizes carries what belongs to open sockets over."""
    host = MULTIPATH["v4"]
    with world.client_in(world.client, host) as client:
        assert client.connect(host, 80) is None
        world.lab.agents[-1].stop()
        world.agent("--max-services", "1000").start()
        assert client.peer() == [host, 80]
    until(lambda: world.records() == (0, 0, 0), "the record of a closed socket stays")
