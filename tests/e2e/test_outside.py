"""Clients outside the cluster and local ones that no socket hook sees: real traffic through the packet path."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e import load
from tests.e2e.outer import WAYS, Held, Outer
from tests.e2e.world import BALANCER, EXTERNAL, NODE_PORT, SERVICE_IPS
from tests.lab import Lab, clients, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=WAYS)
def every_way(request: pytest.FixtureRequest) -> Iterator[Outer]:
    with Lab() as lab:
        made = Outer(lab)
        made.agent(*WAYS[request.param]).start()
        yield made


# -- from outside, whichever way the packets take


@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_node_ports_reach_both_nodes_pods_and_answer_as_themselves(
    every_way: Outer, ask: Callable[..., Any]
) -> None:
    outer = every_way
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    for address in (outer.a.address, outer.a.address6):
        found = {}
        for _ in range(30):
            answer = outer.outside.call(ask, address, port)
            assert tuple(answer.get("from") or answer["getpeername"]) == (address, port)
            found[answer["name"]] = answer["peer"]
        own = (
            ("10.244.1.1", outer.a.address) if ":" not in address else ("fd00:10:244:1::1", outer.a.address6)
        )
        assert found == {"w1": own[0], "w2": own[1]}, "masqueraded to the address towards each backend"


@pytest.mark.parametrize("address", [EXTERNAL, BALANCER, SERVICE_IPS["v4"], SERVICE_IPS["v6"]])
def test_every_kind_of_address_is_served_from_outside(every_way: Outer, address: str) -> None:
    assert set(every_way.outside.call(clients.spread_tcp, address, 80, clients.ENOUGH)) == {"w1", "w2"}
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
    outer = every_way
    agent = outer.lab.agents[-1]
    with load.running(outer.outside, outer.a.address, NODE_PORT) as running:
        for stop in (agent.kill, agent.stop):
            stop()
            time.sleep(0.2)
            agent.start()
            time.sleep(0.2)
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def test_maps_of_other_sizes_take_the_flows_along(every_way: Outer, request: pytest.FixtureRequest) -> None:
    """Connections through packets, and the Service's address at the socket, outlive a change of sizes."""
    outer = every_way
    agent = outer.lab.agents[-1]
    inside = Held(outer.client, SERVICE_IPS["v4"], 80)
    with load.running(outer.outside, outer.a.address, NODE_PORT) as running:
        held = [Held(outer.outside, address, 80) for address in (EXTERNAL, SERVICE_IPS["v6"])]
        agent.stop()
        # The bypass is off now, but flows that began with it keep it.
        options = [o for o in WAYS[request.node.callspec.params["every_way"]] if o != "--bypass-netfilter"]
        bigger = outer.agent(*options, "--max-services", "1000", "--max-conntrack", "100000").start()
        assert "copied flows from maps of other sizes" in bigger.text
        assert [each.ask() for each in (*held, inside)] == ["alive"] * 3
    # What is just being opened may meet programs of both sizes. The long one is asked after each of the
    # short ones: were it lost, every round from then on would be an error.
    assert len(running.result["errors"]) < 5, running.result


# -- policies


def test_policy_local_shows_the_client_and_uses_this_nodes_endpoint_only(outer: Outer) -> None:
    outer.balanced(
        "local", "10.96.1.1", "203.0.113.21", [outer.on_a(), outer.on_b()], externalTrafficPolicy="Local"
    )
    until(lambda: outer.outside.call(clients.connect_error, "203.0.113.21", 80, 0.3) == "connected", "local")
    for _ in range(10):
        answer = outer.outside.call(clients.ask_tcp, "203.0.113.21", 80)
        assert (answer["name"], answer["peer"]) == ("w1", outer.outside.address)
    assert outer.outside.call(clients.ask_udp, "203.0.113.21", 53)["peer"] == outer.outside.address


def test_policy_local_drops_where_only_others_have_endpoints_and_refuses_where_nobody_has(
    outer: Outer,
) -> None:
    outer.balanced("far", "10.96.1.2", "203.0.113.22", [outer.on_b()], externalTrafficPolicy="Local")
    outer.balanced("none", "10.96.1.3", "203.0.113.23", [], externalTrafficPolicy="Local")
    until(
        lambda: outer.outside.call(clients.connect_error, "203.0.113.23", 80, 0.3) == "ECONNREFUSED",
        "no reset",
    )
    assert outer.outside.call(clients.connect_error, "203.0.113.22", 80, 0.5) == "TimeoutError"
    status = json.loads(outer.a.cli("status", "-o", "json"))
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


def test_a_datagram_to_a_service_without_endpoints_is_refused_at_once(outer: Outer) -> None:
    """ICMP and ICMPv6 port unreachable, as the socket reports it."""
    for address in ("10.96.0.20", "fd00:10:96::20"):
        outer.outside.route(address, outer.a)
        assert outer.outside.call(_refused_datagram, address, 53) == "ECONNREFUSED"
        assert outer.outside.call(clients.connect_error, address, 80) == "ECONNREFUSED"


def test_a_port_that_a_cluster_ip_lacks_is_refused_in_packets_and_at_the_socket(outer: Outer) -> None:
    for space in (outer.outside, outer.client, outer.a):
        for address in (SERVICE_IPS["v4"], SERVICE_IPS["v6"]):
            assert space.call(clients.connect_error, address, 81) == "ECONNREFUSED"


def test_source_ranges_hold_for_outside_for_pods_and_for_the_node(outer: Outer) -> None:
    outer.balanced(
        "fenced",
        "10.96.1.4",
        "203.0.113.24",
        [outer.on_b()],
        loadBalancerSourceRanges=[f"{outer.outside.address}/32"],
    )
    until(
        lambda: outer.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected", "allowed"
    )
    assert outer.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    assert outer.a.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    outer.balanced(
        "fenced",
        "10.96.1.4",
        "203.0.113.24",
        [outer.on_b()],
        loadBalancerSourceRanges=[f"{outer.client.address}/32"],
    )
    until(
        lambda: outer.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected",
        "the pod now",
    )
    assert outer.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"


def test_thousands_of_source_ranges(outer: Outer) -> None:
    ranges = [f"10.{i // 250}.{i % 250}.0/24" for i in range(5000)] + [f"{outer.outside.address}/32"]
    outer.balanced("many", "10.96.1.5", "203.0.113.25", [outer.on_b()], loadBalancerSourceRanges=ranges)
    until(lambda: outer.outside.call(clients.connect_error, "203.0.113.25", 80, 0.3) == "connected", "5001st")
    outer.remove("many")
    status = json.loads(outer.a.cli("status", "-o", "json"))
    until(
        lambda: (
            next(
                m["entries"]
                for m in json.loads(outer.a.cli("status", "-o", "json"))["maps"]
                if m["name"] == "source_ranges"
            )
            < 10
        ),
        f"ranges stay: {status['maps']}",
    )


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


def test_a_udp_client_with_a_fixed_port_follows_the_endpoints_at_once(outer: Outer) -> None:
    outer.balanced("moving", "10.96.1.12", "203.0.113.32", [outer.on_a()])
    until(lambda: outer.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"], "not served")
    for endpoint, name in ((outer.on_b(), "w2"), (outer.on_a(), "w1"), (outer.on_b(), "w2")):
        outer.balanced("moving", "10.96.1.12", "203.0.113.32", [endpoint])
        until(lambda n=name: outer.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == [n], name)  # type: ignore[misc]
    # Not ready is as good as gone for a datagram.
    both = [outer.on_a(), outer.on_b(ready=False)]
    outer.balanced("moving", "10.96.1.12", "203.0.113.32", both)
    until(lambda: outer.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"], "not left")


def test_connections_outlive_not_ready_and_terminating_and_are_reset_when_the_endpoint_is_gone(
    outer: Outer,
) -> None:
    def only(*endpoints: manifests.Document) -> None:
        outer.balanced("stay", "10.96.1.13", "203.0.113.33", list(endpoints))

    only(outer.on_a())
    until(lambda: outer.outside.call(clients.connect_error, "203.0.113.33", 80, 0.3) == "connected", "served")
    held = Held(outer.outside, "203.0.113.33", 80)
    assert held.ask() == "alive"
    for step in (
        [outer.on_a(ready=False), outer.on_b()],
        [outer.on_a(ready=False, terminating=True), outer.on_b()],
    ):
        only(*step)
        until(
            lambda: set(outer.outside.call(clients.spread_tcp, "203.0.113.33", 80, 5)) == {"w2"},
            "new ones go on",
        )
        assert held.ask() == "alive"
    only(outer.on_b())
    until(lambda: held.ask() != "alive", "the connection lives on without an endpoint")
    assert held.ask() in ("ConnectionResetError", "BrokenPipeError")


# -- many


def test_fifty_thousand_connections_at_once() -> None:
    """All masqueraded, to four pods; each is asked once all are open."""
    with Lab() as lab:
        outer = Outer(lab)
        more = [outer.a.pod("w3"), outer.b.pod("w4")]
        for pod in more:
            servers.start(pod, pod.name, 8080, 8053, 9000)
        outer.write_web(outer.w1, outer.w2, *more)
        outer.agent("--masquerade-ports", "1024-65000").start()
        # A client has 50,000 local ports for each address that it asks.
        hosts = [(outer.a.address, NODE_PORT), (EXTERNAL, 80), (BALANCER, 80), (outer.a.address, NODE_PORT)]
        holders = [
            outer.outside.popen(
                [sys.executable, "-m", "tests.e2e.many", host, str(port), "12500"], stdin=-1, stdout=-1
            )
            for host, port in hosts
        ]

        def said() -> list[int]:
            return [int(holder.stdout.readline()) for holder in holders if holder.stdout is not None]

        assert said() == [12_500] * 4
        status = json.loads(outer.a.cli("status", "-o", "json"))
        entries = next(m["entries"] for m in status["maps"] if m["name"] == "conntrack")
        assert entries >= 4 * 50_000
        for holder in holders:
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        assert said() == [12_500] * 4
