"""External clients and local ones without a socket hook: traffic through the tc programs."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e import connection_load
from tests.e2e.outside_client import (
    VARIANTS,
    HeldConnection,
    OutsideClientCluster,
    offload_checksums,
    refused_datagram,
    wrong_checksums,
)
from tests.e2e.two_node_cluster import BALANCER, EXTERNAL, NODE_PORT, SERVICE_IPS
from tests.lab import Lab, clients, manifests, servers
from tests.lab.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[OutsideClientCluster]:
    with Lab(takes_xdp=request.param == "xdp") as lab:
        made = OutsideClientCluster(lab)
        made.agent(*VARIANTS[request.param]).start()
        yield made


# -- external clients, with each attachment type, with bypass and with XDP


@pytest.mark.parametrize("ask", [clients.ask_tcp, clients.ask_udp, clients.ask_udp_connected])
def test_node_port_reaches_local_and_remote_backends_and_replies_have_its_address(
    variant: OutsideClientCluster, ask: Callable[..., Any]
) -> None:
    cluster = variant
    port = NODE_PORT if ask is clients.ask_tcp else 30053
    for address in (cluster.a.address, cluster.a.address6):
        replies = cluster.outside.call(clients.repeated, clients.ENOUGH, ask, address, port)
        assert {tuple(each.get("from") or each["getpeername"]) for each in replies} == {(address, port)}
        found = {each["name"]: each["peer"] for each in replies}
        own = (
            ("10.244.1.1", cluster.a.address)
            if ":" not in address
            else ("fd00:10:244:1::1", cluster.a.address6)
        )
        assert found == {"w1": own[0], "w2": own[1]}, (
            "the client has the address of the device towards the backend"
        )


def _echoed(host: str, port: int, size: int) -> bool:
    """Returns True if a server echoes so much random data unchanged."""
    data = random.randbytes(size)
    with socket.create_connection((host, port), 10) as sock:
        greeting = received = b""
        while not greeting.endswith(b"\n"):
            greeting += sock.recv(4096)
        for at in range(0, size, 50_000):
            sock.sendall(data[at : at + 50_000])
            while len(received) < min(at + 50_000, size):
                received += sock.recv(1 << 16)
    return received == data


@pytest.mark.parametrize("is_on", [True, False], ids=["by-devices", "by-senders"])
def test_data_and_checksums_are_intact(variant: OutsideClientCluster, is_on: bool) -> None:
    """A checksum that is left to the device is not rewritten as a finished one is."""
    cluster = variant
    spaces = (cluster.outside, cluster.w1, cluster.w2)
    for space in spaces:
        space.call(offload_checksums, is_on)
    try:
        for address in (cluster.a.address, cluster.a.address6):
            for _ in range(4):
                assert cluster.outside.call(_echoed, address, NODE_PORT, 300_001), address
                assert cluster.outside.call(clients.ask_udp, address, 30053)["from"] == (address, 30053)
        assert [space.call(wrong_checksums) for space in spaces] == [0, 0, 0]
    finally:
        for space in spaces:
            space.call(offload_checksums, True)


@pytest.mark.parametrize("address", [EXTERNAL, BALANCER, SERVICE_IPS["v4"], SERVICE_IPS["v6"]])
def test_every_frontend_type_is_served_for_external_clients(
    variant: OutsideClientCluster, address: str
) -> None:
    assert set(variant.outside.call(clients.spread_tcp, address, 80, clients.ENOUGH)) == {"w1", "w2"}
    assert variant.outside.call(clients.ask_udp, address, 53)["from"] == (address, 53)


def _echo(host: str, port: int, size: int) -> bool:
    """Sends a datagram that needs fragments; returns True if the server replies."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.sendto(b"echo", (host, port))
        assert sock.recv(100) == b"echo"
        # The server replies with a line to anything else, if it receives the whole datagram.
        sock.sendto(os.urandom(size), (host, port))
        return b"name" in sock.recv(65536)


def test_fragmented_datagrams_are_reassembled(variant: OutsideClientCluster) -> None:
    for address in (variant.a.address, variant.a.address6):
        assert variant.outside.call(_echo, address, 30053, 2000)


def test_data_in_both_directions_is_intact(variant: OutsideClientCluster) -> None:
    """veth devices pass GSO packets and offload checksums."""
    assert variant.outside.call(clients.is_echoed, variant.a.address, NODE_PORT, 5_000_000)
    assert variant.outside.call(clients.is_echoed, variant.a.address6, NODE_PORT, 2_000_000)


def test_sigkill_and_restart_of_the_agent_lose_no_connection(variant: OutsideClientCluster) -> None:
    """One long-lived connection and thousands of short ones run while the agent restarts."""
    cluster = variant
    agent = cluster.lab.agents[-1]
    with connection_load.running(cluster.outside, cluster.a.address, NODE_PORT) as running:
        for stop in (agent.kill, agent.stop):
            stop()
            time.sleep(0.2)
            agent.start()
            time.sleep(0.2)
    assert running.result["errors"] == []
    assert running.result["count"] > 50


def test_flows_survive_a_change_of_map_sizes(
    variant: OutsideClientCluster, request: pytest.FixtureRequest
) -> None:
    """Flows and the peer addresses of connected sockets are copied to maps of other sizes.

    A connection whose endpoint is removed meanwhile goes on for as long as one that may come back is waited for.
    """
    cluster = variant
    agent = cluster.lab.agents[-1]
    # No other Service has this backend.
    servers.start(cluster.w2, "leaves", 8090, 8063)
    leaving, moved = cluster.manifests / "leaving.yaml", "203.0.113.29"
    cluster.add_load_balancer("moved", "10.96.1.9", moved, [])
    ports = [{"name": "http", "port": 8090, "protocol": "TCP"}]
    manifests.write(leaving, manifests.slice_of("moved", [cluster.endpoint_on_b()], ports=ports))
    until(
        lambda: cluster.outside.call(clients.connect_error, moved, 80, 0.3) == "connected",
        "the Service is not served",
    )
    inside = HeldConnection(cluster.client, SERVICE_IPS["v4"], 80)
    with connection_load.running(cluster.outside, cluster.a.address, NODE_PORT) as running:
        held = [
            HeldConnection(cluster.outside, address, 80) for address in (EXTERNAL, SERVICE_IPS["v6"], moved)
        ]
        agent.stop()
        leaving.unlink()
        cluster.add_load_balancer("moved", "10.96.1.9", moved, [cluster.endpoint_on_a()])
        # The bypass is off now, but flows that were created with it keep it.
        options = [o for o in VARIANTS[request.node.callspec.params["variant"]] if o != "--bypass-netfilter"]
        # In an emulator a start takes longer than the default.
        options += ["--stale-tcp-seconds", "120"]
        bigger = cluster.agent(*options, "--max-services", "1000", "--max-conntrack", "100000").start()
        assert "copied flows from maps of other sizes" in bigger.text
        assert [each.ask() for each in (*held, inside)] == ["alive"] * 4
        assert cluster.outside.call(clients.ask_tcp, moved, 80)["name"] == "w1"
    # A connection in SYN-SENT may pass programs with maps of both sizes. The long-lived connection is used
    # after each short one, so that its loss would make every later round an error.
    assert len(running.result["errors"]) < 5, running.result


@pytest.mark.parametrize("is_watched", [True, False], ids=["while an agent runs", "while no agent runs"])
def test_connections_outlive_their_service(cluster: OutsideClientCluster, *, is_watched: bool) -> None:
    """As with kube-proxy, although nothing else has the address then; also the next agents, with maps of any size."""
    agent = cluster.lab.agents[-1]
    addresses = "203.0.113.31", "10.96.1.31", "fd00:10:96::31"
    balancer, *cluster_ips = addresses
    for address in cluster_ips:
        cluster.outside.route(address, cluster.a)
    cluster.add_load_balancer("deleted", cluster_ips[0], balancer, [cluster.endpoint_on_b()])
    cluster.add("deleted6", cluster_ips[1], [manifests.endpoint(cluster.w2.address6, "node-b")])

    def connected() -> list[bool]:
        ask = clients.connect_error
        return [cluster.outside.call(ask, each, 80, 0.3) == "connected" for each in addresses]

    until(lambda: all(connected()), "the Services are not served")
    held = [HeldConnection(cluster.outside, address, 80) for address in addresses]
    if not is_watched:
        agent.stop()
    for name in ("deleted", "deleted6"):
        cluster.remove(name)
    if is_watched:
        until(lambda: not any(connected()), "the Services are served still")
        assert [each.ask() for each in held] == ["alive"] * 3
        agent.stop()
        agent = cluster.agent("--stale-tcp-seconds", "0.5").start()
        assert [each.ask() for each in held] == ["alive"] * 3
        agent.stop()
    size = "1000" if is_watched else "500"
    cluster.agent("--stale-tcp-seconds", "0.5", "--max-services", size).start()
    assert [each.ask() for each in held] == ["alive"] * 3
    assert not any(connected())
    assert "deleted" not in cluster.a.cli("service", "list")


# -- policies


def test_external_traffic_policy_local_preserves_the_client_address_and_uses_local_endpoints(
    cluster: OutsideClientCluster,
) -> None:
    cluster.add_load_balancer(
        "local",
        "10.96.1.1",
        "203.0.113.21",
        [cluster.endpoint_on_a(), cluster.endpoint_on_b()],
        externalTrafficPolicy="Local",
    )
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.21", 80, 0.3) == "connected",
        "the Service is not served",
    )
    for _ in range(10):
        reply = cluster.outside.call(clients.ask_tcp, "203.0.113.21", 80)
        assert (reply["name"], reply["peer"]) == ("w1", cluster.outside.address)
    assert cluster.outside.call(clients.ask_udp, "203.0.113.21", 53)["peer"] == cluster.outside.address


def test_external_traffic_policy_local_drops_without_local_endpoints_and_rejects_without_any(
    cluster: OutsideClientCluster,
) -> None:
    cluster.add_load_balancer(
        "remote", "10.96.1.2", "203.0.113.22", [cluster.endpoint_on_b()], externalTrafficPolicy="Local"
    )
    cluster.add_load_balancer("none", "10.96.1.3", "203.0.113.23", [], externalTrafficPolicy="Local")
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.23", 80, 0.3) == "ECONNREFUSED",
        "the client gets no RST",
    )
    assert cluster.outside.call(clients.connect_error, "203.0.113.22", 80, 0.5) == "TimeoutError"
    status = json.loads(cluster.a.cli("status", "-o", "json"))
    reasons = {(p["action"], p["reason"]) for p in status["packets"]}
    assert {("rejected", "no-endpoint"), ("dropped", "no-local-endpoint")} <= reasons


def test_udp_to_a_service_without_endpoints_gets_port_unreachable(cluster: OutsideClientCluster) -> None:
    """ICMP and ICMPv6 port unreachable make the socket return ECONNREFUSED."""
    for address in ("10.96.0.20", "fd00:10:96::20"):
        cluster.outside.route(address, cluster.a)
        assert cluster.outside.call(refused_datagram, address, 53) == "ECONNREFUSED"
        assert cluster.outside.call(clients.connect_error, address, 80) == "ECONNREFUSED"


def test_unknown_port_of_a_cluster_ip_is_refused_in_packets_and_at_the_socket(
    cluster: OutsideClientCluster,
) -> None:
    for space in (cluster.outside, cluster.client, cluster.a):
        for address in (SERVICE_IPS["v4"], SERVICE_IPS["v6"]):
            assert space.call(clients.connect_error, address, 81) == "ECONNREFUSED"


def test_source_ranges_apply_to_external_clients_pods_and_the_node(cluster: OutsideClientCluster) -> None:
    cluster.add_load_balancer(
        "restricted",
        "10.96.1.4",
        "203.0.113.24",
        [cluster.endpoint_on_b()],
        loadBalancerSourceRanges=[f"{cluster.outside.address}/32"],
    )
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected",
        "the listed client is not served",
    )
    assert cluster.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    assert cluster.a.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"
    cluster.add_load_balancer(
        "restricted",
        "10.96.1.4",
        "203.0.113.24",
        [cluster.endpoint_on_b()],
        loadBalancerSourceRanges=[f"{cluster.client.address}/32"],
    )
    until(
        lambda: cluster.client.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "connected",
        "the listed pod is not served",
    )
    assert cluster.outside.call(clients.connect_error, "203.0.113.24", 80, 0.3) == "TimeoutError"


def test_source_ranges_apply_to_a_load_balancer_address_that_is_an_external_ip(
    cluster: OutsideClientCluster,
) -> None:
    """spec.externalIPs with the load balancer's address opens it to nobody; its other addresses have no ranges."""
    cluster.outside.route("203.0.113.27", cluster.a)
    cluster.add_load_balancer(
        "published",
        "10.96.1.7",
        "203.0.113.26",
        [cluster.endpoint_on_b()],
        externalIPs=["203.0.113.26", "203.0.113.27"],
        loadBalancerSourceRanges=[f"{cluster.client.address}/32"],
    )
    until(
        lambda: cluster.client.call(clients.connect_error, "203.0.113.26", 80, 0.3) == "connected",
        "the listed pod is not served",
    )
    assert cluster.outside.call(clients.connect_error, "203.0.113.27", 80, 5) == "connected"
    for space in (cluster.outside, cluster.a):
        assert space.call(clients.connect_error, "203.0.113.26", 80, 0.3) == "TimeoutError"


def test_thousands_of_source_ranges_apply_and_are_removed(cluster: OutsideClientCluster) -> None:
    ranges = [f"10.{i // 250}.{i % 250}.0/24" for i in range(5000)] + [f"{cluster.outside.address}/32"]
    cluster.add_load_balancer(
        "many", "10.96.1.5", "203.0.113.25", [cluster.endpoint_on_b()], loadBalancerSourceRanges=ranges
    )
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.25", 80, 0.3) == "connected",
        "the last range is missing",
    )
    cluster.remove("many")
    status = json.loads(cluster.a.cli("status", "-o", "json"))
    until(
        lambda: (
            next(
                m["entries"]
                for m in json.loads(cluster.a.cli("status", "-o", "json"))["maps"]
                if m["name"] == "source_ranges"
            )
            < 10
        ),
        f"source ranges are left: {status['maps']}",
    )


# -- endpoint changes with existing flows


def _fixed(host: str, port: int, own: int, count: int, pause: float) -> list[str]:
    """The backends that reply to datagrams of one socket with a fixed source port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", own))
        sock.settimeout(1)
        found = []
        for _ in range(count):
            sock.sendto(b"?", (host, port))
            try:
                found.append(json.loads(sock.recv(4096))["name"])
            except TimeoutError:
                found.append("timeout")
            time.sleep(pause)
        return found


def test_udp_client_with_a_fixed_source_port_follows_endpoint_changes(cluster: OutsideClientCluster) -> None:
    cluster.add_load_balancer("moving", "10.96.1.12", "203.0.113.32", [cluster.endpoint_on_a()])
    until(
        lambda: cluster.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"],
        "the Service is not served",
    )
    for endpoint, name in (
        (cluster.endpoint_on_b(), "w2"),
        (cluster.endpoint_on_a(), "w1"),
        (cluster.endpoint_on_b(), "w2"),
    ):
        cluster.add_load_balancer("moving", "10.96.1.12", "203.0.113.32", [endpoint])
        until(lambda n=name: cluster.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == [n], name)  # type: ignore[misc]
    # For UDP, an unready endpoint is treated as a removed one.
    both = [cluster.endpoint_on_a(), cluster.endpoint_on_b(ready=False)]
    cluster.add_load_balancer("moving", "10.96.1.12", "203.0.113.32", both)
    until(
        lambda: cluster.outside.call(_fixed, "203.0.113.32", 53, 12345, 1, 0) == ["w1"],
        "the unready endpoint still gets datagrams",
    )


def test_connections_survive_unready_and_terminating_endpoints_and_are_reset_when_removed(
    cluster: OutsideClientCluster,
) -> None:
    def only(*endpoints: manifests.Document) -> None:
        cluster.add_load_balancer("stay", "10.96.1.13", "203.0.113.33", list(endpoints))

    only(cluster.endpoint_on_a())
    until(
        lambda: cluster.outside.call(clients.connect_error, "203.0.113.33", 80, 0.3) == "connected",
        "the Service is not served",
    )
    held = HeldConnection(cluster.outside, "203.0.113.33", 80)
    assert held.ask() == "alive"
    for step in (
        [cluster.endpoint_on_a(ready=False), cluster.endpoint_on_b()],
        [cluster.endpoint_on_a(ready=False, terminating=True), cluster.endpoint_on_b()],
    ):
        only(*step)
        until(
            lambda: set(cluster.outside.call(clients.spread_tcp, "203.0.113.33", 80, 5)) == {"w2"},
            "new connections do not all reach the ready endpoint",
        )
        assert held.ask() == "alive"
    only(cluster.endpoint_on_b())
    until(lambda: held.ask() != "alive", "the connection persists after its endpoint is removed")
    assert held.ask() in ("ConnectionResetError", "BrokenPipeError")


# -- scale


def test_fifty_thousand_concurrent_masqueraded_connections() -> None:
    """They have four backends. A request is sent on each once all are open."""
    with Lab() as lab:
        cluster = OutsideClientCluster(lab)
        more = [cluster.a.pod("w3"), cluster.b.pod("w4")]
        for pod in more:
            servers.start(pod, pod.name, 8080, 8053, 9000)
        cluster.write_web(cluster.w1, cluster.w2, *more)
        cluster.agent("--max-conntrack", "524288", "--masquerade-ports", "1024-65000").start()
        # A client has 50,000 local ports per destination address and port.
        hosts = [
            (cluster.a.address, NODE_PORT),
            (EXTERNAL, 80),
            (BALANCER, 80),
            (cluster.a.address, NODE_PORT),
        ]
        holders = [
            cluster.outside.popen(
                [sys.executable, "-m", "tests.e2e.many", host, str(port), "12500"], stdin=-1, stdout=-1
            )
            for host, port in hosts
        ]

        def counts() -> list[int]:
            return [int(holder.stdout.readline()) for holder in holders if holder.stdout is not None]

        assert counts() == [12_500] * 4
        status = json.loads(cluster.a.cli("status", "-o", "json"))
        entries = next(m["entries"] for m in status["maps"] if m["name"] == "conntrack")
        assert entries >= 4 * 50_000
        for holder in holders:
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            holder.stdin.flush()
        assert counts() == [12_500] * 4
