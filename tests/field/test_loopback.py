"""NodePorts that processes of the node ask for from its loopback.

The control is netfilter's own NAT with ``route_localnet``, as kube-proxy's iptables mode has it: it serves a
socket that is bound to 127.0.0.1; one that is bound to ::1, or to the device lo, only where the backend is on
the host's own network.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scapy.all import IPv6, raw
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as UDP_LAYER

from tests.e2e.world import World
from tests.lab import Lab, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: NodePorts by where the one backend is: TCP's; UDP's is the next.
NODE_PORTS = {"w2": 30180, "w1": 30280, "host": 30380}
EMPTY, CLOSED_HERE, CLOSED_IN_POD, AFFINE, TUNNELLED = 30480, 30580, 30680, 30780, 30880
#: Ways to be bound to the loopback: by its address, by its device.
BY_ADDRESS, BY_DEVICE, BY_BOTH = (True, False), (False, True), (True, True)
TCP, UDP, UDP_SENDTO = "tcp", "udp", "udp sendto"
KINDS = (TCP, UDP, UDP_SENDTO)


class BehindTun(NamedTuple):
    """A backend that is reached through a device without a link layer."""

    address: str = "10.99.0.2"
    address6: str = "fd00:10:99::2"


class Asked(NamedTuple):
    """One question; ``bound``: to the loopback's address, to its device."""

    kind: str
    host: str
    port: int
    bound: tuple[bool, bool]


def _loopback_of(host: str) -> str:
    if host.startswith("::ffff:"):
        return "::ffff:127.0.0.1"
    return "::1" if ":" in host else "127.0.0.1"


def _socket(asked: Asked) -> socket.socket:
    family = socket.AF_INET6 if ":" in asked.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if asked.kind == TCP else socket.SOCK_DGRAM)
    sock.settimeout(2.0)
    by_address, by_device = asked.bound
    if by_device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    if by_address:
        sock.bind((_loopback_of(asked.host), 0))
    return sock


def _ask(asked: Asked) -> str:
    """The backend's name, or the error's. The application sees no other peer than the one it asked."""
    where = asked.host, asked.port
    with _socket(asked) as sock:
        try:
            if asked.kind == UDP_SENDTO:
                sock.sendto(b"?", where)
                data, source = sock.recvfrom(4096)
            else:
                sock.connect(where)
                source = sock.getpeername()
                if asked.kind == UDP:
                    sock.send(b"?")
                data = sock.recv(4096)
        except OSError as error:
            return errno.errorcode[error.errno] if error.errno else type(error).__name__
    assert source[:2] == where, f"{source} instead of {where}"
    name: str = json.loads(data)["name"]
    return name


def _ask_all(questions: list[Asked]) -> list[str]:
    return [_ask(each) for each in questions]


def _questions(hosts: list[str], bounds: list[tuple[bool, bool]]) -> dict[Asked, str]:
    """Every kind of socket to every backend, and who has to answer."""
    return {
        Asked(kind, host, port + (kind != TCP), bound): name
        for name, port in NODE_PORTS.items()
        for host in hosts
        for bound in bounds
        for kind in KINDS
    }


def _wrong(world: World, expected: dict[Asked, str]) -> dict[Asked, str]:
    found = world.a.call(_ask_all, list(expected), timeout=120)
    return {asked: name for asked, name in zip(expected, found, strict=True) if name != expected[asked]}


def _documents(world: World) -> list[manifests.Document]:
    made: list[manifests.Document] = []

    def add(name: str, number: int, where: list[tuple[Any, str]], target: int = 0, **spec: Any) -> None:
        node_port = {**NODE_PORTS, "nobody": EMPTY, "closed-here": CLOSED_HERE}.get(name, number)
        ports = [
            {"name": "tcp", "port": 80, "protocol": "TCP", "nodePort": node_port},
            {"name": "udp", "port": 53, "protocol": "UDP", "nodePort": node_port + 1},
        ]
        targets = [
            {"name": "tcp", "port": target or 8080, "protocol": "TCP"},
            {"name": "udp", "port": target or 8053, "protocol": "UDP"},
        ]
        count = len(made)
        ips = [f"10.96.5.{count + 1}", f"fd00:10:96::5:{count + 1:x}"]
        made.append(manifests.service(name, type="NodePort", clusterIPs=ips, ports=ports, **spec))
        for field in ("address", "address6"):
            endpoints = [manifests.endpoint(getattr(space, field), node) for space, node in where]
            if endpoints:
                made.append(manifests.slice_of(name, endpoints, ports=targets))

    everywhere = [(world.w1, "node-a"), (world.w2, "node-b"), (world.a, "node-a")]
    add("w2", 0, [everywhere[1]])
    add("w1", 0, [everywhere[0]])
    add("host", 0, [everywhere[2]])
    add("nobody", 0, [])
    add("closed-here", 0, [everywhere[2]], 9)
    add("closed-in-pod", CLOSED_IN_POD, [everywhere[0]], 9)
    add("affine", AFFINE, everywhere, sessionAffinity="ClientIP")
    add("tunnelled", TUNNELLED, [(BehindTun(), "node-b")])
    return made


def _make(lab: Lab, *arguments: str) -> World:
    world = World(lab)
    servers.start(world.a, "host", 8080, 8053)
    manifests.write(world.manifests / "loopback.yaml", *_documents(world))
    world.agent(*arguments).start()
    return world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab() as lab:
        made = _make(lab)
        # A packet to a cluster IP leaves only where the default gateway has a link address.
        assert lab.outside
        yield made


# -- sockets that are bound


def test_a_socket_bound_to_the_loopbacks_address_is_served(world: World) -> None:
    """A socket bound to 127.0.0.1 reaches a NodePort at the loopback and at the node's address, by every backend."""
    hosts = ["127.0.0.1", "127.8.7.6", world.a.address, "::ffff:127.0.0.1"]
    assert not _wrong(world, _questions(hosts, [BY_ADDRESS]))


def test_a_socket_bound_to_the_loopbacks_ipv6_address_is_served(world: World) -> None:
    """A socket bound to ::1 reaches a NodePort at ::1 and at the node's address, wherever the backend is."""
    assert not _wrong(world, _questions(["::1", world.a.address6], [BY_ADDRESS]))


def test_a_socket_bound_to_the_loopback_device_is_served(world: World) -> None:
    """A socket with SO_BINDTODEVICE lo reaches NodePorts, with an address of the loopback or without one."""
    hosts = ["127.0.0.1", world.a.address, "::1", f"::ffff:{world.a.address}"]
    assert not _wrong(world, _questions(hosts, [BY_DEVICE, BY_BOTH]))


def test_by_the_loopback_device_the_kernel_has_no_route_to_the_nodes_own_ipv6_address(world: World) -> None:
    """Such a socket gets ENETUNREACH, at a NodePort as at a port that a process of the node has."""
    host = world.a.address6
    questions = [Asked(TCP, host, 8080, BY_DEVICE), Asked(TCP, host, NODE_PORTS["w2"], BY_DEVICE)]
    assert world.a.call(_ask_all, questions) == ["ENETUNREACH"] * 2


def _cluster_ip(bound: tuple[bool, bool]) -> str:
    return _ask(Asked(TCP, "10.96.5.1", 80, bound))


def test_a_cluster_ip_has_no_way_from_the_loopback(world: World) -> None:
    """From 127.0.0.1 no route leads to a cluster IP; kube-proxy does not serve that either."""
    assert world.a.call(_cluster_ip, BY_ADDRESS) == "EINVAL"


def _echo(host: str, port: int, bound: tuple[bool, bool], size: int) -> bool:
    with _socket(Asked(TCP, host, port, bound)) as sock:
        sock.connect((host, port))
        greeting = b""
        while not greeting.endswith(b"\n"):
            greeting += sock.recv(4096)
        data = bytes(i * 7 & 0xFF for i in range(size))
        sock.settimeout(10.0)
        got = bytearray()
        for at in range(0, size, 50_000):
            piece = data[at : at + 50_000]
            sock.sendall(piece)
            while len(got) < at + len(piece):
                chunk = sock.recv(1 << 16)
                if not chunk:
                    return False
                got += chunk
        return bytes(got) == data


@pytest.mark.parametrize("name", NODE_PORTS)
def test_data_passes_whole(world: World, name: str) -> None:
    """What is larger than a packet arrives as it was sent: the loopback's own packets have 64 KiB."""
    for host in ("127.0.0.1", "::1"):
        assert world.a.call(_echo, host, NODE_PORTS[name], BY_ADDRESS, 600_000), host


def test_who_is_bound_and_who_is_not_is_one_client(world: World) -> None:
    """With session affinity the host stays with its backend, whatever its sockets are bound to."""
    bounds = [(False, False), BY_ADDRESS, BY_DEVICE]
    questions = [Asked(TCP, "127.0.0.1", AFFINE, bound) for bound in bounds * 4]
    assert len(set(world.a.call(_ask_all, questions))) == 1


def _ask_behind_tun(host: str) -> str:
    """The answer that the backend behind a tun device gives; the device is made here, and the backend's part played."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun7", flags))  # TUNSETIFF
    for command in ("addr add 10.99.0.1/24", "addr add fd00:10:99::1/64 nodad"):
        subprocess.run(["ip", *command.split(), "dev", "tun7"], check=True)
    subprocess.run(["ip", "link", "set", "tun7", "up"], check=True)
    kind = IPv6 if ":" in host else IP
    deadline = time.monotonic() + 60
    # Until the programs are on the new device, its answers are not translated.
    while time.monotonic() < deadline:
        with _socket(Asked(UDP_SENDTO, host, TUNNELLED + 1, BY_ADDRESS)) as sock:
            sock.settimeout(0.2)
            sock.sendto(b"?", (host, TUNNELLED + 1))
            while select.select([tun], [], [], 0.2)[0]:
                packet = kind(os.read(tun, 2048))
                if UDP_LAYER in packet and packet[UDP_LAYER].dport == 8053:
                    ports = UDP_LAYER(sport=8053, dport=packet[UDP_LAYER].sport)
                    os.write(tun, raw(kind(src=packet.dst, dst=packet.src) / ports / b"tunnelled"))
            with suppress(TimeoutError):
                data, source = sock.recvfrom(64)
                assert source[:2] == (host, TUNNELLED + 1)
                return data.decode()
    raise TimeoutError("no answer")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_backend_behind_a_device_without_a_link_layer(world: World, host: str) -> None:
    """Answers that come without a link layer's header are put back at the loopback, which has one."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no tun device")
    assert world.a.call(_ask_behind_tun, host, timeout=90) == "tunnelled"


# -- nobody there


def test_without_an_endpoint_the_client_is_told_at_once(world: World) -> None:
    """A socket bound to the loopback is refused where the Service has no endpoint."""
    hosts = ["127.0.0.1", "::1", world.a.address, world.a.address6]
    asked = [(kind, port) for kind, port in ((TCP, EMPTY), (UDP, EMPTY + 1))]
    expected = {Asked(kind, host, port, BY_ADDRESS): "ECONNREFUSED" for kind, port in asked for host in hosts}
    assert not _wrong(world, expected)


def test_a_backends_refusal_reaches_the_client(world: World) -> None:
    """A RST or ICMP error of the backend, or of its host, is the client's at the loopback."""
    expected = {
        Asked(kind, host, port + (kind != TCP), bound): "ECONNREFUSED"
        for kind in (TCP, UDP)
        for host in ("127.0.0.1", "::1")
        for port in (CLOSED_HERE, CLOSED_IN_POD)
        for bound in (BY_ADDRESS, BY_DEVICE)
    }
    assert not _wrong(world, expected)


def _hold(port: int) -> list[str]:
    """Holds a connection of 127.0.0.1; its parent is told by lines. For a process of its own."""
    with _socket(Asked(TCP, "127.0.0.1", port, BY_ADDRESS)) as sock:
        sock.connect(("127.0.0.1", port))
        sock.recv(4096)
        print("ready", flush=True)
        sock.settimeout(30.0)
        for _ in sys.stdin:
            try:
                sock.sendall(b"x")
                print("alive" if sock.recv(16) else "closed", flush=True)
            except OSError as error:
                print(errno.errorcode.get(error.errno or 0, "timeout"), flush=True)
    return []


def test_a_connection_ends_when_its_backend_is_gone(world: World) -> None:
    """An endpoint that is removed ends the connection of a socket at the loopback; the next has another."""
    script = f"from tests.field.test_loopback import _hold; _hold({NODE_PORTS['w1']})"
    process = world.a.popen([sys.executable, "-c", script], stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def said() -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        return process.stdout.readline().decode().strip()

    assert said() == "alive"
    path = world.manifests / "loopback.yaml"
    before = manifests.read(path)
    after = [
        {**each, "endpoints": [manifests.endpoint(world.w2.address, "node-b")]}
        if each["kind"] == "EndpointSlice" and each["metadata"]["name"] == "w1-ipv4"
        else each
        for each in before
    ]
    manifests.write(path, *after)
    try:
        until(
            lambda: world.a.call(_ask, Asked(UDP, "127.0.0.1", NODE_PORTS["w1"] + 1, BY_ADDRESS)) == "w2",
            "a datagram goes to the backend that is there",
        )
        until(lambda: said() != "alive", "the connection goes on")
    finally:
        manifests.write(path, *before)
        process.terminate()
    until(
        lambda: world.a.call(_ask, Asked(TCP, "127.0.0.1", NODE_PORTS["w1"], BY_ADDRESS)) == "w1", "w1 again"
    )


# -- what no hook saw


def _wrong_unhooked(world: World, expected: dict[Asked, str]) -> dict[Asked, str]:
    """As :func:`_wrong`, for a process outside the served cgroup."""
    questions = [tuple(asked) for asked in expected]
    script = (
        "import json; from tests.field.test_loopback import Asked, _ask\n"
        f"print(json.dumps([_ask(Asked(*each)) for each in {questions!r}]))"
    )
    process = world.a.popen([sys.executable, "-c", script], join_cgroup=False, stdout=-1)
    found = json.loads(process.communicate(timeout=120)[0])
    return {asked: name for asked, name in zip(expected, found, strict=True) if name != expected[asked]}


def test_who_passes_no_hook_reaches_a_node_port_of_its_own_node(world: World) -> None:
    """A client of the host that no socket hook saw is served at the loopback and at the node's addresses."""
    hosts = ["127.0.0.1", "::1", world.a.address, world.a.address6]
    assert not _wrong_unhooked(world, _questions(hosts, [(False, False)]))


def test_who_passes_no_hook_reaches_a_backend_of_its_own_host(world: World) -> None:
    """Such a client reaches a cluster IP whose backend has the host's own network, too."""
    cluster_ips = next(
        each["spec"]["clusterIPs"]
        for each in manifests.read(world.manifests / "loopback.yaml")
        if each["kind"] == "Service" and each["metadata"]["name"] == "host"
    )
    expected = {
        Asked(kind, host, 80 if kind == TCP else 53, (False, False)): "host"
        for host in cluster_ips
        for kind in KINDS
    }
    assert not _wrong_unhooked(world, expected)


# -- what is none of a Service's


def _exchange(port: int) -> str:
    """A client whose own port is a NodePort asks a server of the host; both are bound to 127.0.0.1."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("127.0.0.1", 0))
        client.bind(("127.0.0.1", port))
        for each in (server, client):
            each.settimeout(2.0)
        client.sendto(b"?", server.getsockname())
        _, peer = server.recvfrom(16)
        server.sendto(b"!", peer)
        return client.recv(16).decode()


def test_an_answer_to_a_port_that_is_a_node_port_is_the_hosts_own(world: World) -> None:
    """A datagram that answers a process of the host is not taken for a Service's, whatever port it comes to."""
    assert world.a.call(_exchange, NODE_PORTS["w2"] + 1) == "!"


def _flows(world: World) -> set[str]:
    flows = json.loads(world.a.cli("conntrack", "list", "-o", "json"))
    return {f"{each['client']} {each['frontend']}" for each in flows}


def test_the_loopback_has_one_program_which_status_shows(world: World) -> None:
    """Programs are at the loopback's egress alone, and the host's other packets there make no flow."""
    status = json.loads(world.a.cli("status", "-o", "json"))
    found = [each for each in status["devices"] if each["device"] == "lo"]
    assert [(each["directions"], each["role"]) for each in found] == [(["egress"], "loopback")]
    assert not status["problems"]
    before = _flows(world)
    assert world.a.call(_ask, Asked(TCP, "127.0.0.1", 8080, BY_ADDRESS)) == "host"
    assert world.a.call(_ask, Asked(UDP_SENDTO, "::1", 8053, BY_ADDRESS)) == "host"
    assert _flows(world) <= before


def test_without_node_ports_on_the_loopback_nothing_is_there(world: World) -> None:
    """Once localhostNodePorts is off, the loopback has no program and no NodePort any more."""
    world.lab.agents[-1].stop()
    world.agent("--no-localhost-nodeports").start()
    status = json.loads(world.a.cli("status", "-o", "json"))
    assert "lo" not in [each["device"] for each in status["devices"]]
    assert not status["problems"]
    asked = Asked(TCP, "127.0.0.1", NODE_PORTS["w2"], BY_ADDRESS)
    assert world.a.call(_ask, asked) == "ECONNREFUSED"
    assert world.a.call(_ask, Asked(TCP, world.a.address, NODE_PORTS["host"], BY_ADDRESS)) == "host"


def test_without_tcx_a_filter_does_the_same() -> None:
    """Before Linux 6.6 the program is a clsact filter; it goes with the rest."""
    with Lab() as lab:
        world = _make(lab, "--without", "tcx")
        assert not _wrong(world, _questions(["127.0.0.1", "::1"], [BY_ADDRESS]))
        assert "ebpfproxy:" in world.a.run(["tc", "filter", "show", "dev", "lo", "egress"])
        lab.agents[-1].stop()
        world.a.cli("cleanup")
        assert "clsact" not in world.a.run(["tc", "qdisc", "show", "dev", "lo"])
