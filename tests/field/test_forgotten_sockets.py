"""Records of sockets whose end no program sees are removed, counted down once, and no others are."""

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

from ebpfproxy.datapath.abi import layout
from tests.e2e.world import SERVICE_IPS, World
from tests.field.records import fill, maps_of, open_sockets
from tests.field.remote import Remote
from tests.lab import Agent, Lab, manifests
from tests.lab.spaces import Space
from tests.lab.waiting import until

pytestmark = pytest.mark.root

IPPROTO_MPTCP = 262
HOST = SERVICE_IPS["v4"]
#: A Service whose only endpoint the client has no way to.
FAR, NOWHERE = "10.96.0.60", "10.244.9.9"
#: One whose endpoint has nobody who listens.
SHUT = {"v4": "10.96.0.61", "v6": "fd00:10:96::61", "mapped": "::ffff:10.96.0.61"}
#: Enters a namespace, connects there, and leaves it: nothing but the socket and a descriptor are of it then.
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


class Forgetful(World):
    """Its agent has no way from an MPTCP socket to its subflow: no program sees the end of those."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        port = {"name": "udp", "port": 53, "protocol": "UDP"}
        manifests.write(
            self.manifests / "far.yaml",
            manifests.service("far", clusterIPs=[FAR], ports=[port]),
            manifests.slice_of("far", [manifests.endpoint(NOWHERE, "node-b")], ports=[port]),
        )
        http = {"name": "http", "port": 80, "protocol": "TCP"}
        manifests.write(
            self.manifests / "shut.yaml",
            manifests.service("shut", clusterIPs=[SHUT["v4"], SHUT["v6"]], ports=[http]),
            *(
                manifests.slice_of("shut", [manifests.endpoint(a, "node-a")], ports=[{**http, "port": 9}])
                for a in (self.w1.address, self.w1.address6)
            ),
        )

    def forgetful(self, *arguments: str) -> Agent:
        return self.agent("--socket-sweep-seconds", "0.2", "--without", "mptcp", *arguments)

    def connected(self, space: Space, host: str, kind: str) -> Remote:
        """A socket that has asked for the Service: ``tcp``, ``udp`` or ``mptcp``."""
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
        """Of connected sockets, and how many connections are counted as open."""
        return fill(self.a, "sock_origin"), open_sockets(self.a)

    def wait_sweeps(self) -> None:
        """Until sweeps have removed the record of a socket that was closed now."""
        before = self.records()
        self.connected(self.client, HOST, "mptcp").close()
        assert self.records() == (before[0] + 1, before[1] + 1)
        until(lambda: self.records() == before, "the record of a closed socket stays")

    def removed(self, name: str) -> int:
        _, text = self.lab.agents[-1].http("/metrics", 10249)
        sample = f'ebpfproxy_socket_records_removed_total{{map="{name}"}} '
        return int(float(text.partition(sample)[2].partition("\n")[0]))


@pytest.fixture(scope="module")
def world() -> Iterator[Forgetful]:
    with Lab() as lab:
        found = Forgetful(lab)
        found.forgetful().start()
        yield found


@pytest.fixture(params=SERVICE_IPS)
def host(request: pytest.FixtureRequest) -> str:
    return SERVICE_IPS[request.param]


@pytest.mark.parametrize("where", ["pod", "host"])
def test_a_kernels_own_socket_is_forgotten_once_it_is_closed(world: Forgetful, host: str, where: str) -> None:
    """A subflow of MPTCP is one: while it is there it is counted, and sock_diag shows it."""
    before = world.removed("sock_origin")
    with world.connected(world.client if where == "pod" else world.a, host, "mptcp"):
        world.wait_sweeps()
        assert world.records() == (1, 1)
    until(lambda: world.records() == (0, 0), "the record of a closed socket stays")
    until(lambda: world.removed("sock_origin") == before + 2, "the metric does not show it")


def test_what_is_connected_or_has_sent_keeps_its_record(world: Forgetful, host: str) -> None:
    """TCP, UDP, connected or not, UDP-Lite, and a connection that is being opened, in a pod and on the host."""
    with ExitStack() as stack:
        for space in (world.client, world.a):
            for kind in ("tcp", "udp"):
                stack.enter_context(world.connected(space, host, kind))
            for protocol in (0, socket.IPPROTO_UDPLITE):
                sender = stack.enter_context(Remote(space, host, protocol=protocol))
                assert sender.sendto(host, 53) is None
        assert fill(world.a, "sock_peers") == 4
        world.wait_sweeps()
        assert (world.records(), fill(world.a, "sock_peers")) == ((4, 4), 4)
    until(lambda: world.records() == (0, 0) and fill(world.a, "sock_peers") == 0, "records stay")


@pytest.mark.parametrize("where", ["pod", "host"])
def test_a_disconnected_socket_is_counted_no_more_and_may_connect_again(
    world: Forgetful, host: str, where: str
) -> None:
    with world.connected(world.client if where == "pod" else world.a, host, "udp") as sock:
        assert sock.disconnect() is None
        until(lambda: world.records() == (0, 0), "it is still counted")
        assert sock.connect(host, 53) is None
        world.wait_sweeps()
        assert world.records() == (1, 1)
        assert sock.peer() == [host, 53]
    until(lambda: world.records() == (0, 0), "the record of a closed socket stays")


def test_a_second_connect_that_fails_counts_for_nobody(world: Forgetful) -> None:
    """The socket keeps its first peer; the backend that it could not reach has no connection."""
    world.client.run(["ip", "route", "replace", "unreachable", NOWHERE])
    with world.connected(world.client, HOST, "udp") as sock:
        assert sock.connect(FAR, 53) == "EHOSTUNREACH"
        until(lambda: world.records() == (0, 0), "it is still counted")
        assert sock.ask() in ("w1", "w2")
    world.wait_sweeps()
    assert world.records() == (0, 0)


@pytest.mark.parametrize("family", SHUT)
def test_one_that_failed_to_connect_is_counted_no_more_and_may_try_again(
    world: Forgetful, family: str
) -> None:
    with Remote(world.client, SHUT[family], kind=socket.SOCK_STREAM) as sock:
        assert sock.connect(SHUT[family], 80) == "ECONNREFUSED"
        until(lambda: world.records() == (0, 0), "it is still counted")
        assert sock.connect(SERVICE_IPS[family], 80) is None
        world.wait_sweeps()
        assert world.records() == (1, 1)
    until(lambda: world.records() == (0, 0), "the record of a closed socket stays")


def test_a_namespace_that_only_a_descriptor_holds_keeps_its_records(world: Forgetful) -> None:
    """It cannot be looked into any more, and its connection lives: nothing is known to be over."""
    pod = world.a.pod("hidden")
    command = [sys.executable, "-c", HOLDS, pod.netns, HOST]
    process = world.a.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    world.wait_sweeps()
    subprocess.run(["ip", "netns", "delete", pod.netns], check=True)
    world.lab._names.remove(pod.netns)
    world.wait_sweeps()
    world.wait_sweeps()
    assert world.records() == (1, 1)
    process.stdin.write(b"?\n")
    process.stdin.flush()
    assert process.stdout.readline() == f"{HOST} 80\n".encode()
    process.kill()
    process.wait()
    until(lambda: world.records() == (0, 0), "the record of a closed socket stays")


def test_a_namespace_that_has_ended_leaves_no_record(world: Forgetful) -> None:
    """Its id in the host's namespace ends with it."""
    pod = world.a.pod("short")
    sock = world.connected(pod, HOST, "mptcp")
    world.wait_sweeps()
    subprocess.run(["ip", "netns", "delete", pod.netns], check=True)
    world.lab._names.remove(pod.netns)
    sock.close()
    until(lambda: world.records() == (0, 0), "the record of a closed socket stays")


def test_what_was_closed_while_no_program_looked_is_forgotten(world: Forgetful) -> None:
    """As what was opened after the first copy of the maps and closed before the second."""
    agent = world.lab.agents[-1]
    agent.stop()
    world.agent().start()
    with ExitStack() as stack:
        for host in SERVICE_IPS.values():
            for kind in ("tcp", "udp", "mptcp"):
                stack.enter_context(world.connected(world.client, host, kind))
            for protocol in (0, socket.IPPROTO_UDPLITE):
                sender = stack.enter_context(Remote(world.client, host, protocol=protocol))
                assert sender.sendto(host, 53) is None
        world.lab.agents[-1].stop()
        (world.a.bpf_root / "ebpfproxy" / "links" / "sock_release").unlink()
    assert world.records() == (9, 9)
    assert (fill(world.a, "sock_peers"), fill(world.a, "mptcp_subflows")) == (6, 3)
    world.forgetful().start()
    until(lambda: world.records() == (0, 0), "records of closed sockets stay")
    until(lambda: not fill(world.a, "sock_peers") + fill(world.a, "mptcp_subflows"), "records stay")
    until(lambda: [world.removed(name) for name in ("sock_peers", "mptcp_subflows")] == [6, 3])


def test_each_connection_is_counted_down_once(world: Forgetful) -> None:
    """However sweeps, reconnecting and closing meet."""
    assert world.client.call(_connect_and_forget, HOST, 4.0) > 100
    until(lambda: world.records()[0] == 0, "records of closed sockets stay")
    with maps_of(world.a) as maps:
        words = maps.shared("loads").bytes.cast("I")
        size = layout.LOAD_WORDS
        sums = {(words[at] + words[at + 1]) & 0xFFFFFFFF for at in range(0, 64 * size, size)}
        words.release()
    assert sums == {0}


def _connect_and_forget(host: str, seconds: float) -> int:
    """Sockets that are disconnected for a while, and then connect again or are closed; how many times."""
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
