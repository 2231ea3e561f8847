"""``--measure-connections``: how long connections take, and those that fail, in maps and in metrics."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import pytest

from ebpfproxy.datapath.abi.measure_layout import ConnectFailure
from ebpfproxy.datapath.dump import Dump, open_maps
from ebpfproxy.datapath.programs.attach import attachments
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import NO_CONNECTS, Connects
from tests.e2e.outer import Outer
from tests.e2e.world import NODE_PORT, SERVICE_IPS
from tests.lab import Agent, Lab, clients, manifests
from tests.lab.waiting import until

pytestmark = pytest.mark.root

#: Their pod listens at no such port, and answers no SYN.
CLOSED, SILENT = "10.96.0.71", "10.96.0.72"
ABANDONED = "ABANDONED"


@pytest.fixture(scope="module")
def world() -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
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
def agent(world: Outer) -> Agent:
    return world.agent("--measure-connections", "--metrics-backends").start()


def measured(world: Outer, name: str) -> Connects:
    """What is measured of the Service's IPv4 port http."""
    maps = open_maps(world.a.bpf_root)
    try:
        ids = {(key.name, key.port_name, str(key.family)): number for number, key in Dump(maps).names.items()}
        return measures.connects(maps).get(ids[name, "http", "IPv4"], NO_CONNECTS)
    finally:
        maps.close()


def failed(world: Outer, name: str, before: Connects) -> dict[str, int]:
    """The failures since then by reason, without those that there were none of."""
    now = measured(world, name).since(before)
    return {reason.name: now.failures[reason] for reason in ConnectFailure if now.failures[reason]}


def connect_within(host: str, port: int, syn_retries: int) -> str:
    """The name of the error of connect(), with the kernel's own time-out after so many repeated SYNs."""
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, syn_retries)
        try:
            sock.connect((host, port))
        except OSError as error:
            return type(error).__name__
    return "connected"


def give_up(host: str, port: int) -> str:
    """Closes a socket that is still connecting."""
    with socket.socket() as sock:
        sock.settimeout(0.05)
        try:
            sock.connect((host, port))
        except TimeoutError:
            return ABANDONED
    return "connected"


def connect_twice(first: tuple[str, int], second: tuple[str, int]) -> None:
    """On one socket, of which the first attempt fails."""
    with socket.socket() as sock:
        sock.settimeout(3)
        with pytest.raises(ConnectionRefusedError):
            sock.connect(first)
        sock.connect(second)


# -- sockets


@pytest.mark.parametrize("where", ["pod", "host"])
def test_connections_of_sockets_are_measured(world: Outer, agent: Agent, where: str) -> None:
    before = measured(world, "web")
    space = world.client if where == "pod" else world.a
    space.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 5)
    found = measured(world, "web").since(before)
    assert found.established == 5
    assert found.seconds > 0
    assert not any(found.failures)


def test_a_connection_to_a_backend_itself_is_none_of_the_services(world: Outer, agent: Agent) -> None:
    before = measured(world, "web")
    world.client.call(clients.ask_tcp, world.w1.address, 8080)
    assert measured(world, "web") == before


def test_a_socket_that_is_refused_counts_as_reset(world: Outer, agent: Agent) -> None:
    before = measured(world, "closed")
    assert world.client.call(clients.connect_error, CLOSED, 80) == "ECONNREFUSED"
    assert failed(world, "closed", before) == {"RESET": 1}
    assert measured(world, "closed").established == before.established


def test_a_second_attempt_of_the_same_socket_is_none_of_the_first_service(world: Outer, agent: Agent) -> None:
    closed, web = measured(world, "closed"), measured(world, "web")
    world.client.call(connect_twice, (CLOSED, 80), (world.w1.address, 8080))
    assert failed(world, "closed", closed) == {"RESET": 1}
    assert measured(world, "closed").established == closed.established
    world.client.call(connect_twice, (CLOSED, 80), (SERVICE_IPS["v4"], 80))
    assert failed(world, "closed", closed) == {"RESET": 2}
    assert measured(world, "web").since(web).established == 1


def test_a_socket_without_an_answer_counts_as_timeout(world: Outer, agent: Agent) -> None:
    before = measured(world, "silent")
    assert world.client.call(connect_within, SILENT, 80, 1) == "TimeoutError"
    assert failed(world, "silent", before) == {"TIMEOUT": 1}


def test_a_socket_that_is_closed_while_it_connects_counts_as_abandoned(world: Outer, agent: Agent) -> None:
    before = measured(world, "silent")
    assert world.client.call(give_up, SILENT, 80) == ABANDONED
    assert failed(world, "silent", before) == {"ABANDONED": 1}


def test_a_connection_whose_syn_was_lost_takes_as_long_as_it_took(world: Outer, agent: Agent) -> None:
    """The kernel's own measurement begins with the repeated SYN."""
    before = measured(world, "web")
    world.write_web(world.w2)
    until(lambda: clients_of_web(world) == {"w2"}, "w1 is still in use")
    after_wait = measured(world, "web")
    lose = ["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "loss", "100%"]
    world.w2.run(lose)
    try:
        asking = world.client.fork(clients.ask_tcp, SERVICE_IPS["v4"], 80, 20.0)
        until(lambda: syn_repeated(world), "the SYN was not repeated")
    finally:
        world.w2.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert asking.wait() == 0
    world.write_web(world.w1, world.w2)
    found = measured(world, "web").since(after_wait)
    assert found.established == 1
    # The kernel repeats a SYN after a second.
    assert found.seconds >= 0.9
    assert before.established <= after_wait.established


def clients_of_web(world: Outer) -> set[str]:
    return set(world.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, 8))


def syn_repeated(world: Outer) -> bool:
    text = world.client.run(["ss", "-tino", "state", "syn-sent"])
    return bool(re.search(r"retrans:\d+/[1-9]|timer:\(on,[^,]+,[1-9]", text))


# -- packets


def test_connections_of_packets_are_measured(world: Outer, agent: Agent) -> None:
    before = measured(world, "web")
    world.outside.call(clients.spread_tcp, world.a.address, NODE_PORT, 5)
    found = measured(world, "web").since(before)
    assert found.established == 5
    assert found.seconds > 0
    assert not any(found.failures)


def test_packets_that_are_refused_count_as_reset(world: Outer, agent: Agent) -> None:
    before = measured(world, "closed")
    assert world.outside.call(clients.connect_error, CLOSED, 80) == "ECONNREFUSED"
    assert failed(world, "closed", before) == {"RESET": 1}


# -- metrics


def test_metrics_of_the_service_and_of_the_backend(world: Outer, agent: Agent) -> None:
    world.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)
    world.client.call(clients.connect_error, CLOSED, 80)
    _, text = agent.http("/metrics", 10249)
    labels = 'ip_family="IPv4",namespace="shop",port="http",protocol="TCP",service='
    (count,) = re.findall(
        rf'^ebpfproxy_service_connect_seconds_count{{{labels}"web"}} (\S+)$', _sorted_labels(text), re.M
    )
    assert float(count) == measured(world, "web").established
    name = "ebpfproxy_backend_connect_failures_total"
    where = f'backend="{world.w1.address}:7"'
    (count,) = re.findall(
        rf'^{name}{{{where},ip_family="IPv4",namespace="shop",port="http",protocol="TCP",reason="reset",'
        rf'service="closed"}} (\S+)$',
        _sorted_labels(text),
        re.M,
    )
    assert float(count) == measured(world, "closed").failures[ConnectFailure.RESET]


def _sorted_labels(text: str) -> str:
    def ordered(found: re.Match[str]) -> str:
        return "{" + ",".join(sorted(re.findall(r'\w+="[^"]*"', found[1]))) + "}"

    return re.sub(r"\{(.*)\}", ordered, text)


def test_without_the_option_nothing_is_attached_or_measured(world: Outer, agent: Agent) -> None:
    """It is the last test: the agent is another one."""
    hooks = {each.hook for each in attachments(world.a.bpf_root / "ebpfproxy") if each.alive}
    assert "sock_ops" in hooks
    agent.stop()
    world.agent().start()
    until(
        lambda: (
            "sock_ops"
            not in {each.hook for each in attachments(world.a.bpf_root / "ebpfproxy") if each.alive}
        ),
        "sock_ops is still attached",
    )
    before = measured(world, "web")
    world.client.call(clients.ask_tcp, SERVICE_IPS["v4"], 80)
    world.outside.call(clients.ask_tcp, world.a.address, NODE_PORT)
    assert measured(world, "web") == before
