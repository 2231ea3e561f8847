"""NodePorts for processes of the node that connect from or to its loopback.

For comparison: netfilter's NAT with ``route_localnet``, as in kube-proxy's iptables mode, serves a socket that
is bound to 127.0.0.1. It serves one that is bound to ::1, or to the device lo, only if the backend is on the
host's network.
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
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as UDP_LAYER
from scapy.layers.inet6 import IPv6

from tests.e2e.two_node_cluster import TwoNodeCluster
from tests.field.remote import Remote
from tests.lab import Lab, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: NodePorts of TCP by the place of the only backend; the one of UDP is the next number.
NODE_PORTS = {"w2": 30180, "w1": 30280, "host": 30380}
EMPTY, CLOSED_HERE, CLOSED_IN_POD, AFFINE, TUNNELLED, SPREAD = 30480, 30580, 30680, 30780, 30880, 30980
#: Sockets are bound to an address of the loopback, to its device, or to both.
BY_ADDRESS, BY_DEVICE, BY_BOTH = (True, False), (False, True), (True, True)
TCP, UDP, UDP_SENDTO = "tcp", "udp", "udp sendto"
KINDS = (TCP, UDP, UDP_SENDTO)


class BehindTun(NamedTuple):
    """A backend behind a device without Ethernet headers."""

    address: str = "10.99.0.2"
    address6: str = "fd00:10:99::2"


class Request(NamedTuple):
    """A request; ``bound``: to an address of the loopback, to its device."""

    kind: str
    host: str
    port: int
    bound: tuple[bool, bool]


def _loopback_of(host: str) -> str:
    if host.startswith("::ffff:"):
        return "::ffff:127.0.0.1"
    return "::1" if ":" in host else "127.0.0.1"


def _socket(request: Request) -> socket.socket:
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if request.kind == TCP else socket.SOCK_DGRAM)
    sock.settimeout(2.0)
    by_address, by_device = request.bound
    if by_device:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    if by_address:
        sock.bind((_loopback_of(request.host), 0))
    return sock


def _ask(request: Request) -> str:
    """Returns the name of the backend or of the error; asserts that the peer is the requested address."""
    where = request.host, request.port
    with _socket(request) as sock:
        try:
            if request.kind == UDP_SENDTO:
                sock.sendto(b"?", where)
                data, source = sock.recvfrom(4096)
            else:
                sock.connect(where)
                source = sock.getpeername()
                if request.kind == UDP:
                    sock.send(b"?")
                data = sock.recv(4096)
        except OSError as error:
            return errno.errorcode[error.errno] if error.errno else type(error).__name__
    assert source[:2] == where, f"{source} instead of {where}"
    name: str = json.loads(data)["name"]
    return name


def _ask_all(requests: list[Request]) -> list[str]:
    return [_ask(each) for each in requests]


def _requests(hosts: list[str], bounds: list[tuple[bool, bool]]) -> dict[Request, str]:
    """Requests by each kind of socket to each backend, with the expected backend."""
    return {
        Request(kind, host, port + (kind != TCP), bound): name
        for name, port in NODE_PORTS.items()
        for host in hosts
        for bound in bounds
        for kind in KINDS
    }


def _wrong(cluster: TwoNodeCluster, expected: dict[Request, str]) -> dict[Request, str]:
    found = cluster.a.call(_ask_all, list(expected), timeout=120)
    return {request: name for request, name in zip(expected, found, strict=True) if name != expected[request]}


def _documents(cluster: TwoNodeCluster) -> list[manifests.Document]:
    made: list[manifests.Document] = []

    def add(name: str, number: int, where: list[tuple[Any, str]], target: int = 0, **spec: Any) -> None:
        node_port = {**NODE_PORTS, "no-endpoint": EMPTY, "closed-here": CLOSED_HERE}.get(name, number)
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

    everywhere = [(cluster.w1, "node-a"), (cluster.w2, "node-b"), (cluster.a, "node-a")]
    add("w2", 0, [everywhere[1]])
    add("w1", 0, [everywhere[0]])
    add("host", 0, [everywhere[2]])
    add("no-endpoint", 0, [])
    add("closed-here", 0, [everywhere[2]], 9)
    add("closed-in-pod", CLOSED_IN_POD, [everywhere[0]], 9)
    add("affine", AFFINE, everywhere, sessionAffinity="ClientIP")
    add("spread", SPREAD, everywhere)
    add("tunnelled", TUNNELLED, [(BehindTun(), "node-b")])
    return made


def _make(lab: Lab, *arguments: str) -> TwoNodeCluster:
    cluster = TwoNodeCluster(lab)
    servers.start(cluster.a, "host", 8080, 8053)
    manifests.write(cluster.manifests / "loopback.yaml", *_documents(cluster))
    cluster.agent(*arguments).start()
    return cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodeCluster]:
    with Lab() as lab:
        made = _make(lab)
        # A packet to a cluster IP is sent only if the MAC address of the default gateway is known.
        assert lab.outside
        yield made


# -- bound sockets


def test_socket_bound_to_127_0_0_1_is_served(cluster: TwoNodeCluster) -> None:
    """NodePorts are served at loopback addresses and at the node's address, with each place of the backend."""
    hosts = ["127.0.0.1", "127.8.7.6", cluster.a.address, "::ffff:127.0.0.1"]
    assert not _wrong(cluster, _requests(hosts, [BY_ADDRESS]))


def test_socket_bound_to_ipv6_loopback_is_served(cluster: TwoNodeCluster) -> None:
    """NodePorts are served at ::1 and at the node's address, with each place of the backend."""
    assert not _wrong(cluster, _requests(["::1", cluster.a.address6], [BY_ADDRESS]))


def test_socket_bound_to_the_device_lo_is_served(cluster: TwoNodeCluster) -> None:
    """NodePorts are served to sockets with SO_BINDTODEVICE lo, bound to a loopback address or not."""
    hosts = ["127.0.0.1", cluster.a.address, "::1", f"::ffff:{cluster.a.address}"]
    assert not _wrong(cluster, _requests(hosts, [BY_DEVICE, BY_BOTH]))


def test_socket_bound_to_lo_gets_enetunreach_at_the_ipv6_address_of_the_node(cluster: TwoNodeCluster) -> None:
    """The kernel has no such route, for a NodePort as for a port of a process of the node."""
    host = cluster.a.address6
    requests = [Request(TCP, host, 8080, BY_DEVICE), Request(TCP, host, NODE_PORTS["w2"], BY_DEVICE)]
    assert cluster.a.call(_ask_all, requests) == ["ENETUNREACH"] * 2


def _cluster_ip(bound: tuple[bool, bool]) -> str:
    return _ask(Request(TCP, "10.96.5.1", 80, bound))


def test_cluster_ip_is_not_served_from_a_loopback_source(cluster: TwoNodeCluster) -> None:
    """The kernel has no route from 127.0.0.1 to a cluster IP; kube-proxy does not serve it either."""
    assert cluster.a.call(_cluster_ip, BY_ADDRESS) == "EINVAL"


def _echo(host: str, port: int, bound: tuple[bool, bool], size: int) -> bool:
    with _socket(Request(TCP, host, port, bound)) as sock:
        sock.connect((host, port))
        greeting = b""
        while not greeting.endswith(b"\n"):
            greeting += sock.recv(4096)
        data = bytes(i * 7 & 0xFF for i in range(size))
        sock.settimeout(10.0)
        got = bytearray()
        for at in range(0, size, 50_000):
            part = data[at : at + 50_000]
            sock.sendall(part)
            while len(got) < at + len(part):
                chunk = sock.recv(1 << 16)
                if not chunk:
                    return False
                got += chunk
        return bytes(got) == data


@pytest.mark.parametrize("name", NODE_PORTS)
def test_data_larger_than_a_packet_is_intact(cluster: TwoNodeCluster, name: str) -> None:
    """Packets on lo have up to 64 KiB, more than the MTU of the devices towards backends."""
    for host in ("127.0.0.1", "::1"):
        assert cluster.a.call(_echo, host, NODE_PORTS[name], BY_ADDRESS, 600_000), host


def test_affinity_is_shared_by_bound_and_unbound_sockets_of_the_host(cluster: TwoNodeCluster) -> None:
    """With session affinity the host is one client, whatever its sockets are bound to."""
    bounds = [(False, False), BY_ADDRESS, BY_DEVICE]
    requests = [Request(TCP, "127.0.0.1", AFFINE, bound) for bound in bounds * 4]
    assert len(set(cluster.a.call(_ask_all, requests))) == 1


def _ask_behind_tun(host: str) -> str:
    """Creates a tun device and replies on it as the backend; returns the data that the client receives."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun7", flags))  # TUNSETIFF
    for command in ("addr add 10.99.0.1/24", "addr add fd00:10:99::1/64 nodad"):
        subprocess.run(["ip", *command.split(), "dev", "tun7"], check=True)
    subprocess.run(["ip", "link", "set", "tun7", "up"], check=True)
    kind = IPv6 if ":" in host else IP
    deadline = time.monotonic() + 60
    # Replies are not translated until the programs are attached to the new device.
    while time.monotonic() < deadline:
        with _socket(Request(UDP_SENDTO, host, TUNNELLED + 1, BY_ADDRESS)) as sock:
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
    raise TimeoutError("no reply")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_loopback_client_of_a_backend_behind_a_tun_device(cluster: TwoNodeCluster, host: str) -> None:
    """Replies have no Ethernet header, and get one before they are redirected to lo."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no tun device")
    assert cluster.a.call(_ask_behind_tun, host, timeout=90) == "tunnelled"


# -- no endpoint


def test_no_endpoint_refuses_sockets_bound_to_loopback(cluster: TwoNodeCluster) -> None:
    """connect() and send() of sockets that are bound to a loopback address fail with ECONNREFUSED."""
    hosts = ["127.0.0.1", "::1", cluster.a.address, cluster.a.address6]
    request = [(kind, port) for kind, port in ((TCP, EMPTY), (UDP, EMPTY + 1))]
    expected = {
        Request(kind, host, port, BY_ADDRESS): "ECONNREFUSED" for kind, port in request for host in hosts
    }
    assert not _wrong(cluster, expected)


def test_rst_and_icmp_errors_of_the_backend_reach_the_loopback_client(cluster: TwoNodeCluster) -> None:
    """An RST or ICMP error of the backend is translated and makes the client's call fail."""
    expected = {
        Request(kind, host, port + (kind != TCP), bound): "ECONNREFUSED"
        for kind in (TCP, UDP)
        for host in ("127.0.0.1", "::1")
        for port in (CLOSED_HERE, CLOSED_IN_POD)
        for bound in (BY_ADDRESS, BY_DEVICE)
    }
    assert not _wrong(cluster, expected)


def _hold(port: int) -> list[str]:
    """Keeps a connection from 127.0.0.1 open, and prints its state for each line of input."""
    with _socket(Request(TCP, "127.0.0.1", port, BY_ADDRESS)) as sock:
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


def test_connection_from_loopback_is_closed_when_its_backend_is_removed(cluster: TwoNodeCluster) -> None:
    """The next connection gets another backend."""
    script = f"from tests.field.test_loopback import _hold; _hold({NODE_PORTS['w1']})"
    process = cluster.a.popen([sys.executable, "-c", script], stdin=-1, stdout=-1)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    def state() -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        return process.stdout.readline().decode().strip()

    assert state() == "alive"
    path = cluster.manifests / "loopback.yaml"
    before = manifests.read(path)
    after = [
        {**each, "endpoints": [manifests.endpoint(cluster.w2.address, "node-b")]}
        if each["kind"] == "EndpointSlice" and each["metadata"]["name"] == "w1-ipv4"
        else each
        for each in before
    ]
    manifests.write(path, *after)
    try:
        until(
            lambda: cluster.a.call(_ask, Request(UDP, "127.0.0.1", NODE_PORTS["w1"] + 1, BY_ADDRESS)) == "w2",
            "datagrams do not go to the remaining backend",
        )
        until(lambda: state() != "alive", "the connection is still open")
    finally:
        manifests.write(path, *before)
        process.terminate()
    until(
        lambda: cluster.a.call(_ask, Request(TCP, "127.0.0.1", NODE_PORTS["w1"], BY_ADDRESS)) == "w1",
        "the added backend gets no connection",
    )


def _backends_of(cluster: TwoNodeCluster, port: int) -> set[str]:
    rows = json.loads(cluster.a.cli("service", "list", "-o", "json"))
    found = [row["backends"] for row in rows if row["frontend"].split("/")[0].endswith(f":{port}")]
    return {each["address"].rpartition(":")[0].strip("[]") for backends in found for each in backends}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_datagrams_from_loopback_keep_their_backend_when_another_one_is_removed(
    cluster: TwoNodeCluster, host: str
) -> None:
    """As from every other address: only those whose backend has left go to another one."""
    path, removed, port = (
        cluster.manifests / "loopback.yaml",
        (cluster.a.address, cluster.a.address6),
        SPREAD + 1,
    )
    before = manifests.read(path)
    after = [
        {**each, "endpoints": [end for end in each["endpoints"] if end["addresses"][0] not in removed]}
        if each["kind"] == "EndpointSlice" and each["metadata"]["name"].startswith("spread-")
        else each
        for each in before
    ]
    with ExitStack() as stack:
        sockets = [stack.enter_context(Remote(cluster.a, host)) for _ in range(16)]
        for each in sockets:
            each.bind(host, 0)
        asked = [each.ask_at(host, port) for each in sockets]
        assert set(asked) <= {"w1", "w2", "host"}
        manifests.write(path, *after)
        try:
            until(lambda: len(_backends_of(cluster, port)) == 4, "the endpoint is not removed")
            asked_again = [each.ask_at(host, port) for each in sockets]
        finally:
            manifests.write(path, *before)
        stay = [(old, new) for old, new in zip(asked, asked_again, strict=True) if old != "host"]
        assert stay and all(old == new for old, new in stay), stay
        assert set(asked_again) <= {"w1", "w2"}
    until(lambda: len(_backends_of(cluster, port)) == 6)


# -- clients without a socket hook


def _wrong_unhooked(cluster: TwoNodeCluster, expected: dict[Request, str]) -> dict[Request, str]:
    """As :func:`_wrong`, for a process outside the agent's cgroup."""
    requests = [tuple(request) for request in expected]
    script = (
        "import json; from tests.field.test_loopback import Request, _ask\n"
        f"print(json.dumps([_ask(Request(*each)) for each in {requests!r}]))"
    )
    process = cluster.a.popen([sys.executable, "-c", script], join_cgroup=False, stdout=-1)
    found = json.loads(process.communicate(timeout=120)[0])
    return {request: name for request, name in zip(expected, found, strict=True) if name != expected[request]}


def test_host_client_without_a_hook_reaches_node_ports_of_its_node(cluster: TwoNodeCluster) -> None:
    """Its packets are translated at egress of lo, to loopback addresses and to those of the node."""
    hosts = ["127.0.0.1", "::1", cluster.a.address, cluster.a.address6]
    assert not _wrong_unhooked(cluster, _requests(hosts, [(False, False)]))


def test_host_client_without_a_hook_reaches_a_host_network_backend(cluster: TwoNodeCluster) -> None:
    """A cluster IP with such a backend is served to a process outside the agent's cgroup."""
    cluster_ips = next(
        each["spec"]["clusterIPs"]
        for each in manifests.read(cluster.manifests / "loopback.yaml")
        if each["kind"] == "Service" and each["metadata"]["name"] == "host"
    )
    expected = {
        Request(kind, host, 80 if kind == TCP else 53, (False, False)): "host"
        for host in cluster_ips
        for kind in KINDS
    }
    assert not _wrong_unhooked(cluster, expected)


# -- other packets


def _exchange(port: int) -> str:
    """A client on a NodePort number sends to a server of the host; both are bound to 127.0.0.1."""
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


def test_reply_to_a_host_socket_on_a_node_port_number_is_not_translated(cluster: TwoNodeCluster) -> None:
    """A datagram to a socket of the host on the number of a NodePort is not sent to a backend."""
    assert cluster.a.call(_exchange, NODE_PORTS["w2"] + 1) == "!"


def _flows(cluster: TwoNodeCluster) -> set[str]:
    flows = json.loads(cluster.a.cli("conntrack", "list", "-o", "json"))
    return {f"{each['client']} {each['frontend']}" for each in flows}


def _devices(cluster: TwoNodeCluster) -> list[dict[str, Any]]:
    """Once ``status`` knows of no problem: the record of a start is written after the log's line."""
    until(lambda: not json.loads(cluster.a.cli("status", "-o", "json"))["problems"], "problems")
    return list(json.loads(cluster.a.cli("status", "-o", "json"))["devices"])


def test_lo_has_one_egress_program_and_other_packets_create_no_flow(cluster: TwoNodeCluster) -> None:
    """Packets on lo that belong to no Service create no conntrack entry."""
    found = [each for each in _devices(cluster) if each["device"] == "lo"]
    assert [(each["directions"], each["role"]) for each in found] == [(["egress"], "loopback")]
    before = _flows(cluster)
    assert cluster.a.call(_ask, Request(TCP, "127.0.0.1", 8080, BY_ADDRESS)) == "host"
    assert cluster.a.call(_ask, Request(UDP_SENDTO, "::1", 8053, BY_ADDRESS)) == "host"
    assert _flows(cluster) <= before


def test_no_localhost_node_ports_detaches_the_program_of_lo(cluster: TwoNodeCluster) -> None:
    """With localhostNodePorts off, lo has no program and serves no NodePort."""
    cluster.lab.agents[-1].stop()
    cluster.agent("--no-localhost-nodeports").start()
    assert "lo" not in [each["device"] for each in _devices(cluster)]
    request = Request(TCP, "127.0.0.1", NODE_PORTS["w2"], BY_ADDRESS)
    assert cluster.a.call(_ask, request) == "ECONNREFUSED"
    assert cluster.a.call(_ask, Request(TCP, cluster.a.address, NODE_PORTS["host"], BY_ADDRESS)) == "host"


def test_loopback_node_ports_with_a_clsact_filter() -> None:
    """Before Linux 6.6 the program is a clsact filter, which ``cleanup`` removes."""
    with Lab() as lab:
        cluster = _make(lab, "--without", "tcx")
        assert not _wrong(cluster, _requests(["127.0.0.1", "::1"], [BY_ADDRESS]))
        assert "ebpfproxy:" in cluster.a.run(["tc", "filter", "show", "dev", "lo", "egress"])
        lab.agents[-1].stop()
        cluster.a.cli("cleanup")
        assert "clsact" not in cluster.a.run(["tc", "qdisc", "show", "dev", "lo"])
