"""Unconnected and connected UDP sockets ask Services: who answers, from which address, and what is refused."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.outer import SLICE_PORTS, Outer
from tests.e2e.world import NODE_PORT, SERVICE_IPS
from tests.field.remote import Remote
from tests.lab import Lab, clients, manifests, servers
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

SECOND = {"v4": "10.96.0.40", "v6": "fd00:10:96::40", "mapped": "::ffff:10.96.0.40"}
UNUSED_PORT = 54
#: So many sockets of pods have a record: others are served by packets.
ROOM = 300
FRONTENDS = 40


class World(Outer):
    """With a Service ``many`` of 40 ports, each with a backend of its own, and ``second`` in both families."""

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


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        found = World(lab)
        servers.start(found.w1, "many", *range(9100, 9100 + FRONTENDS))
        found.agent("--max-datagram-sockets", str(ROOM)).start()
        yield found


@pytest.fixture(params=SERVICE_IPS)
def family(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_an_unconnected_socket_keeps_one_backend_while_it_is_usable(world: World, family: str) -> None:
    """As a flow of one 5-tuple does with kube-proxy; many sockets together use all backends."""
    host = SERVICE_IPS[family]
    assert len({world.client.call(_names, host, 53, 10) for _ in range(clients.ENOUGH)}) == 2
    for space in (world.client, world.a):
        assert "," not in space.call(_names, host, 53, 20)


def _names(host: str, port: int, count: int, protocol: int = 0) -> str:
    """Who answers the datagrams of one socket, each once, with commas."""
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
def test_an_unconnected_socket_leaves_a_backend_that_left_and_only_then(
    world: World, family: str, change: str
) -> None:
    """It stays with its new one when the old one comes back, or others go."""
    host = SERVICE_IPS[family]
    with Remote(world.client, host) as sock:
        first = sock.ask_at(host, 53)
        stays, goes = (world.w1, world.w2) if first == "w2" else (world.w2, world.w1)
        try:
            if change == "gone":
                world.write_web(stays)
            else:
                _write_unready(world, goes)
            until(lambda: sock.ask_at(host, 53, 0.5) == stays.name, "it stays with one that has left")
            world.write_web(world.w1, world.w2)
            until(lambda: world.client.call(clients.spread_udp, host, 53, 10).keys() == {"w1", "w2"})
            assert {sock.ask_at(host, 53) for _ in range(10)} == {stays.name}
        finally:
            world.write_web(world.w1, world.w2)
        until(lambda: world.client.call(clients.spread_udp, host, 53, 10).keys() == {"w1", "w2"})


def _write_unready(world: World, pod: Any) -> None:
    """The Service shop/web, where one of the two pods is not ready."""
    world.write_web(world.w1, world.w2)
    documents = manifests.read(world.manifests / "web.yaml")
    for document in documents:
        for endpoint in document.get("endpoints", ()):
            if endpoint["addresses"][0] in (pod.address, pod.address6):
                endpoint["conditions"] = {"ready": False, "serving": False, "terminating": False}
    manifests.write(world.manifests / "web.yaml", *documents)


def test_sendto_the_address_that_a_socket_is_connected_to_goes_to_the_same_backend(
    world: World, family: str
) -> None:
    """The kernel gives a connected socket answers of its peer only."""
    assert world.client.call(_connected_and_named, SERVICE_IPS[family], 53, 20) == ["the same"] * 20


def _connected_and_named(host: str, port: int, count: int) -> list[str]:
    """Of so many sockets: whether send() and sendto() are answered by the same backend."""
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


def test_sendto_another_service_leaves_a_connected_socket_as_it_is(world: World, family: str) -> None:
    """It is sent, and answered to nobody, as without Services."""
    host, other = SERVICE_IPS[family], SECOND[family]
    with Remote(world.client, host) as sock:
        sock.connect(host, 53)
        name = sock.ask()
        assert sock.sendto(other, 53) is None
        assert [sock.ask() for _ in range(3)] == [name] * 3


# -- nothing there


NOBODY = {
    "unused port": (SERVICE_IPS, UNUSED_PORT, "ECONNREFUSED"),
    "no endpoint": (
        {"v4": "10.96.0.20", "v6": "fd00:10:96::20", "mapped": "::ffff:10.96.0.20"},
        53,
        "ECONNREFUSED",
    ),
    "elsewhere only": (
        {"v4": "10.96.0.30", "v6": "fd00:10:96::30", "mapped": "::ffff:10.96.0.30"},
        53,
        "nothing",
    ),
}


@pytest.mark.parametrize("case", NOBODY)
@pytest.mark.parametrize("where", ["pod", "host"])
def test_connect_of_udp_succeeds_whoever_is_there_and_the_send_is_refused(
    world: World, family: str, case: str, where: str
) -> None:
    """connect() sends nothing: resolvers use it to learn a source address (RFC 6724).

    The kernel names the peer of an IPv4-mapped socket at each datagram: there send() itself may be refused,
    if there is no endpoint at all.
    """
    hosts, port, error = NOBODY[case]
    space: Space = world.client if where == "pod" else world.a
    with Remote(space, hosts[family]) as sock:
        assert sock.connect(hosts[family], port) is None
        assert sock.ask(0.3) == error


def test_a_connected_socket_is_served_once_its_service_has_an_endpoint(world: World, family: str) -> None:
    """It was connected while there was none: as with kube-proxy it need not connect again."""
    hosts = {"v4": "10.96.1.1", "v6": "fd00:10:96:1::1", "mapped": "::ffff:10.96.1.1"}
    ports = [{"name": "udp", "port": 53, "protocol": "UDP"}]
    late = manifests.service("late", clusterIPs=[hosts["v4"], hosts["v6"]], ports=ports)
    manifests.write(world.manifests / "late.yaml", late)
    host = hosts[family]
    for space in (world.client, world.a):
        until(lambda s=space: s.call(clients.send_error, host, 53) == "ECONNREFUSED")  # type: ignore[misc]
    with Remote(world.client, host) as pod, Remote(world.a, host) as node:
        for sock in (pod, node):
            assert sock.connect(host, 53) is None
            assert sock.ask(0.5) == "ECONNREFUSED"
        slices = [
            manifests.slice_of("late", [manifests.endpoint(a, "node-b")], ports=SLICE_PORTS[1:])
            for a in (world.w2.address, world.w2.address6)
        ]
        manifests.write(world.manifests / "late.yaml", late, *slices)
        for sock in (pod, node):
            until(lambda s=sock: s.ask(0.5) == "w2", "it is not served")  # type: ignore[misc]


def test_sendto_a_port_that_nobody_has_is_refused(world: World, family: str) -> None:
    for space in (world.client, world.a):
        assert space.call(clients.send_error, SERVICE_IPS[family], UNUSED_PORT) == "ECONNREFUSED"


# -- who is told to have answered


@pytest.mark.parametrize("where", ["pod", "host"])
def test_two_services_with_one_backend_answer_each_for_itself(world: World, family: str, where: str) -> None:
    """Two questions of one socket in flight: on the wire they would look alike, had they one port."""
    first, second = "10.96.0.41", SECOND["v4"]
    if family != "v4":
        first, second = (
            (f"::ffff:{first}", SECOND["mapped"]) if family == "mapped" else ("fd00:10:96::41", SECOND["v6"])
        )
    ports = [{"name": "udp", "port": 53, "protocol": "UDP"}]
    manifests.write(
        world.manifests / "third.yaml",
        manifests.service("third", clusterIPs=["10.96.0.41", "fd00:10:96::41"], ports=ports),
        *(
            manifests.slice_of("third", [manifests.endpoint(a, "node-a")], ports=SLICE_PORTS[1:])
            for a in (world.w1.address, world.w1.address6)
        ),
    )
    space: Space = world.client if where == "pod" else world.a
    until(lambda: space.call(_asks, first, 53) == "w1")
    with Remote(space, first) as sock:
        for _ in range(5):
            sock.sendto(first, 53, "echo")
            sock.sendto(second, 53)
            answers = [sock.receive(), sock.receive()]
            assert sorted(a[1:] for a in answers) == sorted([[first, 53], [second, 53]])
            assert [a[1] for a in answers if a[0] == "echo"] == [first]


def _asks(host: str, port: int) -> str:
    try:
        return str(clients.ask_udp(host, port)["name"])
    except OSError as error:
        return str(error)


def test_two_services_with_two_backends_get_one_each(world: World) -> None:
    """Where there is another backend the socket takes that, and no packet is translated."""
    before = world.fill("conntrack")
    with Remote(world.client, "10.96.0.10") as sock:
        sock.sendto(SECOND["v4"], 53)
        sock.sendto(SERVICE_IPS["v4"], 53)
        answers = {a[1]: json.loads(a[0])["name"] for a in (sock.receive(), sock.receive())}
        assert answers == {SECOND["v4"]: "w1", SERVICE_IPS["v4"]: "w2"}
    assert world.fill("conntrack") <= before


def test_a_socket_may_ask_many_services_at_once(world: World) -> None:
    """All in flight: those that a socket has no record for, beyond 32, are translated in packets."""
    with Remote(world.client, "10.96.0.70") as sock:
        for _ in range(2):
            for number in range(FRONTENDS):
                assert sock.sendto("10.96.0.70", 100 + number) is None
            answers = [sock.receive() for _ in range(FRONTENDS)]
            assert sorted(a[2] for a in answers) == list(range(100, 100 + FRONTENDS))
            assert {a[1] for a in answers} == {"10.96.0.70"}
        for number in range(FRONTENDS):
            assert sock.ask_at("10.96.0.70", 100 + number) == "many"
    until(lambda: world.fill("sock_peers") == 0, "a closed socket leaves its records")


def _flood(host: str, count: int) -> dict[str, int]:
    """So many sockets, all open, that ask once: from where they are answered."""
    found: Counter[str] = Counter()
    sockets = []
    for _ in range(count):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(3)
        sock.sendto(b"?", (host, 53))
        found[sock.recvfrom(4096)[1][0]] += 1
        sockets.append(sock)
    for sock in sockets:
        sock.close()
    return dict(found)


def test_other_sockets_push_nobodys_answers_out_and_leave_nothing(world: World, family: str) -> None:
    """A socket that waits is told the Service's address, however many others there are.

    Those that there is no room for are served all the same, in packets, and counted.
    """
    host = SERVICE_IPS[family]
    before = _full(world)
    with Remote(world.client, host) as sock:
        sock.sendto(host, 53)
        assert world.client.call(_flood, host, 2 * ROOM) == {host: 2 * ROOM}
        assert sock.receive()[1:] == [host, 53]
        assert world.fill("sock_peers") == 1
    until(lambda: world.fill("sock_peers") == 0, "a closed socket leaves its record")
    assert _full(world) > before


def _full(world: World) -> int:
    status = json.loads(world.a.cli("status", "-o", "json"))
    return sum(each["packets"] for each in status["packets"] if each["reason"] == "sockets-full")


def test_udp_lite_keeps_its_backend_too(world: World) -> None:
    """It has no connect hook; unconnected it is as UDP."""
    for _ in range(3):
        with Remote(world.w1, SECOND["v4"], protocol=clients.UDPLITE) as sock:
            assert sock.sendto(SECOND["v4"], 53) is None
    until(lambda: world.fill("sock_peers") == 0, "a closed socket leaves its record")


def test_a_node_port_keeps_one_backend_for_a_socket_of_the_host_and_of_a_pod(world: World) -> None:
    for space in (world.client, world.a):
        for address in (world.a.address, world.a.address6):
            assert "," not in space.call(_names, address, NODE_PORT - 27, 10)
    assert "," not in world.a.call(_names, "127.0.0.1", NODE_PORT - 27, 10)


def test_maps_of_other_sizes_take_the_sockets_along(world: World) -> None:
    """A socket that sent before stays with its backend, and leaves it when it leaves."""
    host = SERVICE_IPS["v4"]
    socks = [Remote(world.client, host) for _ in range(6)]
    names = [sock.ask_at(host, 53) for sock in socks]
    world.lab.agents[-1].stop()
    world.agent("--max-datagram-sockets", str(ROOM), "--max-services", "1000").start()
    try:
        assert [sock.ask_at(host, 53) for sock in socks] == names
        assert world.fill("sock_peers") == len(socks)
        world.write_web(world.w2)
        for sock in socks:
            until(lambda s=sock: s.ask_at(host, 53, 0.5) == "w2")  # type: ignore[misc]
    finally:
        world.write_web(world.w1, world.w2)
        for sock in socks:
            sock.close()
    until(lambda: world.fill("sock_peers") == 0, "a closed socket leaves its record")
