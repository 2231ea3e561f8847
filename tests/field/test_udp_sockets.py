"""Unconnected and connected UDP sockets: selected backend, source of replies, and errors."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outside_client import SLICE_PORTS, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS
from tests.field.remote import Remote
from tests.lab import Lab, clients, manifests, servers
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

SECOND = {"v4": "10.96.0.40", "v6": "fd00:10:96::40", "mapped": "::ffff:10.96.0.40"}
UNUSED_PORT = 54
#: The maximum number of sockets with a record; datagrams of others are translated in packets.
ROOM = 300
FRONTENDS = 40


class ManyFrontendsCluster(OutsideClientCluster):
    """Adds a Service ``many`` with 40 ports, each with another backend, and ``second`` in both families."""

    def write_others(self) -> None:
        super().write_others()
        ports = [{"name": "udp", "port": 53, "protocol": "UDP"}]
        pieces = [
            manifests.slice_of("second", [manifests.endpoint(a, "node-a")], ports=SLICE_PORTS[1:])
            for a in (self.w1.address, self.w1.address6)
        ]
        second = manifests.service("second", clusterIPs=[SECOND["v4"], SECOND["v6"]], ports=ports)
        others = self.manifests / "others.yaml"
        kept = [each for each in manifests.read(others) if not each["metadata"]["name"].startswith("second")]
        manifests.write(others, *kept, second, *pieces)
        numbers = range(FRONTENDS)
        manifests.write(
            self.manifests / "many.yaml",
            manifests.service(
                "many",
                clusterIPs=["10.96.0.70"],
                ports=[{"name": f"p{n}", "port": 100 + n, "protocol": "UDP"} for n in numbers],
            ),
            manifests.slice_of(
                "many",
                [manifests.endpoint(self.w1.address, "node-a")],
                ports=[{"name": f"p{n}", "port": 9100 + n, "protocol": "UDP"} for n in numbers],
            ),
        )

    def fill(self, name: str) -> int:
        status = json.loads(self.a.cli("status", "-o", "json"))
        return int(next(each["entries"] for each in status["maps"] if each["name"] == name))

    def records(self) -> tuple[int, int]:
        """The number of sockets with a record, and of pages with further frontends."""
        status = json.loads(self.a.cli("status", "-o", "json"))
        entries = {each["name"]: int(each["entries"]) for each in status["maps"]}
        return entries["sock_origin"], entries["sock_peers"]

    def wait_closed(self) -> None:
        """Waits until no record of a socket is left."""
        until(lambda: self.records() == (0, 0), "a closed socket leaves its records")


@pytest.fixture(scope="module")
def cluster() -> Iterator[ManyFrontendsCluster]:
    with Lab() as lab:
        found = ManyFrontendsCluster(lab)
        servers.start(found.w1, "many", *range(9100, 9100 + FRONTENDS))
        found.agent("--max-datagram-sockets", str(ROOM)).start()
        yield found


@pytest.fixture(params=SERVICE_IPS)
def family(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_unconnected_socket_keeps_its_backend(cluster: ManyFrontendsCluster, family: str) -> None:
    """With kube-proxy a flow does so as well. Many sockets together use all backends."""
    host = SERVICE_IPS[family]
    assert len(set(cluster.client.call(clients.repeated, clients.ENOUGH, _names, host, 53, 10))) == 2
    for space in (cluster.client, cluster.a):
        assert "," not in space.call(_names, host, 53, 20)


def _names(host: str, port: int, count: int, protocol: int = 0) -> str:
    """The names of backends that reply to datagrams of one socket, joined by commas."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.settimeout(3)
        found = set()
        for _ in range(count):
            sock.sendto(b"?", (host, port))
            data, source = sock.recvfrom(4096)
            assert source[:2] == (host, port)
            found.add(json.loads(data)["name"])
    return ",".join(sorted(found))


@pytest.mark.parametrize("change", ["gone", "unready"])
def test_unconnected_socket_leaves_a_removed_or_unready_backend_only(
    cluster: ManyFrontendsCluster, family: str, change: str
) -> None:
    """It keeps its new backend when the old one is added again."""
    host = SERVICE_IPS[family]
    with Remote(cluster.client, host) as sock:
        first = sock.ask_at(host, 53)
        stays, goes = (cluster.w1, cluster.w2) if first == "w2" else (cluster.w2, cluster.w1)
        try:
            if change == "gone":
                cluster.write_web(stays)
            else:
                _write_unready(cluster, goes)
            until(
                lambda: sock.ask_at(host, 53, 0.5) == stays.name, "the socket still uses the removed backend"
            )
            cluster.write_web(cluster.w1, cluster.w2)
            until(lambda: cluster.client.call(clients.spread_udp, host, 53, 10).keys() == {"w1", "w2"})
            assert {sock.ask_at(host, 53) for _ in range(10)} == {stays.name}
        finally:
            cluster.write_web(cluster.w1, cluster.w2)
        until(lambda: cluster.client.call(clients.spread_udp, host, 53, 10).keys() == {"w1", "w2"})


def _write_unready(cluster: ManyFrontendsCluster, pod: Any) -> None:
    """Writes the Service shop/web with ``pod`` as an unready endpoint."""
    cluster.write_web(cluster.w1, cluster.w2)
    documents = manifests.read(cluster.manifests / "web.yaml")
    for document in documents:
        for endpoint in document.get("endpoints", ()):
            if endpoint["addresses"][0] in (pod.address, pod.address6):
                endpoint["conditions"] = {"ready": False, "serving": False, "terminating": False}
    manifests.write(cluster.manifests / "web.yaml", *documents)


def test_sendto_the_peer_of_a_connected_socket_uses_its_backend(
    cluster: ManyFrontendsCluster, family: str
) -> None:
    """The kernel delivers only datagrams of its peer to a connected socket."""
    assert cluster.client.call(_connected_and_named, SERVICE_IPS[family], 53, 20) == ["the same"] * 20


def _connected_and_named(host: str, port: int, count: int) -> list[str]:
    """Returns for each socket if send() and sendto() reach the same backend."""
    found = []
    for _ in range(count):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            sock.connect((host, port))
            sock.send(b"?")
            first = json.loads(sock.recv(4096))["name"]
            sock.sendto(b"?", (host, port))
            try:
                data, source = sock.recvfrom(4096)
            except TimeoutError:
                found.append("nothing")
                continue
            is_same = json.loads(data)["name"] == first and source[:2] == (host, port)
            found.append("the same" if is_same else "another")
    return found


def test_sendto_another_service_does_not_change_a_connected_socket(
    cluster: ManyFrontendsCluster, family: str
) -> None:
    """The datagram is sent, and the reply is not delivered, as without Services."""
    host, other = SERVICE_IPS[family], SECOND[family]
    with Remote(cluster.client, host) as sock:
        sock.connect(host, 53)
        name = sock.ask()
        assert sock.sendto(other, 53) is None
        assert [sock.ask() for _ in range(3)] == [name] * 3


# -- no endpoint, and unknown ports


NO_BACKEND = {
    "unknown port": (SERVICE_IPS, UNUSED_PORT, "ECONNREFUSED"),
    "no endpoint": (
        {"v4": "10.96.0.20", "v6": "fd00:10:96::20", "mapped": "::ffff:10.96.0.20"},
        53,
        "ECONNREFUSED",
    ),
    "remote endpoint only": (
        {"v4": "10.96.0.30", "v6": "fd00:10:96::30", "mapped": "::ffff:10.96.0.30"},
        53,
        "nothing",
    ),
}


@pytest.mark.parametrize("case", NO_BACKEND)
@pytest.mark.parametrize("where", ["pod", "host"])
def test_udp_connect_succeeds_and_send_fails_without_endpoints(
    cluster: ManyFrontendsCluster, family: str, case: str, where: str
) -> None:
    """connect() sends nothing; resolvers use it to select a source address (RFC 6724).

    send() of an IPv4-mapped socket passes the sendmsg hook, so that it fails itself if there is no endpoint.
    """
    hosts, port, error = NO_BACKEND[case]
    space: Space = cluster.client if where == "pod" else cluster.a
    with Remote(space, hosts[family]) as sock:
        assert sock.connect(hosts[family], port) is None
        assert sock.ask(0.3) == error


def test_connected_socket_is_served_once_its_service_has_an_endpoint(
    cluster: ManyFrontendsCluster, family: str
) -> None:
    """It was connected before, and need not connect again, as with kube-proxy."""
    hosts = {"v4": "10.96.1.1", "v6": "fd00:10:96:1::1", "mapped": "::ffff:10.96.1.1"}
    ports = [{"name": "udp", "port": 53, "protocol": "UDP"}]
    late = manifests.service("late", clusterIPs=[hosts["v4"], hosts["v6"]], ports=ports)
    manifests.write(cluster.manifests / "late.yaml", late)
    host = hosts[family]
    for space in (cluster.client, cluster.a):
        until(lambda s=space: s.call(clients.send_error, host, 53) == "ECONNREFUSED")  # type: ignore[misc]
    with Remote(cluster.client, host) as pod, Remote(cluster.a, host) as node:
        for sock in (pod, node):
            assert sock.connect(host, 53) is None
            assert sock.ask(0.5) == "ECONNREFUSED"
        slices = [
            manifests.slice_of("late", [manifests.endpoint(a, "node-b")], ports=SLICE_PORTS[1:])
            for a in (cluster.w2.address, cluster.w2.address6)
        ]
        manifests.write(cluster.manifests / "late.yaml", late, *slices)
        for sock in (pod, node):
            until(lambda s=sock: s.ask(0.5) == "w2", "the socket is not served")  # type: ignore[misc]


def test_sendto_an_unknown_port_is_refused(cluster: ManyFrontendsCluster, family: str) -> None:
    for space in (cluster.client, cluster.a):
        assert space.call(clients.send_error, SERVICE_IPS[family], UNUSED_PORT) == "ECONNREFUSED"


# -- the source of replies


@pytest.mark.parametrize("where", ["pod", "host"])
def test_replies_of_two_services_with_one_backend_have_their_addresses(
    cluster: ManyFrontendsCluster, family: str, where: str
) -> None:
    """Two datagrams of one socket in flight to one backend are distinguished by their source port."""
    first, second = "10.96.0.41", SECOND["v4"]
    if family != "v4":
        first, second = (
            (f"::ffff:{first}", SECOND["mapped"]) if family == "mapped" else ("fd00:10:96::41", SECOND["v6"])
        )
    ports = [{"name": "udp", "port": 53, "protocol": "UDP"}]
    manifests.write(
        cluster.manifests / "third.yaml",
        manifests.service("third", clusterIPs=["10.96.0.41", "fd00:10:96::41"], ports=ports),
        *(
            manifests.slice_of("third", [manifests.endpoint(a, "node-a")], ports=SLICE_PORTS[1:])
            for a in (cluster.w1.address, cluster.w1.address6)
        ),
    )
    space: Space = cluster.client if where == "pod" else cluster.a
    until(lambda: space.call(_asks, first, 53) == "w1")
    with Remote(space, first) as sock:
        for _ in range(5):
            sock.sendto(first, 53, "echo")
            sock.sendto(second, 53)
            replies = [sock.receive(), sock.receive()]
            assert sorted(reply[1:] for reply in replies) == sorted([[first, 53], [second, 53]])
            assert [reply[1] for reply in replies if reply[0] == "echo"] == [first]


def _asks(host: str, port: int) -> str:
    try:
        return str(clients.ask_udp(host, port)["name"])
    except OSError as error:
        return str(error)


def test_two_services_of_one_socket_get_distinct_backends(cluster: ManyFrontendsCluster) -> None:
    """The socket uses another backend if there is one, so that no packet has to be translated."""
    before = cluster.fill("conntrack")
    with Remote(cluster.client, "10.96.0.10") as sock:
        sock.sendto(SECOND["v4"], 53)
        sock.sendto(SERVICE_IPS["v4"], 53)
        replies = {reply[1]: json.loads(reply[0])["name"] for reply in (sock.receive(), sock.receive())}
        assert replies == {SECOND["v4"]: "w1", SERVICE_IPS["v4"]: "w2"}
    assert cluster.fill("conntrack") <= before


def test_one_unconnected_socket_with_many_services(cluster: ManyFrontendsCluster) -> None:
    """A socket has records of 32 Services; datagrams to others are translated in packets."""
    with Remote(cluster.client, "10.96.0.70") as sock:
        for _ in range(2):
            for number in range(FRONTENDS):
                assert sock.sendto("10.96.0.70", 100 + number) is None
            replies = [sock.receive() for _ in range(FRONTENDS)]
            assert sorted(reply[2] for reply in replies) == list(range(100, 100 + FRONTENDS))
            assert {reply[1] for reply in replies} == {"10.96.0.70"}
        for number in range(FRONTENDS):
            assert sock.ask_at("10.96.0.70", 100 + number) == "many"
    cluster.wait_closed()


def _flood(first: str, host: str, count: int) -> dict[str, int]:
    """Opens sockets that ask both Services and stay open; returns the sources of the second's replies."""
    found: Counter[str] = Counter()
    sockets = []
    for _ in range(count):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(3)
        sock.sendto(b"?", (first, 53))
        assert sock.recvfrom(4096)[1][0] == first
        sock.sendto(b"?", (host, 53))
        found[sock.recvfrom(4096)[1][0]] += 1
        sockets.append(sock)
    for sock in sockets:
        sock.close()
    return dict(found)


def test_full_socket_records_evict_no_entry_and_are_removed(
    cluster: ManyFrontendsCluster, family: str
) -> None:
    """A reply to a socket has the Service's address, however many other sockets there are.

    Datagrams of sockets beyond the capacity are translated in packets, and counted.
    """
    first, host = SECOND[family], SERVICE_IPS[family]
    before = _full(cluster)
    with Remote(cluster.client, host) as sock:
        assert sock.ask_at(first, 53) == "w1"
        sock.sendto(host, 53)
        assert cluster.client.call(_flood, first, host, 2 * ROOM) == {host: 2 * ROOM}
        assert sock.receive()[1:] == [host, 53]
        assert cluster.records() == (1, 1)
    cluster.wait_closed()
    assert _full(cluster) > before


def _full(cluster: ManyFrontendsCluster) -> int:
    status = json.loads(cluster.a.cli("status", "-o", "json"))
    return sum(each["packets"] for each in status["packets"] if each["reason"] == "sockets-full")


@pytest.mark.skipif(not clients.has_udp_lite(), reason="this kernel has no sockets of UDP-Lite")
def test_udp_lite_socket_has_a_record_until_it_is_closed(cluster: ManyFrontendsCluster) -> None:
    """Unconnected UDP-Lite sockets pass the sendmsg hook as those of UDP."""
    for _ in range(3):
        with Remote(cluster.w1, SECOND["v4"], protocol=clients.UDPLITE) as sock:
            assert sock.sendto(SECOND["v4"], 53) is None
            assert cluster.records() == (1, 0)
    cluster.wait_closed()


def test_unconnected_socket_keeps_its_backend_of_a_node_port(cluster: ManyFrontendsCluster) -> None:
    for space in (cluster.client, cluster.a):
        for address in (cluster.a.address, cluster.a.address6):
            assert "," not in space.call(_names, address, NODE_PORT - 27, 10)
    assert "," not in cluster.a.call(_names, "127.0.0.1", NODE_PORT - 27, 10)


def test_unconnected_sockets_keep_their_backend_across_map_sizes(cluster: ManyFrontendsCluster) -> None:
    """A socket that sent before keeps its backend until the backend is removed."""
    host = SERVICE_IPS["v4"]
    socks = [Remote(cluster.client, host) for _ in range(6)]
    assert {sock.ask_at(SECOND["v4"], 53) for sock in socks[:3]} == {"w1"}
    names = [sock.ask_at(host, 53) for sock in socks]
    assert cluster.records() == (6, 3)
    cluster.lab.agents[-1].stop()
    cluster.agent("--max-datagram-sockets", str(ROOM), "--max-services", "1000").start()
    try:
        assert [sock.ask_at(host, 53) for sock in socks] == names
        assert {sock.ask_at(SECOND["v4"], 53) for sock in socks[:3]} == {"w1"}
        assert cluster.records() == (6, 3)
        cluster.write_web(cluster.w2)
        for sock in socks:
            until(lambda s=sock: s.ask_at(host, 53, 0.5) == "w2")  # type: ignore[misc]
    finally:
        cluster.write_web(cluster.w1, cluster.w2)
        for sock in socks:
            sock.close()
    cluster.wait_closed()
