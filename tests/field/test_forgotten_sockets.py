"""The sweep of records of sockets that are closed without a program call: removed and subtracted once."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.two_node_cluster import EXTERNAL, SERVICE_IPS, TwoNodeCluster
from tests.field.records import fill, maps_of, open_sockets, origins
from tests.field.remote import Remote
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IPPROTO_MPTCP = 262
#: Sockets of datagrams use UDP, and UDP-Lite where the kernel has it.
DATAGRAM_PROTOCOLS = (0, *([clients.UDPLITE] if clients.has_udp_lite() else []))
HOST = SERVICE_IPS["v4"]
#: A Service whose only endpoint the client has no route to.
UNREACHABLE, UNREACHABLE_ENDPOINT = "10.96.0.60", "10.244.9.9"
#: A Service with an endpoint on whose port no socket listens.
CLOSED = {"v4": "10.96.0.61", "v6": "fd00:10:96::61", "mapped": "::ffff:10.96.0.61"}
#: Enters a namespace, connects there and leaves it: only the socket and a descriptor hold it.
HOLDS = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None)
home = os.open("/proc/self/ns/net", os.O_RDONLY)
there = os.open("/run/netns/" + sys.argv[1], os.O_RDONLY)
assert libc.setns(there, 0x40000000) == 0
sock = socket.create_connection((sys.argv[2], 80))
assert libc.setns(home, 0x40000000) == 0
print("ready", flush=True)
for _ in sys.stdin:
    print(*sock.getpeername(), flush=True)
"""


class SweepCluster(TwoNodeCluster):
    """The agent runs with ``--without mptcp``, so that no program is called when an MPTCP subflow closes."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        port = {"name": "udp", "port": 53, "protocol": "UDP"}
        manifests.write(
            self.manifests / "unreachable.yaml",
            manifests.service("unreachable", clusterIPs=[UNREACHABLE], ports=[port]),
            manifests.slice_of(
                "unreachable", [manifests.endpoint(UNREACHABLE_ENDPOINT, "node-b")], ports=[port]
            ),
        )
        http = {"name": "http", "port": 80, "protocol": "TCP"}
        manifests.write(
            self.manifests / "closed.yaml",
            manifests.service("closed", clusterIPs=[CLOSED["v4"], CLOSED["v6"]], ports=[http]),
            *(
                manifests.slice_of("closed", [manifests.endpoint(a, "node-a")], ports=[{**http, "port": 9}])
                for a in (self.w1.address, self.w1.address6)
            ),
        )

    def sweeping_agent(self, *arguments: str) -> Agent:
        return self.agent("--socket-sweep-seconds", "0.2", "--without", "mptcp", *arguments)

    def connected(self, space: Space, host: str, kind: str) -> Remote:
        """A socket that is connected to the Service; ``kind`` is ``tcp``, ``udp`` or ``mptcp``."""
        is_udp = kind == "udp"
        made = Remote(
            space,
            host,
            protocol=IPPROTO_MPTCP if kind == "mptcp" else 0,
            kind=socket.SOCK_DGRAM if is_udp else socket.SOCK_STREAM,
        )
        assert made.connect(host, 53 if is_udp else 80) is None
        return made

    def records(self) -> tuple[int, int]:
        """The number of records of connected sockets, and of counted open connections."""
        return origins(self.a)[0], open_sockets(self.a)

    def wait_sweeps(self) -> None:
        """Waits until sweeps have removed the record of a socket that is closed here."""
        before = self.records()
        self.connected(self.client, HOST, "mptcp").close()
        assert self.records() == (before[0] + 1, before[1] + 1)
        until(lambda: self.records() == before, "the record of a closed socket is left")

    def removed(self, name: str) -> int:
        _, text = self.lab.agents[-1].http("/metrics", 10249)
        sample = f'ebpfproxy_socket_records_removed_total{{map="{name}"}} '
        return int(float(text.partition(sample)[2].partition("\n")[0]))


@pytest.fixture(scope="module")
def cluster() -> Iterator[SweepCluster]:
    with Lab() as lab:
        found = SweepCluster(lab)
        found.sweeping_agent().start()
        yield found


@pytest.fixture(params=SERVICE_IPS)
def host(request: pytest.FixtureRequest) -> str:
    return SERVICE_IPS[request.param]


@pytest.mark.parametrize("where", ["pod", "host"])
def test_record_of_an_mptcp_subflow_is_removed_after_close(
    cluster: SweepCluster, host: str, where: str
) -> None:
    """A subflow is a socket of the kernel. While it is open it is counted, and sock_diag lists it."""
    before = cluster.removed("sock_origin")
    with cluster.connected(cluster.client if where == "pod" else cluster.a, host, "mptcp"):
        cluster.wait_sweeps()
        assert cluster.records() == (1, 1)
    until(lambda: cluster.records() == (0, 0), "the record of a closed socket is left")
    until(lambda: cluster.removed("sock_origin") == before + 2, "the metric does not count it")


def test_records_of_open_sockets_are_kept(cluster: SweepCluster, host: str) -> None:
    """TCP, connected and unconnected UDP, and UDP-Lite sockets, in a pod and on the host."""
    with ExitStack() as stack:
        for space in (cluster.client, cluster.a):
            for kind in ("tcp", "udp"):
                stack.enter_context(cluster.connected(space, host, kind))
            for protocol in DATAGRAM_PROTOCOLS:
                sender = stack.enter_context(Remote(space, host, protocol=protocol))
                assert sender.sendto(host, 53) is None
        senders = 2 * len(DATAGRAM_PROTOCOLS)
        assert origins(cluster.a) == (4, senders)
        cluster.wait_sweeps()
        assert (cluster.records(), origins(cluster.a)) == ((4, 4), (4, senders))
    until(lambda: cluster.records() == (0, 0) and origins(cluster.a) == (0, 0), "records are left")


@pytest.mark.parametrize("where", ["pod", "host"])
def test_disconnected_socket_is_not_counted_and_can_connect_again(
    cluster: SweepCluster, host: str, where: str
) -> None:
    with cluster.connected(cluster.client if where == "pod" else cluster.a, host, "udp") as sock:
        assert sock.disconnect() is None
        until(lambda: cluster.records() == (0, 0), "the connection is still counted")
        assert sock.connect(host, 53) is None
        cluster.wait_sweeps()
        assert cluster.records() == (1, 1)
        assert sock.peer() == [host, 53]
    until(lambda: cluster.records() == (0, 0), "the record of a closed socket is left")


def test_failed_second_connect_is_not_counted(cluster: SweepCluster) -> None:
    """The socket keeps its first peer; the unreachable backend has no connection."""
    cluster.client.run(["ip", "route", "replace", "unreachable", UNREACHABLE_ENDPOINT])
    with cluster.connected(cluster.client, HOST, "udp") as sock:
        assert sock.connect(UNREACHABLE, 53) == "EHOSTUNREACH"
        until(lambda: cluster.records() == (0, 0), "the connection is still counted")
        assert sock.ask() in ("w1", "w2")
    cluster.wait_sweeps()
    assert cluster.records() == (0, 0)


@pytest.mark.parametrize("family", CLOSED)
def test_socket_that_failed_to_connect_is_not_counted_and_can_connect_again(
    cluster: SweepCluster, family: str
) -> None:
    with Remote(cluster.client, CLOSED[family], kind=socket.SOCK_STREAM) as sock:
        assert sock.connect(CLOSED[family], 80) == "ECONNREFUSED"
        until(lambda: cluster.records() == (0, 0), "the connection is still counted")
        assert sock.connect(SERVICE_IPS[family], 80) is None
        cluster.wait_sweeps()
        assert cluster.records() == (1, 1)
    until(lambda: cluster.records() == (0, 0), "the record of a closed socket is left")


def test_records_of_a_namespace_held_by_a_descriptor_are_kept(cluster: SweepCluster) -> None:
    """The namespace has no path, so that its sockets cannot be listed; the connection is still open."""
    pod = cluster.a.pod("unlinked")
    command = [sys.executable, "-c", HOLDS, pod.netns, HOST]
    process = cluster.a.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    cluster.wait_sweeps()
    subprocess.run(["ip", "netns", "delete", pod.netns], check=True)
    cluster.lab._names.remove(pod.netns)
    cluster.wait_sweeps()
    cluster.wait_sweeps()
    assert cluster.records() == (1, 1)
    process.stdin.write(b"?\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{HOST} 80\n".encode()
    process.kill()
    process.wait()
    until(lambda: cluster.records() == (0, 0), "the record of a closed socket is left")


def test_records_of_a_deleted_namespace_are_removed(cluster: SweepCluster) -> None:
    """The netnsid of the namespace is removed with it."""
    pod = cluster.a.pod("short")
    sock = cluster.connected(pod, HOST, "mptcp")
    cluster.wait_sweeps()
    subprocess.run(["ip", "netns", "delete", pod.netns], check=True)
    cluster.lab._names.remove(pod.netns)
    sock.close()
    until(lambda: cluster.records() == (0, 0), "the record of a closed socket is left")


def test_records_of_sockets_closed_without_sock_release_are_removed(cluster: SweepCluster) -> None:
    """Sockets that are opened and closed between two copies of the maps are in the same state."""
    agent = cluster.lab.agents[-1]
    agent.stop()
    cluster.agent().start()
    with ExitStack() as stack:
        for host in SERVICE_IPS.values():
            for kind in ("tcp", "udp", "mptcp"):
                stack.enter_context(cluster.connected(cluster.client, host, kind))
            for protocol in DATAGRAM_PROTOCOLS:
                sender = stack.enter_context(Remote(cluster.client, host, protocol=protocol))
                assert sender.sendto(host, 53) is None
                assert sender.sendto(EXTERNAL if host == HOST else host, 53) is None
        cluster.lab.agents[-1].stop()
        (cluster.a.bpf_root / "ebpfproxy" / "links" / "sock_release").unlink()
        # The kernel detaches the program of a link that nobody holds a moment later.
        shown = ["bpftool", "cgroup", "show", str(cluster.a.cgroup)]
        until(lambda: "sock_release" not in cluster.a.run(shown), "the program stays attached")
    assert cluster.records() == (9, 9)
    unconnected = 3 * len(DATAGRAM_PROTOCOLS)
    peers = len(DATAGRAM_PROTOCOLS)
    elsewhere = fill(cluster.a, "sock_peers"), fill(cluster.a, "mptcp_subflows")
    assert (origins(cluster.a)[1], *elsewhere) == (unconnected, peers, 3)
    cluster.sweeping_agent().start()
    until(lambda: cluster.records() == (0, 0), "records of closed sockets are left")
    until(lambda: origins(cluster.a) == (0, 0), "records of closed sockets are left")
    until(lambda: not fill(cluster.a, "sock_peers") + fill(cluster.a, "mptcp_subflows"), "records are left")
    names = ("sock_origin", "sock_peers", "mptcp_subflows")
    until(lambda: [cluster.removed(name) for name in names] == [9 + unconnected, peers, 3])


def test_each_connection_is_subtracted_once(cluster: SweepCluster) -> None:
    """Sweeps run concurrently with connect() and close()."""
    assert cluster.client.call(_disconnect_and_close, HOST, 4.0) > 100
    until(lambda: cluster.records()[0] == 0, "records of closed sockets are left")
    with maps_of(cluster.a) as maps:
        loads = maps.loads()
        sums = {
            (each.sockets_opened - each.sockets_closed + each.sockets_carried) & 0xFFFFFFFF
            for each in map(loads.__getitem__, range(64))
        }
    assert sums == {0}


def _disconnect_and_close(host: str, seconds: float) -> int:
    """Opens sockets and disconnects them; later they connect again or are closed. Returns the count."""
    held: list[tuple[float, socket.socket]] = []
    end, turns = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for _ in range(20):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.connect((host, 53))
            _disconnect(sock)
            held.append((time.monotonic() + int.from_bytes(os.urandom(1), "big") / 256, sock))
        time.sleep(0.02)
        due = [each for each in held if each[0] < time.monotonic()]
        held = [each for each in held if each not in due]
        for i, (_, sock) in enumerate(due):
            turns += 1
            if i % 2:
                sock.connect((host, 53))
            sock.close()
    return turns


def _disconnect(sock: socket.socket) -> None:
    assert ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16) == 0
