"""Clients outside the cluster and local ones that no socket hook sees: real traffic through the packet path."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute, NetNS
from scapy.all import raw
from scapy.layers.inet import IP, TCP
from scapy.layers.sctp import SCTP, SCTPChunkInit

from ebpfproxy.datapath import bpf
from tests.e2e import load
from tests.e2e.test_agent import until
from tests.e2e.world import BALANCER, EXTERNAL, NODE_PORT, SERVICE_IPS, World
from tests.lab import Agent, Lab, Outside, clients, manifests, servers
from tests.lab.spaces import Space

pytestmark = pytest.mark.root

WAYS = {"safe": [], "clsact": ["--without", "tcx"], "bypass": ["--bypass-netfilter"]}
BALANCER6 = "2001:db8:113::10"
PORTS = [{"name": "http", "port": 80, "protocol": "TCP"}, {"name": "udp", "port": 53, "protocol": "UDP"}]
SLICE_PORTS = [
    {"name": "http", "port": 8080, "protocol": "TCP"},
    {"name": "udp", "port": 8053, "protocol": "UDP"},
]


class Outer(World):
    """The world with a client outside, to whom node-a is the way to every frontend."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.outside: Outside = lab.outside
        for address in (
            EXTERNAL,
            BALANCER,
            BALANCER6,
            SERVICE_IPS["v4"],
            SERVICE_IPS["v6"],
            "203.0.113.0/24",
        ):
            self.outside.route(address, self.a)

    def add(self, name: str, ip: str, endpoints: list[manifests.Document], **spec: Any) -> None:
        """A Service of one cluster IP on the usual ports, in a file of its own."""
        service = manifests.service(name, **{"clusterIPs": [ip], "ports": PORTS, **spec})
        if spec.get("type") == "LoadBalancer":
            service["status"] = {"loadBalancer": {"ingress": [{"ip": spec.pop("balancer", BALANCER)}]}}
        pieces = [manifests.slice_of(name, endpoints, ports=SLICE_PORTS)] if endpoints else []
        manifests.write(self.manifests / f"{name}.yaml", service, *pieces)

    def remove(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").unlink()

    def balanced(self, name: str, ip: str, balancer: str, endpoints: list[Any], **spec: Any) -> None:
        service = manifests.service(
            name, **{"clusterIPs": [ip], "ports": PORTS, "type": "LoadBalancer", **spec}
        )
        service["status"] = {"loadBalancer": {"ingress": [{"ip": balancer}]}}
        pieces = [manifests.slice_of(name, endpoints, ports=SLICE_PORTS)] if endpoints else []
        manifests.write(self.manifests / f"{name}.yaml", service, *pieces)

    def on_a(self, **conditions: bool) -> manifests.Document:
        return manifests.endpoint(self.w1.address, "node-a", **conditions)

    def on_b(self, **conditions: bool) -> manifests.Document:
        return manifests.endpoint(self.w2.address, "node-b", **conditions)


@pytest.fixture(scope="module", params=WAYS)
def every_way(request: pytest.FixtureRequest) -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.agent(*WAYS[request.param]).start()
        yield made


@pytest.fixture(scope="module")
def world() -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.agent().start()
        yield made


# -- from outside, whichever way the packets take


@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_node_ports_reach_both_nodes_pods_and_answer_as_themselves(
    every_way: Outer, ask: Callable[..., Any]
) -> None:
    world = every_way
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    for address in (world.a.address, world.a.address6):
        found = {}
        for _ in range(30):
            answer = world.outside.call(ask, address, port)
            assert tuple(answer.get("from") or answer["getpeername"]) == (address, port)
            found[answer["name"]] = answer["peer"]
        own = (
            ("10.244.1.1", world.a.address) if ":" not in address else ("fd00:10:244:1::1", world.a.address6)
        )
        assert found == {"w1": own[0], "w2": own[1]}, "masqueraded to the address towards each backend"


@pytest.mark.parametrize("address", [EXTERNAL, BALANCER, SERVICE_IPS["v4"], SERVICE_IPS["v6"]])
def test_every_kind_of_address_is_served_from_outside(every_way: Outer, address: str) -> None:
    assert set(every_way.outside.call(clients.spread_tcp, address, 80, 20)) == {"w1", "w2"}
    assert every_way.outside.call(clients.ask_udp, address, 53)["from"] == (address, 53)


def _echo(host: str, port: int, size: int) -> bool:
    """Whether a datagram that needs fragments comes back as it went."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.sendto(b"echo", (host, port))
        assert sock.recv(100) == b"echo"
        # The server answers anything else with a line; long questions only have to arrive whole.
        sock.sendto(os.urandom(size), (host, port))
        return b"name" in sock.recv(65536)


def test_datagrams_in_fragments_arrive_whole(every_way: Outer) -> None:
    for address in (every_way.a.address, every_way.a.address6):
        assert every_way.outside.call(_echo, address, 30053, 2000)


def _stream(host: str, port: int, size: int) -> bool:
    data = os.urandom(size)
    with socket.create_connection((host, port), 5) as sock:
        while not sock.recv(4096).endswith(b"\n"):
            pass
        received = bytearray()
        sent = 0
        sock.setblocking(False)
        deadline = time.monotonic() + 20
        while len(received) < size and time.monotonic() < deadline:
            readable, writable, _ = select.select([sock], [sock] if sent < size else [], [], 1)
            if writable:
                sent += sock.send(data[sent : sent + 65536])
            if readable:
                received += sock.recv(65536)
        return bytes(received) == data


def test_megabytes_both_ways_are_what_they_were(every_way: Outer) -> None:
    """Super-packets (GSO) and offloaded checksums, as veth makes them."""
    assert every_way.outside.call(_stream, every_way.a.address, NODE_PORT, 5_000_000)
    assert every_way.outside.call(_stream, every_way.a.address6, NODE_PORT, 2_000_000)


def test_restart_kill_and_other_options_lose_no_connection(every_way: Outer) -> None:
    """One long connection and thousands of short ones, while the agent comes and goes."""
    world = every_way
    agent = world.lab.agents[-1]
    with load.running(world.outside, world.a.address, NODE_PORT) as running:
        for stop in (agent.kill, agent.stop):
            stop()
            time.sleep(0.2)
            agent.start()
            time.sleep(0.2)
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def test_maps_of_other_sizes_take_the_flows_along(every_way: Outer, request: pytest.FixtureRequest) -> None:
    """Connections through packets, and the Service's address at the socket, outlive a change of sizes."""
    world = every_way
    agent = world.lab.agents[-1]
    inside = _Held(world.client, SERVICE_IPS["v4"], 80)
    with load.running(world.outside, world.a.address, NODE_PORT) as running:
        held = [_Held(world.outside, address, 80) for address in (EXTERNAL, SERVICE_IPS["v6"])]
        agent.stop()
        # Without the bypass: flows that began with it go on with it.
        options = [o for o in WAYS[request.node.callspec.params["every_way"]] if o != "--bypass-netfilter"]
        bigger = world.agent(*options, "--max-services", "1000", "--max-conntrack", "100000").start()
        assert "flows are carried over" in bigger.text
        assert [each.ask() for each in (*held, inside)] == ["alive"] * 3
    # What is just being opened may meet programs of both sizes. The long one is asked after each of the
    # short ones: were it lost, every round from then on would be an error.
    assert len(running.result["errors"]) < 5, running.result


# -- policies


def test_policy_local_shows_the_client_and_uses_this_nodes_endpoint_only(world: Outer) -> None:
    world.balanced(
        "local", "10.96.1.1", "203.0.113.21", [world.on_a(), world.on_b()], externalTrafficPolicy="Local"
    )
    until(lambda: world.outside.call(clients.connect_error, "203.0.113.21", 80, 0.3) == "connected", "local")
    for _ in range(10):
        answer = world.outside.call(clients.ask_tcp, "203.0.113.21", 80)
        assert (answer["name"], answer["peer"]) == ("w1", world.outside.address)
    assert world.outside.call(clients.ask_udp, "203.0.113.21", 53)["peer"] == world.outside.address


def test_policy_local_drops_where_only_others_have_endpoints_and_refuses_where_nobody_has(
    world: Outer,
) -> None:
    world.balanced("far", "10.96.1.2", "203.0.113.22", [world.on_b()], externalTrafficPolicy="Local")
    world.balanced("none", "10.96.1.3", "203.0.113.23", [], externalTrafficPolicy="Local")
    until(
        lambda: world.outside.call(clients.connect_error, "203.0.113.23", 80, 0.3) == "ECONNREFUSED",
        "no reset",
    )
    assert world.outside.call(clients.connect_error, "203.0.113.22", 80, 0.5) == "TimeoutError"
    status = json.loads(world.a.cli("status", "-o", "json"))
    reasons = {(p["action"], p["reason"]) for p in status["packets"]}
    assert {("rejected", "no-endpoint"), ("dropped", "no-local-endpoint")} <= reasons


def _refused_datagram(host: str, port: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((host, port))
        sock.send(b"?")
        try:
            sock.recv(100)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "answered"


def test_a_datagram_to_a_service_without_endpoints_is_refused_at_once(world: Outer) -> None:
    """ICMP and ICMPv6 port unreachable, as the socket reports it."""
    for address in ("10.96.0.20", "fd00:10:96::20"):
        world.outside.route(address, world.a)
        assert world.outside.call(_refused_datagram, address, 53) == "ECONNREFUSED"
        assert world.outside.call(clients.connect_error, address, 80) == "ECONNREFUSED"


def test_a_port_that_a_cluster_ip_lacks_is_refused_in_packets_and_at_the_socket(world: Outer) -> None:
    for space in (world.outside, world.client, world.a):
        for address in (SERVICE_IPS["v4"], SERVICE_IPS["v6"]):
            assert space.call(clients.connect_error, address, 81) == "ECONNREFUSED"


def test_source_ranges_hold_for_outside_for_pods_and_for_the_node(world: Outer) -> None:
    world.balanced(
        "fenced",
        "10.96.1.4",
        "203.0.113.24",
        [world.on_b()],
        loadBalancerSourceRanges=[f"{world.outside.address}/32"],
    )
    until(
        lambda: world.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected", "allowed"
    )
    assert world.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    assert world.a.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    world.balanced(
        "fenced",
        "10.96.1.4",
        "203.0.113.24",
        [world.on_b()],
        loadBalancerSourceRanges=[f"{world.client.address}/32"],
    )
    until(
        lambda: world.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected",
        "the pod now",
    )
    assert world.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"


def test_thousands_of_source_ranges(world: Outer) -> None:
    ranges = [f"10.{i // 250}.{i % 250}.0/24" for i in range(5000)] + [f"{world.outside.address}/32"]
    world.balanced("many", "10.96.1.5", "203.0.113.25", [world.on_b()], loadBalancerSourceRanges=ranges)
    until(lambda: world.outside.call(clients.connect_error, "203.0.113.25", 80, 0.3) == "connected", "5001st")
    world.remove("many")
    status = json.loads(world.a.cli("status", "-o", "json"))
    until(
        lambda: (
            next(
                m["entries"]
                for m in json.loads(world.a.cli("status", "-o", "json"))["maps"]
                if m["name"] == "source_ranges"
            )
            < 10
        ),
        f"ranges stay: {status['maps']}",
    )


# -- backends in other places


def test_backends_on_the_host_network_of_this_node_and_of_another(world: Outer) -> None:
    for node, name, ip, balancer in (
        (world.a, "host-a", "10.96.1.6", "203.0.113.26"),
        (world.b, "host-b", "10.96.1.7", "203.0.113.27"),
    ):
        servers.start(node, name, 8080, 8053)
        world.balanced(name, ip, balancer, [manifests.endpoint(node.address, node.name)])
    for balancer, name in (("203.0.113.26", "host-a"), ("203.0.113.27", "host-b")):
        until(
            lambda b=balancer: world.outside.call(clients.connect_error, b, 80, 0.3) == "connected",  # type: ignore[misc]
            name,
        )
        assert world.outside.call(clients.ask_tcp, balancer, 80)["name"] == name
        assert world.outside.call(clients.ask_udp, balancer, 53)["from"] == (balancer, 53)


def test_a_backend_over_a_vxlan_sees_the_tunnels_own_address(world: Outer) -> None:
    """An overlay: pods of node-b are reached through vx0. tcpdump in the pod shows both directions."""
    for node, other in ((world.a, world.b), (world.b, world.a)):
        ends = ["local", node.address, "remote", other.address]
        node.run(["ip", "link", "add", "vx0", "type", "vxlan", "id", "7", "dstport", "4789", *ends])
        node.run(["ip", "addr", "add", f"10.9.0.{node.number}/24", "dev", "vx0"])
        node.run(["ip", "link", "set", "vx0", "up"])
    world.a.run(["ip", "route", "replace", "10.244.2.0/24", "via", "10.9.0.2", "dev", "vx0"])
    world.b.run(["ip", "route", "replace", "10.244.1.0/24", "via", "10.9.0.1", "dev", "vx0"])
    world.balanced("overlay", "10.96.1.8", "203.0.113.28", [world.on_b()])
    dump = world.w2.popen(
        ["tcpdump", "-nn", "-l", "-i", "eth0", "-c", "6", "tcp port 8080"], stdout=-1, stderr=-1
    )
    assert dump.stderr is not None
    while b"listening" not in dump.stderr.readline():
        pass
    until(lambda: "vx0" in world.a.cli("status"), "vx0 is not attached")
    until(
        lambda: world.outside.call(clients.connect_error, "203.0.113.28", 80, 0.3) == "connected", "overlay"
    )
    assert world.outside.call(clients.ask_tcp, "203.0.113.28", 80)["peer"] == "10.9.0.1"
    assert dump.stdout is not None
    lines = [dump.stdout.readline().decode() for _ in range(6)]
    seen = {word for line in lines for word in line.split() if word.count(".") >= 4}
    hosts = {word.rstrip(":").rpartition(".")[0] for word in seen}
    assert hosts == {"10.9.0.1", world.w2.address}
    for node in (world.a, world.b):
        other = world.b if node is world.a else world.a
        node.run(["ip", "route", "replace", f"10.244.{other.number}.0/24", "via", other.address])
        node.run(["ip", "link", "del", "vx0"])


def test_a_pod_on_a_bridge_answers_its_neighbour_through_the_service(world: Outer) -> None:
    """The answer is switched and never routed: the programs on the bridge's ports put the Service back."""
    a = world.a
    a.run(["ip", "link", "add", "cni0", "type", "bridge"])
    a.run(["ip", "addr", "add", "10.245.1.1/24", "dev", "cni0"])
    a.run(["ip", "link", "set", "cni0", "up"])
    pods = []
    for number, name in ((2, "left"), (3, "right")):
        space = Space(f"{a.netns}-{name}", a.cgroup)
        with world.lab.namespace(space.netns) as inside, NetNS(a.netns) as outside:
            outside.link(
                "add", ifname=f"v{name}", kind="veth", peer={"ifname": "eth0", "net_ns_fd": space.netns}
            )
            index = outside.link_lookup(ifname=f"v{name}")[0]
            bridge = outside.link_lookup(ifname="cni0")[0]
            outside.link("set", index=index, master=bridge, state="up")
            index = inside.link_lookup(ifname="eth0")[0]
            inside.addr("add", index=index, address=f"10.245.1.{number}", prefixlen=24)
            inside.link("set", index=index, state="up")
            inside.route("add", dst="default", gateway="10.245.1.1")
        pods.append(space)
    left, right = pods
    servers.start(right, "right", 8080, 8053)
    world.add("bridged", "10.96.1.9", [manifests.endpoint("10.245.1.3", "node-a")])
    until(
        lambda: "vright" in json.dumps(json.loads(a.cli("status", "-o", "json"))["devices"]), "not attached"
    )

    def ask() -> dict[str, Any]:
        """A process outside the served cgroup: no socket hook."""
        done = left.popen(
            ["socat", "-T1", "-", "TCP:10.96.1.9:80,connect-timeout=1"],
            join_cgroup=False,
            stdin=-3,
            stdout=-1,
            stderr=-1,
        )
        text = done.communicate()[0]
        return json.loads(text) if text else {}

    until(lambda: ask().get("name") == "right", "no answer over the bridge", 8)
    assert ask()["peer"] == "10.245.1.2"
    for space in pods:
        space.end()
    a.run(["ip", "link", "del", "cni0"])


# -- local clients without a socket hook


def _socat(space: Space, address: str) -> dict[str, Any]:
    process = space.popen(
        ["socat", "-T1", "-", f"TCP:{address},connect-timeout=2"],
        join_cgroup=False,
        stdin=-3,
        stdout=-1,
        stderr=-1,
    )
    text = process.communicate()[0]
    return json.loads(text) if text else {}


def test_a_client_on_the_host_without_a_socket_hook(world: Outer) -> None:
    """As a kernel client (NFS) is one: translated as its packets leave, sent to the backend's own route."""
    found = {_socat(world.a, "10.96.0.10:80")["name"] for _ in range(12)}
    assert found == {"w1", "w2"}
    assert _socat(world.a, "[fd00:10:96::10]:80")["name"] in found
    assert _socat(world.a, "10.96.0.20:80") == {}


def test_a_pod_without_a_socket_hook_reaches_itself(world: Outer) -> None:
    world.add("mirror", "10.96.1.10", [world.on_a()])
    until(lambda: _socat(world.w1, "10.96.1.10:80") != {}, "no hairpin")
    answer = _socat(world.w1, "10.96.1.10:80")
    assert (answer["name"], answer["peer"]) == ("w1", "10.244.1.1")


def _sctp_server(address: str, port: int) -> tuple[str, int, bytes]:
    """Waits for one INIT and answers it from where it came to; the source that it saw, and the packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as sock:
        sock.settimeout(10)
        sock.bind((address, 0))
        while True:
            packet, peer = sock.recvfrom(2048)
            body = packet[20:]
            question = SCTP(body)
            if question.dport == port:
                break
        sock.sendto(raw(SCTP(sport=port, dport=question.sport, tag=9) / SCTPChunkInit()), peer)
        return peer[0], question.sport, body


def _sctp_client(host: str, port: int, own: int) -> tuple[str, bytes]:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as sock:
        sock.settimeout(5)
        for _ in range(10):
            sock.sendto(raw(SCTP(sport=own, dport=port, tag=0) / SCTPChunkInit(init_tag=5)), (host, 0))
            if select.select([sock], [], [], 0.5)[0]:
                packet, peer = sock.recvfrom(2048)
                return peer[0], packet[20:]
    raise TimeoutError("no answer")


def test_sctp_through_raw_packets_from_outside_and_from_a_pod(world: Outer) -> None:
    """Ports are translated, so the CRC32c must be right at both ends (scapy computes it again)."""
    service = manifests.service(
        "diameter",
        type="NodePort",
        clusterIPs=["10.96.1.11"],
        ports=[{"name": "sctp", "port": 3868, "protocol": "SCTP", "nodePort": 30868}],
    )
    piece = manifests.slice_of(
        "diameter", [world.on_b()], ports=[{"name": "sctp", "port": 5000, "protocol": "SCTP"}]
    )
    manifests.write(world.manifests / "diameter.yaml", service, piece)
    until(lambda: "diameter" in world.a.cli("service", "list"), "not programmed")
    for client, host, port, seen in (
        (world.outside, world.a.address, 30868, world.a.address),
        (world.client, "10.96.1.11", 3868, world.client.address),
    ):
        script = "import sys; from tests.e2e.test_outside import _sctp_server; import pickle; "
        script += f"print(pickle.dumps(_sctp_server('{world.w2.address}', 5000)).hex())"
        server = world.w2.popen([sys.executable, "-c", script], stdout=-1)
        time.sleep(0.7)
        answered, answer = client.call(_sctp_client, host, port, 4000)
        assert server.stdout is not None
        source, _, question = pickle.loads(bytes.fromhex(server.stdout.read().decode()))
        assert (answered, source) == (host, seen)
        for packet in (question, answer):
            parsed = SCTP(packet)
            del parsed.chksum
            assert raw(parsed) == packet
        assert SCTP(answer).sport == port


# -- endpoints that change under flows


def _fixed(host: str, port: int, own: int, questions: int, pause: float) -> list[str]:
    """Who answers each datagram of one socket with a fixed port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", own))
        sock.settimeout(1)
        found = []
        for _ in range(questions):
            sock.sendto(b"?", (host, port))
            try:
                found.append(json.loads(sock.recv(4096))["name"])
            except TimeoutError:
                found.append("nobody")
            time.sleep(pause)
        return found


def test_a_udp_client_with_a_fixed_port_follows_the_endpoints_at_once(world: Outer) -> None:
    world.balanced("moving", "10.96.1.12", "203.0.113.32", [world.on_a()])
    until(lambda: world.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"], "not served")
    for endpoint, name in ((world.on_b(), "w2"), (world.on_a(), "w1"), (world.on_b(), "w2")):
        world.balanced("moving", "10.96.1.12", "203.0.113.32", [endpoint])
        until(lambda n=name: world.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == [n], name, 2)  # type: ignore[misc]
    # Not ready is as good as gone for a datagram.
    both = [world.on_a(), world.on_b(ready=False)]
    world.balanced("moving", "10.96.1.12", "203.0.113.32", both)
    until(lambda: world.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"], "not left", 2)


class _Held:
    """A connection that a process outside holds."""

    def __init__(self, space: Space, host: str, port: int) -> None:
        script = (
            "import socket,sys\n"
            f"s=socket.create_connection(({host!r},{port}),3); s.recv(4096); print('ready',flush=True)\n"
            "for line in sys.stdin:\n"
            "    try:\n"
            "        s.settimeout(2); s.sendall(b'x'); print('alive' if s.recv(10) else 'closed', flush=True)\n"
            "    except OSError as e: print(type(e).__name__, flush=True)\n"
        )
        self.process = space.popen([sys.executable, "-c", script], stdin=-1, stdout=-1)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def ask(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().decode().strip()


def test_connections_outlive_not_ready_and_terminating_and_are_reset_when_the_endpoint_is_gone(
    world: Outer,
) -> None:
    def only(*endpoints: manifests.Document) -> None:
        world.balanced("stay", "10.96.1.13", "203.0.113.33", list(endpoints))

    only(world.on_a())
    until(lambda: world.outside.call(clients.connect_error, "203.0.113.33", 80, 0.3) == "connected", "served")
    held = _Held(world.outside, "203.0.113.33", 80)
    assert held.ask() == "alive"
    for step in (
        [world.on_a(ready=False), world.on_b()],
        [world.on_a(ready=False, terminating=True), world.on_b()],
    ):
        only(*step)
        until(
            lambda: set(world.outside.call(clients.spread_tcp, "203.0.113.33", 80, 5)) == {"w2"},
            "new ones go on",
        )
        assert held.ask() == "alive"
    only(world.on_b())
    until(lambda: held.ask() != "alive", "the connection lives on without an endpoint")
    assert held.ask() in ("ConnectionResetError", "BrokenPipeError")


# -- devices and addresses


def test_a_hot_plugged_device_serves_node_ports_within_a_second(world: Outer) -> None:
    """Plugged, named an uplink by its route, renamed, unplugged."""
    switch = f"{world.lab.id}-switch"
    with NetNS(switch) as outside, NetNS(world.a.netns) as inside:
        outside.link("add", ifname="hot", kind="veth", peer={"ifname": "eth7", "net_ns_fd": world.a.netns})
        outside.link(
            "set",
            index=outside.link_lookup(ifname="hot")[0],
            master=outside.link_lookup(ifname="br0")[0],
            state="up",
        )
        index = inside.link_lookup(ifname="eth7")[0]
        inside.addr("add", index=index, address="172.18.7.1", prefixlen=24)
        inside.link("set", index=index, state="up")
        inside.route("add", dst="default", gateway="172.18.7.254", oif=index, priority=500)
    world.outside.run(["ip", "addr", "add", "172.18.7.254/24", "dev", "eth0"])
    began = time.monotonic()
    until(
        lambda: world.outside.call(clients.connect_error, "172.18.7.1", NODE_PORT, 0.2) == "connected", "eth7"
    )
    assert time.monotonic() - began < 1.5
    world.a.run(["ip", "link", "set", "eth7", "name", "wan7"])
    until(lambda: "wan7" in world.a.cli("status"), "the new name")
    assert world.outside.call(clients.connect_error, "172.18.7.1", NODE_PORT) == "connected"
    world.a.run(["ip", "link", "del", "wan7"])
    until(lambda: "wan7" not in world.a.cli("status"), "still there")
    world.outside.run(["ip", "addr", "del", "172.18.7.254/24", "dev", "eth0"])


def test_an_address_added_later_serves_node_ports_within_a_second(world: Outer) -> None:
    world.a.run(["ip", "addr", "add", "172.18.0.77/24", "dev", "eth0"])
    began = time.monotonic()
    until(
        lambda: world.outside.call(clients.connect_error, "172.18.0.77", NODE_PORT, 0.2) == "connected", ".77"
    )
    assert time.monotonic() - began < 1.5
    world.a.run(["ip", "addr", "del", "172.18.0.77/24", "dev", "eth0"])


def test_a_bridge_as_uplink_and_patterns_that_name_one() -> None:
    """The node's address is on a bridge that has the hardware as its port, as hypervisors have it."""
    with Lab() as lab:
        world = Outer(lab)
        world.a.run(["ip", "link", "add", "br-ex", "type", "bridge"])
        world.a.run(["ip", "addr", "flush", "dev", "eth0"])
        world.a.run(["ip", "link", "set", "eth0", "master", "br-ex"])
        world.a.run(["ip", "addr", "add", f"{world.a.address}/24", "dev", "br-ex"])
        world.a.run(["ip", "link", "set", "br-ex", "up"])
        world.a.run(["ip", "route", "add", "default", "via", world.outside.address])
        world.a.run(["ip", "route", "add", "10.244.2.0/24", "via", world.b.address])
        agent = world.agent().start()
        assert set(world.outside.call(clients.spread_tcp, world.a.address, NODE_PORT, 20)) == {"w1", "w2"}
        agent.stop()
        agent = world.agent("--devices", "nothing*").start()
        assert world.outside.call(clients.connect_error, world.a.address, NODE_PORT) == "ECONNREFUSED"
        agent.stop()
        world.agent("--devices", "br-*,wan*").start()
        assert set(world.outside.call(clients.spread_tcp, world.a.address, NODE_PORT, 20)) == {"w1", "w2"}


# -- protection and health


def _bind(address: str, port: int, kind: int) -> str:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as sock:
        try:
            sock.bind((address, port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
    return "bound"


def test_a_host_process_cannot_bind_a_node_port(world: Outer) -> None:
    for address in ("0.0.0.0", "::", world.a.address, "127.0.0.1"):
        assert world.a.call(_bind, address, NODE_PORT, socket.SOCK_STREAM) == "EADDRINUSE"
    assert world.a.call(_bind, "0.0.0.0", 30053, socket.SOCK_DGRAM) == "EADDRINUSE"
    assert world.a.call(_bind, "0.0.0.0", NODE_PORT, socket.SOCK_DGRAM) == "bound", "another protocol"
    assert world.a.call(_bind, "0.0.0.0", NODE_PORT + 1, socket.SOCK_STREAM) == "bound"
    assert world.client.call(_bind, "0.0.0.0", NODE_PORT, socket.SOCK_STREAM) == "bound", "a pod's own port"


def _http(host: str, port: int) -> tuple[int, dict[str, Any]]:
    with socket.create_connection((host, port), 2) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = b""
        while chunk := sock.recv(4096):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_the_health_check_node_port_follows_the_local_endpoints(world: Outer) -> None:
    def serve(*endpoints: manifests.Document) -> None:
        world.balanced(
            "healthy",
            "10.96.1.14",
            "203.0.113.34",
            list(endpoints),
            externalTrafficPolicy="Local",
            healthCheckNodePort=32222,
        )

    def status() -> int:
        try:
            return world.outside.call(_http, world.a.address, 32222)[0]
        except (ConnectionRefusedError, ConnectionResetError):
            return 0

    serve(world.on_a(), world.on_b())
    until(lambda: status() == 200, "not healthy")
    _, body = world.outside.call(_http, world.a.address6, 32222)
    assert body == {
        "service": {"namespace": "shop", "name": "healthy"},
        "localEndpoints": 1,
        "serviceProxyHealthy": True,
    }
    serve(world.on_b())
    until(lambda: status() == 503, "still healthy")
    serve(world.on_a(ready=False, terminating=True), world.on_b())
    until(lambda: status() == 503, "a terminating endpoint is not ready")
    world.remove("healthy")
    until(lambda: status() == 0, "still served")


def test_a_health_check_port_that_is_taken_is_logged_counted_and_shown(world: Outer) -> None:
    server = world.a.popen(["socat", "TCP6-LISTEN:32223,fork", "/dev/null"], join_cgroup=False)
    until(lambda: world.a.call(_bind, "::", 32223, socket.SOCK_STREAM) == "EADDRINUSE", "socat")
    world.balanced(
        "blocked",
        "10.96.1.16",
        "203.0.113.36",
        [world.on_a()],
        externalTrafficPolicy="Local",
        healthCheckNodePort=32223,
    )
    agent = world.lab.agents[-1]
    agent.wait_log("health check port cannot be bound port=32223 service=shop/blocked")
    until(
        lambda: 'ebpfproxy_health_check_ports{state="failed"} 1.0' in agent.http("/metrics", 10249)[1],
        "metric",
        10,
    )
    assert "healthCheckNodePort 32223" in world.a.cli("status")
    assert world.outside.call(clients.connect_error, "203.0.113.36", 80) == "connected"
    server.terminate()
    world.remove("blocked")


def test_metrics_of_the_packet_path(world: Outer) -> None:
    _, text = world.lab.agents[-1].http("/metrics", 10249)
    for name in (
        'ebpfproxy_packets_total{action="rejected",reason="no-endpoint"}',
        'ebpfproxy_packets_total{action="dropped",reason="source-range"}',
        'ebpfproxy_packets_total{action="passed",reason="martian"}',
        'ebpfproxy_devices{state="attached"}',
        "ebpfproxy_conntrack_entries",
        "ebpfproxy_conntrack_expired_total",
        "ebpfproxy_conntrack_evicted_total",
        "ebpfproxy_conntrack_sweep_seconds_count",
        'ebpfproxy_map_capacity{map="conntrack"}',
    ):
        assert f"\n{name} " in text, name


# -- beside others


def test_a_cnis_rules_see_client_and_backend(world: Outer) -> None:
    """A firewall as CNIs have it: invalid packets are dropped, forwarding only to pods and to answers."""
    rules = """
    table inet cni {
        chain forward {
            type filter hook forward priority 0; policy drop;
            ct state invalid drop
            ct state established,related accept
            ip saddr 172.18.0.254 ip daddr 10.244.0.0/16 tcp dport 8080 counter accept
            ip saddr 10.244.0.0/16 accept
        }
        chain input { type filter hook input priority 0; policy accept; ct state invalid drop; }
    }
    """
    path = world.lab.folder / "rules.nft"
    path.write_text(rules)
    world.a.run(["nft", "-f", str(path)])
    try:
        found = world.outside.call(clients.spread_tcp, world.a.address, NODE_PORT, 20)
        assert set(found) == {"w1", "w2"}
        assert _socat(world.a, "10.96.0.10:80") != {}
        assert "counter packets 20 " in world.a.run(["nft", "list", "table", "inet", "cni"])
        assert world.outside.call(clients.connect_error, "203.0.113.10", 53, 0.5) == "TimeoutError"
    finally:
        world.a.run(["nft", "delete", "table", "inet", "cni"])


def test_conntrack_commands(world: Outer) -> None:
    held = _Held(world.outside, world.a.address, NODE_PORT)

    def listed(*arguments: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(world.a.cli("conntrack", "list", "-o", "json", *arguments))
        return found

    flows = listed("--service", "shop/web", "--state", "ESTABLISHED", "--client", world.outside.address)
    assert len(flows) == 1
    flow = flows[0]
    assert flow["frontend"] == f"{world.a.address}:{NODE_PORT}"
    assert flow["backend"] in (f"{world.w1.address}:8080", f"{world.w2.address}:8080")
    assert flow["masquerade"].rpartition(":")[0] in ("10.244.1.1", world.a.address)
    assert 86000 < flow["expires"] <= 86400
    assert listed("--protocol", "sctp", "--client", "192.0.2.1") == []
    got = json.loads(world.a.cli("conntrack", "get", flow["client"], "-o", "json"))
    assert got[0]["backend"] == flow["backend"]
    assert "ESTABLISHED" in world.a.cli("conntrack", "list", "--frontend", flow["frontend"])
    assert "flushed 1 flows (4 entries)" in world.a.cli("conntrack", "flush", "--client", flow["client"])
    assert listed("--client", flow["client"]) == []
    assert held.ask() != "alive", "its answers go nowhere"
    assert "flushed" in world.a.cli("conntrack", "flush", "--all")


def _link_elsewhere(path: str) -> int:
    """Attaches somebody else's program to eth0, which lets everything pass; pins it."""
    program = bpf.try_load(bpf.PROG_SCHED_CLS, 0, bytes.fromhex("b7000000ffffffff 9500000000000000"))
    link = bpf.link_create(program, socket.if_nametoindex("eth0"), 46)
    bpf.pin(link, Path(path))
    return 0


def _link_is_attached(path: str) -> bool:
    return bool(bpf.tcx_link_info(bpf.get_pinned(Path(path))).ifindex)


def _filter_elsewhere() -> None:
    program = bpf.try_load(bpf.PROG_SCHED_CLS, 0, bytes.fromhex("b7000000ffffffff 9500000000000000"))
    with IPRoute() as netlink:
        index = socket.if_nametoindex("eth0")
        netlink.tc("add", "clsact", index)
        netlink.tc(
            "add-filter",
            "bpf",
            index,
            parent=0xFFFFFFF2,
            protocol=3,
            prio=1,
            fd=program,
            name="cni",
            classid=1,
            direct_action=True,
        )


def _filters() -> list[str]:
    with IPRoute() as netlink:
        found = netlink.get_filters(socket.if_nametoindex("eth0"), parent=0xFFFFFFF2)
        options = [each.get_attr("TCA_OPTIONS") for each in found]
        return [o.get_attr("TCA_BPF_NAME") for o in options if o is not None and o.get_attr("TCA_BPF_NAME")]


@pytest.mark.parametrize("way", ["safe", "clsact"])
def test_others_programs_stay_where_they_are(way: str) -> None:
    with Lab() as lab:
        world = Outer(lab)
        pin = str(world.a.bpf_root.parent / "somebody-elses")
        world.a.bpf_root.parent.mkdir(parents=True, exist_ok=True)
        world.a.call(_link_elsewhere, pin)
        world.a.call(_filter_elsewhere)
        agent = world.agent(*WAYS[way]).start()
        assert set(world.outside.call(clients.spread_tcp, world.a.address, NODE_PORT, 20)) == {"w1", "w2"}
        names = [name.partition(":")[0] for name in world.a.call(_filters)]
        assert names == (["cni", "ebpfproxy"] if way == "clsact" else ["cni"])
        agent.stop()
        said = world.a.cli("cleanup")
        assert "detached" in said
        assert world.a.call(_filters) == ["cni"]
        assert world.a.call(_link_is_attached, pin)
        assert world.outside.call(clients.connect_error, world.a.address, NODE_PORT) == "ECONNREFUSED"
        Path(pin).unlink()


# -- options


def _with(*arguments: str) -> Callable[[Lab], tuple[Outer, Agent]]:
    def make(lab: Lab) -> tuple[Outer, Agent]:
        made = Outer(lab)
        return made, made.agent(*arguments).start()

    return make


def test_options_that_close_doors() -> None:
    with Lab() as lab:
        world, _ = _with(
            "--no-external-ips", "--nodeport-addresses", "172.18.0.99/32", "--no-nodeport-guard"
        )(lab)
        world.a.run(["ip", "addr", "add", "172.18.0.99/24", "dev", "eth0"])
        until(
            lambda: world.outside.call(clients.connect_error, "172.18.0.99", NODE_PORT, 0.2) == "connected",
            "the chosen address",
        )
        assert world.outside.call(clients.connect_error, world.a.address, NODE_PORT) == "ECONNREFUSED"
        assert world.outside.call(clients.connect_error, EXTERNAL, 80, 0.3) == "TimeoutError"
        assert world.client.call(clients.connect_error, EXTERNAL, 80, 0.3) != "connected"
        assert world.a.call(_bind, "0.0.0.0", NODE_PORT, socket.SOCK_STREAM) == "bound"


def test_masquerade_all_and_local_pods_by_address() -> None:
    with Lab() as lab:
        world, agent = _with("--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.1.3/32")(lab)
        # The client pod is not in the range: it is masqueraded; w1 is, and keeps its address.
        assert _socat(world.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        agent.stop()
        agent = world.agent("--masquerade-all").start()
        assert _socat(world.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        agent.stop()
        agent = world.agent().start()
        assert _socat(world.client, "10.96.0.40:80")["peer"] == world.client.address
        agent.stop()
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}
        manifests.write(world.manifests / "node.yaml", {**node, "spec": {"podCIDRs": ["10.244.9.0/24"]}})
        agent = world.agent("--detect-local-mode", "NodeCIDR").start()
        assert _socat(world.client, "10.96.0.40:80")["peer"] == "10.244.1.1"
        manifests.write(world.manifests / "node.yaml", {**node, "spec": {"podCIDRs": ["10.244.1.0/24"]}})
        until(
            lambda: _socat(world.client, "10.96.0.40:80")["peer"] == world.client.address,
            "the node's pods are not known",
        )


# -- many


def test_fifty_thousand_connections_at_once() -> None:
    """All masqueraded, to four pods; each is asked once all are open."""
    with Lab() as lab:
        world = Outer(lab)
        more = [world.a.pod("w3"), world.b.pod("w4")]
        for pod in more:
            servers.start(pod, pod.name, 8080, 8053, 9000)
        world.write_web(world.w1, world.w2, *more)
        world.agent("--masquerade-ports", "1024-65000").start()
        # A client has 50,000 local ports for each address that it asks.
        hosts = [(world.a.address, NODE_PORT), (EXTERNAL, 80), (BALANCER, 80), (world.a.address, NODE_PORT)]
        holders = [
            world.outside.popen(
                [sys.executable, "-m", "tests.e2e.many", host, str(port), "12500"], stdin=-1, stdout=-1
            )
            for host, port in hosts
        ]

        def said() -> list[int]:
            return [int(holder.stdout.readline()) for holder in holders if holder.stdout is not None]

        assert said() == [12_500] * 4
        status = json.loads(world.a.cli("status", "-o", "json"))
        entries = next(m["entries"] for m in status["maps"] if m["name"] == "conntrack")
        assert entries >= 4 * 50_000
        for holder in holders:
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        assert said() == [12_500] * 4


# -- devices without a link layer


def _through_tun(service: str, port: int) -> tuple[str, int, str]:
    """A VPN's client behind a tun device opens a connection; who answers, from which port, with which flags."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    flags = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"vpn0", flags))  # TUNSETIFF
    for command in ("ip addr add 10.99.0.1/24 dev vpn0", "ip link set vpn0 up"):
        subprocess.run(command.split(), check=True)
    question = IP(src="10.99.0.2", dst=service) / TCP(sport=4321, dport=port, flags="S", seq=1)
    deadline = time.monotonic() + 8
    while time.monotonic() < deadline:
        os.write(tun, raw(question))
        while select.select([tun], [], [], 0.5)[0]:
            answer = IP(os.read(tun, 2048))
            # The connection before may still be asking for its answer.
            if TCP in answer and answer.src == service:
                os.close(tun)
                return answer.src, answer[TCP].sport, str(answer[TCP].flags)
    raise TimeoutError("no answer on the tun device")


def test_a_client_behind_a_tun_device(world: Outer) -> None:
    """Its packets begin with the IP header: another build of the programs, made when the device appears."""
    if not os.path.exists("/dev/net/tun"):  # noqa: PTH110
        pytest.skip("this kernel has no tun device")
    world.add("vpn", "10.96.1.15", [world.on_a()])
    until(lambda: "vpn" in world.a.cli("service", "list"), "not programmed")
    assert world.a.call(_through_tun, "10.96.1.15", 80) == ("10.96.1.15", 80, "SA")
    assert world.a.call(_through_tun, "10.96.0.20", 80) == ("10.96.0.20", 80, "RA")
