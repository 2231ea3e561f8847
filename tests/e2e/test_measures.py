"""``--measure-connections`` and ``--measure-traffic``: what maps and metrics say of real connections."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec
import pytest

from ebpfproxy.datapath.abi.measure_layout import ConnectFailure
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, origin_began
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import NO_CONNECTS, NO_TRAFFIC, Connects, Traffic
from ebpfproxy.top.measured import MeasuringRow
from ebpfproxy.top.rows import ServiceRow, Top
from tests.e2e.outside_client import HeldConnection, OutsideClientCluster
from tests.e2e.two_node_cluster import NODE_PORT, SERVICE_IPS
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: Their pod listens at no such port, and answers no SYN.
CLOSED, SILENT = "10.96.0.71", "10.96.0.72"
ABANDONED = "ABANDONED"
IPPROTO_MPTCP = 262


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        silent = made.b.pod("silent")
        # Its SYN-ACK finds no route.
        for address in (made.client.address, made.a.address, made.outside.address):
            silent.run(["ip", "route", "add", "blackhole", f"{address}/32"])
        ports = [{"name": "http", "port": 80, "protocol": "TCP"}]
        for name, ip, pod, port in (("closed", CLOSED, made.w1, 7), ("silent", SILENT, silent, 8080)):
            manifests.write(
                made.manifests / f"{name}.yaml",
                manifests.service(name, clusterIPs=[ip], externalIPs=[], ports=ports),
                manifests.slice_of(
                    name,
                    [manifests.endpoint(pod.address, pod.node.name)],
                    ports=[{"name": "http", "port": port, "protocol": "TCP"}],
                ),
            )
            made.outside.route(ip, made.a)
        yield made


@pytest.fixture(scope="module")
def agent(cluster: OutsideClientCluster) -> Agent:
    options = ("--measure-connections", "--measure-traffic", "--metrics-backends")
    return cluster.agent(*options, "--socket-sweep-seconds", "0.2", "--drift-check-seconds", "0").start()


@contextmanager
def opened(cluster: OutsideClientCluster) -> Iterator[MapSet]:
    maps = open_maps(cluster.a.bpf_root)
    try:
        yield maps
    finally:
        maps.close()


def _id(maps: MapSet, name: str, port: str = "http", family: str = "IPv4") -> int:
    ids = {(key.name, key.port_name, str(key.family)): number for number, key in Dump(maps).names.items()}
    return ids[name, port, family]


def measured(cluster: OutsideClientCluster, name: str, family: str = "IPv4") -> Connects:
    with opened(cluster) as maps:
        return measures.connects(maps).get(_id(maps, name, family=family), NO_CONNECTS)


def traffic(cluster: OutsideClientCluster, port: str, before: Traffic = NO_TRAFFIC) -> Traffic:
    """Of the Service web, since then."""
    with opened(cluster) as maps:
        now = measures.traffic(maps).get(_id(maps, "web", port), NO_TRAFFIC)
    return Traffic(*(a - b for a, b in zip(now, before, strict=True)))


def hooks(cluster: OutsideClientCluster) -> set[str]:
    return {each.hook for each in attachments(cluster.a.bpf_root / "ebpfproxy") if each.alive}


def closed_records(cluster: OutsideClientCluster) -> int:
    """Records of closed sockets whose connection goes on."""
    with opened(cluster) as maps:
        return sum(len(some) // ORIGIN.size for some in OriginTable(maps).closed())


def followed(cluster: OutsideClientCluster) -> list[bool]:
    """Of each record of a connected socket, if programs follow it."""
    with opened(cluster) as maps:
        return [origin_began(each) != 0 for each in each_of(OriginTable(maps).connected())]


def failed(cluster: OutsideClientCluster, name: str, before: Connects) -> dict[str, int]:
    """The failures since then by reason, without those that there were none of."""
    now = measured(cluster, name).since(before)
    return {reason.name: now.failures[reason] for reason in ConnectFailure if now.failures[reason]}


def connect(host: str, protocol: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, protocol) as sock:
        sock.connect((host, 80))
        assert sock.recv(4096)


def connect_within(host: str, port: int, syn_retries: int) -> str:
    """The name of the error of connect(), with the kernel's own time-out after so many repeated SYNs."""
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, syn_retries)
        try:
            sock.connect((host, port))
        except OSError as error:
            return type(error).__name__
    return "connected"


def give_up(host: str, port: int, protocol: int) -> str:
    """Closes a socket that is still connecting."""
    with socket.socket(proto=protocol) as sock:
        sock.settimeout(0.05)
        try:
            sock.connect((host, port))
        except TimeoutError:
            return ABANDONED
    return "connected"


def connect_twice(first: tuple[str, int], second: tuple[str, int]) -> None:
    """On one socket, of which the first attempt fails."""
    with socket.socket() as sock:
        with pytest.raises(ConnectionRefusedError):
            sock.connect(first)
        sock.connect(second)


# -- sockets


@pytest.mark.parametrize("where", ["pod", "host"])
def test_connections_of_sockets_are_measured(cluster: OutsideClientCluster, agent: Agent, where: str) -> None:
    before = measured(cluster, "web")
    space = cluster.client if where == "pod" else cluster.a
    space.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 5)
    found = measured(cluster, "web").since(before)
    assert found.established == 5
    assert found.microseconds > 0
    assert not any(found.failures)


@pytest.mark.parametrize("protocol", [0, IPPROTO_MPTCP], ids=["tcp", "mptcp"])
@pytest.mark.parametrize(("name", "host"), SERVICE_IPS.items())
def test_connections_of_all_kinds_of_sockets_are_measured(
    cluster: OutsideClientCluster, agent: Agent, name: str, host: str, protocol: int
) -> None:
    family = "IPv6" if name == "v6" else "IPv4"
    before = measured(cluster, "web", family)
    cluster.client.call(connect, host, protocol)
    assert measured(cluster, "web", family).since(before).established == 1
    until(lambda: not closed_records(cluster), "the record of a closed connection is left")


def test_a_connection_to_a_backend_itself_is_none_of_the_services(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    before = measured(cluster, "web")
    cluster.client.call(clients.ask_tcp, cluster.w1.address, 8080)
    assert measured(cluster, "web") == before


def test_a_socket_that_is_refused_counts_as_reset(cluster: OutsideClientCluster, agent: Agent) -> None:
    before = measured(cluster, "closed")
    assert cluster.client.call(clients.connect_error, CLOSED, 80) == "ECONNREFUSED"
    assert failed(cluster, "closed", before) == {"RESET": 1}
    assert measured(cluster, "closed").established == before.established


def test_a_second_attempt_of_the_same_socket_is_none_of_the_first_service(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    closed, web = measured(cluster, "closed"), measured(cluster, "web")
    cluster.client.call(connect_twice, (CLOSED, 80), (cluster.w1.address, 8080))
    assert failed(cluster, "closed", closed) == {"RESET": 1}
    assert measured(cluster, "closed").established == closed.established
    cluster.client.call(connect_twice, (CLOSED, 80), (SERVICE_IPS["v4"], 80))
    assert failed(cluster, "closed", closed) == {"RESET": 2}
    assert measured(cluster, "web").since(web).established == 1


def test_a_socket_without_an_answer_counts_as_timeout(cluster: OutsideClientCluster, agent: Agent) -> None:
    before = measured(cluster, "silent")
    assert cluster.client.call(connect_within, SILENT, 80, 1) == "TimeoutError"
    assert failed(cluster, "silent", before) == {"TIMEOUT": 1}


@pytest.mark.parametrize("protocol", [0, IPPROTO_MPTCP], ids=["tcp", "mptcp"])
def test_a_socket_that_is_closed_while_it_connects_counts_as_abandoned(
    cluster: OutsideClientCluster, agent: Agent, protocol: int
) -> None:
    before = measured(cluster, "silent")
    assert cluster.client.call(give_up, SILENT, 80, protocol) == ABANDONED
    assert failed(cluster, "silent", before) == {"ABANDONED": 1}
    assert closed_records(cluster) == 0


def test_a_connection_whose_syn_was_lost_takes_as_long_as_it_took(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    """The kernel's own measurement begins with the repeated SYN."""
    cluster.write_web(cluster.w2)
    until(lambda: clients_of_web(cluster) == {"w2"}, "w1 is still in use")
    before = measured(cluster, "web")
    route = ["blackhole", f"{cluster.client.address}/32"]
    cluster.w2.run(["ip", "route", "add", *route])
    try:
        asking = cluster.client.fork(clients.ask_tcp, SERVICE_IPS["v4"], 80, 20.0)
        until(lambda: syn_repeated(cluster), "the SYN was not repeated")
    finally:
        cluster.w2.run(["ip", "route", "del", *route])
    assert asking.wait() == 0
    cluster.write_web(cluster.w1, cluster.w2)
    found = measured(cluster, "web").since(before)
    assert found.established == 1
    # The kernel repeats a SYN after a second.
    assert found.microseconds >= 900_000


def clients_of_web(cluster: OutsideClientCluster) -> set[str]:
    return set(cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 8))


def syn_repeated(cluster: OutsideClientCluster) -> bool:
    text = cluster.client.run(["ss", "-tino", "state", "syn-sent"])
    return bool(re.search(r"retrans:\d+/[1-9]|timer:\(on,[^,]+,[1-9]", text))


# -- packets


def test_connections_of_packets_are_measured(cluster: OutsideClientCluster, agent: Agent) -> None:
    before = measured(cluster, "web")
    cluster.outside.call(clients.spread_tcp, cluster.a.address, NODE_PORT, 5)
    found = measured(cluster, "web").since(before)
    assert found.established == 5
    assert found.microseconds > 0
    assert not any(found.failures)


def test_packets_that_are_refused_count_as_reset(cluster: OutsideClientCluster, agent: Agent) -> None:
    before = measured(cluster, "closed")
    assert cluster.outside.call(clients.connect_error, CLOSED, 80) == "ECONNREFUSED"
    assert failed(cluster, "closed", before) == {"RESET": 1}


# -- bytes and packets


def receive_all(host: str, port: int, *, closes: bool) -> int:
    """Reads a reply; with ``closes`` the connection is over before the socket is closed."""
    with socket.create_connection((host, port), 3) as sock:
        reply = sock.recv(4096)
        if closes:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(4096) == b""
        return len(reply)


@pytest.mark.parametrize("closes", [False, True])
def test_traffic_of_a_socket_is_counted_when_its_connection_ends(
    cluster: OutsideClientCluster, agent: Agent, closes: bool
) -> None:
    before = traffic(cluster, "http")
    length = cluster.client.call(partial(receive_all, closes=closes), SERVICE_IPS["v4"], 80)
    until(lambda: traffic(cluster, "http", before) != NO_TRAFFIC, "nothing was counted")
    found = traffic(cluster, "http", before)
    # The kernel counts FIN as a byte in some states.
    assert length <= found.response_bytes <= length + 1
    assert found.request_bytes <= 2
    assert found.request_packets >= 3
    assert found.response_packets >= 3
    until(lambda: not closed_records(cluster), "the record of a closed connection is left")


def test_datagrams_of_packets_are_counted_once_each(cluster: OutsideClientCluster, agent: Agent) -> None:
    """With a masquerade they are translated twice."""
    before = traffic(cluster, "udp")
    for _ in range(clients.ENOUGH):
        cluster.outside.call(clients.ask_udp, cluster.a.address, 30053)
    found = traffic(cluster, "udp", before)
    assert (found.request_packets, found.response_packets) == (clients.ENOUGH, clients.ENOUGH)
    # IP and UDP headers, and the question.
    assert found.request_bytes == clients.ENOUGH * (20 + 8 + 1)
    assert found.response_bytes > clients.ENOUGH * (20 + 8)


def test_traffic_of_packets_is_counted_as_it_passes(cluster: OutsideClientCluster, agent: Agent) -> None:
    before = traffic(cluster, "http")
    held = HeldConnection(cluster.outside, cluster.a.address, NODE_PORT)
    found = traffic(cluster, "http", before)
    assert found.request_packets >= 2
    # Two headers of a connection and of data, and the data.
    assert found.response_bytes > 2 * (20 + 20)
    held.process.kill()


# -- metrics


def test_metrics_of_the_service_and_of_the_backend(cluster: OutsideClientCluster, agent: Agent) -> None:
    cluster.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)
    cluster.client.call(clients.connect_error, CLOSED, 80)
    labels = 'ip_family="IPv4",namespace="shop",port="http",protocol="TCP"'
    backend = f'backend="{cluster.w1.address}:7"'

    def told() -> list[float]:
        text = _sorted_labels(agent.http("/metrics", 10249)[1])
        names = (
            f'ebpfproxy_service_connect_seconds_count{{{labels},service="web"}}',
            f'ebpfproxy_service_bytes_total{{direction="response",{labels},service="web"}}',
            f'ebpfproxy_backend_connect_failures_total{{{backend},{labels},reason="reset",service="closed"}}',
        )
        return [float(text.partition(f"\n{name} ")[2].partition("\n")[0] or -1) for name in names]

    def counted() -> list[float]:
        return [
            measured(cluster, "web").established,
            traffic(cluster, "http").response_bytes,
            measured(cluster, "closed").failures[ConnectFailure.RESET],
        ]

    # A connection may end, and be counted, between the two.
    until(lambda: told() == counted() and min(counted()) > 0, "metrics are not what maps have")


def _sorted_labels(text: str) -> str:
    def ordered(found: re.Match[str]) -> str:
        return "{" + ",".join(sorted(re.findall(r'\w+="[^"]*"', found[1]))) + "}"

    return re.sub(r"\{(.*)\}", ordered, text)


# -- ebpfproxy top


def test_top_has_what_is_measured(cluster: OutsideClientCluster, agent: Agent) -> None:
    arguments = [
        "top",
        "-o",
        "json",
        "--interval",
        "200ms",
        "--rows",
        "0",
        "--bpf-root",
        str(cluster.a.bpf_root),
    ]
    process = cluster.a.start_command(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    first = decoded(process.stdout.readline())
    assert first.measuring == MeasuringRow(connections=1, traffic=1)
    assert not any(row.failures for row in first.rows)
    before = measured(cluster, "web").established
    cluster.client.call(partial(receive_all, closes=True), SERVICE_IPS["v4"], 80)
    cluster.client.call(clients.connect_error, CLOSED, 80)
    size = 0.0
    while True:
        now = decoded(process.stdout.readline())
        web, closed = row_of(now, "web"), row_of(now, "closed")
        assert web.connects is not None and web.traffic is not None and closed.connects is not None
        size += web.traffic.response_bytes_per_second * now.seconds
        if web.connects.p50 is not None and closed.failures and size:
            break
    connections = measured(cluster, "web").established - before
    assert sum(web.connects.times) >= connections >= 1
    assert web.connects.p99 is not None and 0 < web.connects.p50 <= web.connects.p99
    assert closed.connects.recently_failed == {"reset": 1}
    (failing,) = closed.backends
    assert (failing.address, failing.recently_failed) == (f"{cluster.w1.address}:7", {"reset": 1})
    assert [row.service for row in now.trouble] == ["closed"]
    process.terminate()
    assert process.wait() == 0
    process.stdout.close()


def decoded(line: bytes) -> Top:
    return msgspec.json.decode(line, type=Top)


def row_of(top: Top, service: str) -> ServiceRow:
    (row,) = (row for row in top.rows if (row.service, row.port) == (service, "http"))
    return row


def test_top_says_it_in_a_table(cluster: OutsideClientCluster, agent: Agent) -> None:
    said = cluster.a.cli("top", "--once", "--interval", "100ms")
    assert "BYTES/S" in said and "need measure" not in said


# -- the end: these leave no program that measures


def test_records_of_closed_sockets_whose_end_nobody_counts_are_removed(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    pod = cluster.a.pod("fading")
    pod.run(["sysctl", "-qw", "net.ipv4.tcp_orphan_retries=1"])
    held = HeldConnection(pod, SERVICE_IPS["v4"], 80)
    for name in (cluster.w1.address, cluster.w2.address):
        pod.run(["ip", "route", "add", "blackhole", f"{name}/32"])
    held.process.kill()
    until(lambda: closed_records(cluster) == 1, "the record is not kept")
    # Nobody sees the end of the connection now, and the agent does not look.
    (cluster.a.bpf_root / "ebpfproxy" / "links" / "sock_ops").unlink()
    until(lambda: closed_records(cluster) == 0, "the record of a closed connection is left")


def test_without_the_option_nothing_is_attached_or_measured(
    cluster: OutsideClientCluster, agent: Agent
) -> None:
    agent.stop()
    cluster.agent("--measure-connections").start()
    # Nothing would end the record of an established connection, if its socket were kept after that.
    held = HeldConnection(cluster.client, SERVICE_IPS["v4"], 80)
    assert followed(cluster) == [False]
    held.process.kill()
    until(lambda: not followed(cluster), "the record of a closed socket is left")
    cluster.lab.agents[-1].stop()
    cluster.agent("--measure-traffic").start()
    assert "sock_ops" in hooks(cluster)
    cluster.lab.agents[-1].stop()
    last = cluster.agent().start()
    assert "sock_ops" not in hooks(cluster)
    said = cluster.a.cli("top", "--once", "--interval", "100ms").splitlines()
    assert said[-1].startswith("FAILED/S, P50, P99 need measureConnections")
    assert "ebpfproxy_service_connect_seconds" not in last.http("/metrics", 10249)[1]
    before = measured(cluster, "web"), traffic(cluster, "http")
    cluster.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)
    cluster.outside.call(clients.ask_tcp, cluster.a.address, NODE_PORT)
    assert (measured(cluster, "web"), traffic(cluster, "http")) == before
