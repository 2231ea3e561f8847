"""``ebpfproxy trace``: a line for each decision, with the names of what it is about."""

from __future__ import annotations

import ctypes
import json
import socket
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from ebpfproxy.services.model import Family, Policy, Protocol, ServicePortKey
from ebpfproxy.trace.naming import Reasons
from ebpfproxy.trace.rows import DecisionRow, text
from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.traces import WEB, Row, Trace, connect_again, outcomes_of, trace_during
from tests.e2e.two_node_cluster import NODE_PORT
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        yield OutsideClientCluster(lab)


@pytest.fixture(scope="module")
def agent(cluster: OutsideClientCluster) -> Agent:
    return cluster.agent("--stale-tcp-seconds", "0.2", "--nodeport-guard").start()


# -- kinds


def test_a_connection_shows_client_service_and_backend(cluster: OutsideClientCluster, agent: Agent) -> None:
    with trace_during(cluster.a) as rows:
        answer = cluster.client.call(clients.ask_tcp, WEB, 80)
    (row,) = rows
    backend = cluster.w1 if answer["name"] == "w1" else cluster.w2
    assert (row["kind"], row["reason"], row["place"]) == ("chosen", "", "socket")
    assert (row["namespace"], row["service"], row["port"]) == ("shop", "web", "http")
    assert (row["frontend"], row["protocol"]) == ("10.96.0.10:80", "TCP")
    assert row["backend"]["address"] == f"{backend.address}:8080"
    assert (row["candidates"], row["algorithm"]) == (2, "random")
    assert row["client"]["name"] == cluster.client.netns
    assert row["client"]["address"] in (cluster.client.address, cluster.client.address6)
    assert row["client"]["pid"] > 0
    assert abs(row["time"] - time.time()) < 60


def test_a_file_for_log_shippers(cluster: OutsideClientCluster, agent: Agent) -> None:
    path = cluster.lab.folder / "decisions.jsonl"
    with trace_during(cluster.a, "--file", str(path)) as shown:
        cluster.client.call(clients.ask_tcp, WEB, 80)
    assert shown == []
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["kind"], row["service"]) == ("chosen", "web")


def test_a_file_that_cannot_be_made_is_said_in_one_line(cluster: OutsideClientCluster, agent: Agent) -> None:
    with pytest.raises(RuntimeError, match="Error: /nowhere/log: No such file or directory\n") as raised:
        cluster.a.cli("trace", "--file", "/nowhere/log")
    assert "Traceback" not in str(raised.value)


def test_a_file_that_cannot_be_written_is_said_in_one_line(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    trace = Trace(cluster.a, "--file", "/dev/full")
    cluster.client.call(clients.ask_tcp, WEB, 80)
    assert trace.process.wait(20) == 1
    assert trace.process.stderr is not None
    assert trace.process.stderr.read() == b"Error: /dev/full: No space left on device\n"


def test_refusals_have_a_reason(cluster: OutsideClientCluster, agent: Agent) -> None:
    with trace_during(cluster.a, "--errors") as rows:
        cluster.client.call(clients.ask_tcp, WEB, 80)
        for address, port in (("10.96.0.20", 80), (WEB, 81), ("10.96.0.30", 80)):
            cluster.client.call(clients.connect_error, address, port)
        cluster.client.call(clients.send_error, "10.96.0.20", 53)
    assert outcomes_of(rows) == [
        ("refused", "no-endpoint", "empty", "10.96.0.20:80"),
        ("refused", "no-such-port", "web", f"{WEB}:81"),
        ("refused", "no-local-endpoint", "elsewhere", "10.96.0.30:80"),
        ("refused", "no-endpoint", "empty", "10.96.0.20:53"),
    ]
    assert {row["algorithm"] for row in rows} == {""}


def _send_ten(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        for _ in range(10):
            sock.sendto(b"?", (host, port))
            sock.recv(4096)


def test_datagrams_of_a_socket_are_one_decision(cluster: OutsideClientCluster, agent: Agent) -> None:
    with trace_during(cluster.a) as rows:
        cluster.client.call(_send_ten, WEB, 53)
    assert outcomes_of(rows) == [("chosen", "", "web", f"{WEB}:53")]


def test_session_affinity_keeps_the_backend(cluster: OutsideClientCluster, agent: Agent) -> None:
    ip = "10.96.7.1"
    cluster.add("sticky", ip, [cluster.endpoint_on_a(), cluster.endpoint_on_b()], sessionAffinity="ClientIP")
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")
    cluster.a.cli("affinity", "flush", "--all")
    with trace_during(cluster.a, "--service", "shop/sticky") as rows:
        for _ in range(3):
            cluster.client.call(clients.ask_tcp, ip, 80)
    assert [row["kind"] for row in rows] == ["chosen", "affinity-hit", "affinity-hit"]
    assert len({row["backend"]["address"] for row in rows}) == 1
    cluster.remove("sticky")


def test_a_flow_of_packets_is_one_decision(cluster: OutsideClientCluster, agent: Agent) -> None:
    """The outside client's connection has more packets than one."""
    with trace_during(cluster.a) as rows:
        cluster.outside.call(clients.ask_tcp, cluster.a.address, NODE_PORT)
    (row,) = rows
    assert (row["kind"], row["place"], row["service"]) == ("chosen", "ingress", "web")
    assert row["frontend"] == f"{cluster.a.address}:{NODE_PORT}"
    assert row["client"]["address"].startswith(f"{cluster.outside.address}:")


def test_a_socket_of_a_removed_backend_is_closed_and_a_flow_ends(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    ip, balancer = "10.96.7.2", "203.0.113.72"
    cluster.add_load_balancer("leaving", ip, balancer, [cluster.endpoint_on_b()])
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")
    inside, outside = HeldConnection(cluster.client, ip, 80), HeldConnection(cluster.outside, balancer, 80)
    with trace_during(cluster.a, "--service", "shop/leaving", "--errors") as rows:
        cluster.add_load_balancer("leaving", ip, balancer, [])
        until(lambda: inside.ask() != "alive")
        until(lambda: outside.ask() != "alive")
    closed = [row for row in rows if row["kind"] == "stale-socket-ended"]
    left = [row for row in rows if row["kind"] == "backend-left"]
    assert [(row["frontend"], row["backend"]["address"]) for row in closed] == [
        (f"{ip}:80", f"{cluster.w2.address}:8080")
    ]
    assert closed[0]["client"]["name"] == cluster.client.netns
    assert {row["frontend"] for row in left} == {f"{balancer}:80"}
    cluster.remove("leaving")


def test_redirected_datagrams_of_a_removed_backend_are_a_decision(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    ip = "10.96.7.3"
    cluster.add("moving", ip, [cluster.endpoint_on_b()])
    script = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(3)\n"
        "for line in sys.stdin:\n"
        f"    s.sendto(b'?',({ip!r},53)); print(s.recv(4096).decode(),flush=True)\n"
    )
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")
    sender = cluster.client.popen([sys.executable, "-c", script], stdin=-1, stdout=-1)
    assert sender.stdin is not None and sender.stdout is not None

    def ask() -> str:
        assert sender.stdin is not None and sender.stdout is not None
        sender.stdin.write(b"\n")
        sender.stdin.flush()
        name: str = json.loads(sender.stdout.readline())["name"]
        return name

    assert ask() == "w2"
    with trace_during(cluster.a, "--service", "shop/moving") as rows:
        cluster.add("moving", ip, [cluster.endpoint_on_a()])
        until(lambda: ask() == "w1")
    assert [row["kind"] for row in rows] == ["backend-left", "chosen"]
    assert [row["backend"]["address"] for row in rows] == [
        f"{cluster.w2.address}:8053",
        f"{cluster.w1.address}:8053",
    ]
    cluster.remove("moving")


def _bind(port: int) -> None:
    with socket.socket() as sock, pytest.raises(OSError):
        sock.bind(("0.0.0.0", port))


def test_bind_to_a_node_port_is_refused(cluster: OutsideClientCluster, agent: Agent) -> None:
    with trace_during(cluster.a, "--kind", "bind-refused") as rows:
        cluster.a.call(_bind, NODE_PORT)
    assert outcomes_of(rows) == [("bind-refused", "", "web", f"0.0.0.0:{NODE_PORT}")]
    assert rows[0]["client"]["name"] == "host"


# -- filters


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ((), ["empty", "second", "web", "web"]),
        (("-n", "shop"), ["empty", "second", "web", "web"]),
        (("-n", "other"), []),
        (("--service", "shop/second"), ["second"]),
        (("-n", "shop", "--service", "web"), ["web", "web"]),
        (("--kind", "chosen", "--kind", "dropped"), ["second", "web"]),
        (("--errors", "--service", "web"), ["web"]),
        (("--pod", "CLIENT"), ["empty", "web", "web"]),
        (("--pod", "ADDRESS"), ["second"]),
        (("-n", "shop", "--pod", "ADDRESS"), ["second"]),
    ],
)
def test_programs_report_only_requested_decisions(
    cluster: OutsideClientCluster, agent: Agent, arguments: tuple[str, ...], seen: list[str]
) -> None:
    names = {"CLIENT": cluster.client.netns, "ADDRESS": cluster.w1.address}
    with trace_during(cluster.a, *(names.get(each, each) for each in arguments)) as rows:
        cluster.client.call(clients.ask_tcp, WEB, 80)
        cluster.client.call(clients.connect_error, WEB, 81)
        cluster.client.call(clients.connect_error, "10.96.0.20", 80)
        cluster.w1.call(clients.ask_tcp, "10.96.0.40", 80)
    assert sorted(row["service"] for row in rows) == seen


def test_sampling_reports_one_of_n_choices_and_every_refusal(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    with trace_during(cluster.a, "--sample", "10", "--rate", "100000") as rows:
        cluster.client.call(connect_again, WEB, 53, 4000)
        cluster.client.call(clients.connect_error, "10.96.0.20", 80)
    kinds = [row["kind"] for row in rows]
    # The binomial distribution of 4,000 goes beyond these once in 10^13.
    assert 250 < kinds.count("chosen") < 550
    assert kinds.count("refused") == 1


# -- names


def test_pods_of_endpoints_have_names(cluster: OutsideClientCluster, agent: Agent) -> None:
    """The slice's targetRef names them, for clients and for backends."""
    endpoints = [
        {**endpoint, "targetRef": {"kind": "Pod", "name": name}}
        for endpoint, name in ((cluster.endpoint_on_a(), "w-1"), (cluster.endpoint_on_b(), "w-2"))
    ]
    ip = "10.96.7.4"
    cluster.add("named", ip, endpoints)
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")
    with trace_during(cluster.a, "--pod", "shop/w-1") as rows:
        cluster.w1.call(clients.ask_tcp, ip, 80)
        cluster.client.call(clients.ask_tcp, ip, 80)
    (row,) = rows
    assert row["client"]["pod"] == "shop/w-1"
    assert row["backend"]["pod"] in ("shop/w-1", "shop/w-2")
    cluster.remove("named")


def _hinted(endpoint: Row, **hints: list[dict[str, str]]) -> Row:
    return {**endpoint, "hints": hints}


def test_the_rule_that_selects_the_candidates_is_named(cluster: OutsideClientCluster, agent: Agent) -> None:
    """The agent knows it, for each selection: hints for nodes or zones, or that all terminate."""
    ip = "10.96.7.6"
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node-a", "labels": {"topology.kubernetes.io/zone": "zone-a"}},
    }
    manifests.write(cluster.manifests / "node.yaml", node)
    zones = [
        _hinted(endpoint, forZones=[{"name": zone}])
        for endpoint, zone in ((cluster.endpoint_on_a(), "zone-b"), (cluster.endpoint_on_b(), "zone-a"))
    ]
    nodes = [
        _hinted(endpoint, forNodes=[{"name": name}])
        for endpoint, name in ((cluster.endpoint_on_a(), "node-a"), (cluster.endpoint_on_b(), "node-b"))
    ]
    leaving = [
        cluster.endpoint_on_a(ready=False, terminating=True),
        cluster.endpoint_on_b(ready=False, terminating=True),
    ]
    expected = [
        ("zone-hints", zones, {"w2"}),
        ("node-hints", nodes, {"w1"}),
        ("terminating", leaving, {"w1", "w2"}),
        ("ready", [cluster.endpoint_on_a()], {"w1"}),
    ]
    cluster.add("hinted", ip, zones)
    until(lambda: _answering(cluster, ip) == {"w2"})
    trace = Trace(cluster.a, "--service", "shop/hinted")

    def follows(basis: str, names: set[str]) -> bool:
        return _answering(cluster, ip) == names and bool(rows := trace.shown()) and rows[-1]["basis"] == basis

    for basis, endpoints, names in expected:
        cluster.add("hinted", ip, endpoints)
        until(lambda basis=basis, names=names: follows(basis, names))  # type: ignore[misc]
    rows = trace.end()
    lines = {row["basis"]: text(msgspec.convert(row, DecisionRow)) for row in rows}
    assert f"{cluster.w2.address}:8080 (1 of 1, zone hint, random; " in lines["zone-hints"]
    assert "(1 of 1, node hint, random; " in lines["node-hints"]
    assert "(1 of 2, none is ready, random; " in lines["terminating"]
    assert "(1 of 1, random; " in lines["ready"]
    cluster.remove("hinted")
    (cluster.manifests / "node.yaml").unlink()


def test_agent_that_hangs_is_asked_once_and_not_for_each_service() -> None:
    """Decisions are read meanwhile, and lines lack the rule."""
    asked = []

    def ask(key: ServicePortKey) -> None:
        asked.append(key)
        time.sleep(0.2)

    reasons = Reasons(ask)
    keys = [ServicePortKey("shop", f"s{n}", "", Protocol.TCP, Family.IPV4) for n in range(10)]
    assert {reasons.basis(key, (), [Policy.CLUSTER]) for key in keys} == {""}
    assert asked == keys[:1]


def _answering(cluster: OutsideClientCluster, ip: str) -> set[str]:
    if cluster.client.call(clients.connect_error, ip, 80) != "connected":
        return set()
    return set(cluster.client.call(clients.spread_tcp, ip, 80, clients.ENOUGH))


def _connect_as(comm: bytes, host: str) -> None:
    ctypes.CDLL(None).prctl(15, comm)  # PR_SET_NAME
    clients.ask_tcp(host, 80)


def test_processes_and_pods_may_have_any_name(cluster: OutsideClientCluster, agent: Agent) -> None:
    """A decision is one line, and no terminal obeys it; endpoints' pods are named by whoever makes slices."""
    ip = "10.96.7.5"
    cluster.add(
        "named", ip, [{**cluster.endpoint_on_a(), "targetRef": {"kind": "Pod", "name": "w\n\x1b[31m"}}]
    )
    until(lambda: cluster.client.call(clients.connect_error, ip, 80) == "connected")
    command = ["trace", "--bpf-root", str(cluster.a.bpf_root), "--count", "1"]
    trace = cluster.a.start_command(command, stdout=-1, stderr=-1)
    assert trace.stderr is not None
    assert trace.stderr.readline() == b"tracing\n"
    cluster.client.call(_connect_as, b"\x1b[2J\nx\xc2\x9b", ip)
    (line,) = trace.communicate(timeout=20)[0].decode().splitlines()
    assert line.isprintable()
    assert f"shop/named:http {ip}:80 ⇒ {cluster.w1.address}:8080 (1 of 1, random; " in line
    cluster.remove("named")
