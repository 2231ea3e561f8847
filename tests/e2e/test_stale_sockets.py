"""Sockets of a removed backend are closed or redirected in all network namespaces, and no others."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Agent, Lab, LabNode, manifests, servers
from tests.lab.holders import Holder
from tests.lab.waiting import until

pytestmark = pytest.mark.root

SERVICE, SERVICE6, OTHER = "10.96.5.1", "fd00:10:96:5::1", "10.96.5.2"
LATE = "10.96.5.8"
SILENT = "10.244.2.77"
PORTS = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "http", "port": 80, "protocol": "TCP"}]
SLICE_PORTS = [
    {"name": "dns", "port": 8053, "protocol": "UDP"},
    {"name": "http", "port": 8080, "protocol": "TCP"},
]
#: Names of the sockets that are connected through the Service.
THROUGH = {"v4", "v6", "mapped"}


class SharedBackendCluster:
    """Two Services with the same backend, the pod ``web``, and a client pod."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node: LabNode = lab.node("node-a")
        self.web, self.client = self.node.pod("web"), self.node.pod("client")
        servers.start(self.web, "web", 8053, 8080)
        # Without it the node says that the gateway is not there, after three seconds.
        self.node.run(["ip", "route", "add", "blackhole", SILENT])
        self.folder: Path = lab.folder / "manifests"
        self.set_backend("ready")

    def set_backend(self, state: str) -> None:
        """Sets the state of the Service's endpoint: ready, unready, terminating or gone."""

        def slices(name: str, addresses: tuple[str, ...], **conditions: Any) -> Iterator[manifests.Document]:
            for address in addresses:
                endpoint = manifests.endpoint(address, "node-a", **conditions)
                yield manifests.slice_of(name, [endpoint], ports=SLICE_PORTS)

        both = (self.web.address, self.web.address6)
        conditions = {"ready": state == "ready", "terminating": state == "terminating"}
        manifests.write(
            self.folder / "all.yaml",
            manifests.service("web", clusterIPs=[SERVICE, SERVICE6], ports=PORTS),
            *slices("web", () if state == "gone" else both, **conditions),
            manifests.service("other", clusterIPs=[OTHER], ports=PORTS),
            *slices("other", (self.web.address,)),
        )

    def agent(self, *arguments: str) -> Agent:
        return self.node.agent(*arguments, manifests=self.folder)

    def hold(self, kind: str) -> Holder:
        """Opens one socket of each kind that is connected to the pod."""
        port, target = (53, 8053) if kind == "udp" else (80, 8080)
        holder = Holder(
            self.client,
            [
                ("v4", kind, SERVICE, port, 1),
                ("v6", kind, SERVICE6, port, 1),
                ("mapped", kind, f"::ffff:{SERVICE}", port, 1),
                ("other", kind, OTHER, port, 1),
                ("direct", kind, self.web.address, target, 1),
                ("direct6", kind, self.web.address6, target, 1),
            ],
        )
        holder.wait()
        return holder

    def backends(self) -> dict[str, Any]:
        rows = json.loads(self.node.cli("backend", "list", "-o", "json"))
        return {f"{row['address']}/{row['protocol']}": row for row in rows}

    def write_late(self, name: str, *addresses: str) -> None:
        """Writes a Service of its own with these endpoints, and waits until it is programmed."""
        endpoints = [manifests.endpoint(address, "node-a") for address in addresses]
        manifests.write(
            self.folder / f"{name}.yaml",
            manifests.service(name, clusterIPs=[LATE], ports=PORTS),
            manifests.slice_of(name, endpoints, ports=SLICE_PORTS),
        )
        until(lambda: self.is_served(name) is bool(addresses))

    def is_served(self, name: str) -> bool:
        """Says if a Service has an endpoint."""
        rows = json.loads(self.node.cli("service", "list", "-o", "json"))
        return any(row["backends"] for row in rows if row["name"] == name)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SharedBackendCluster]:
    with Lab() as lab:
        yield SharedBackendCluster(lab)


@pytest.fixture
def agent(cluster: SharedBackendCluster) -> Iterator[Callable[..., Agent]]:
    """Starts an agent with options; stops it after the test."""
    started: list[Agent] = []

    def start(*arguments: str) -> Agent:
        started.append(cluster.agent("--stale-tcp-seconds", "0.2", *arguments).start())
        return started[-1]

    cluster.set_backend("ready")
    yield start
    for each in started:
        if each.process is not None and each.process.poll() is None:
            each.stop()


def ended(holder: Holder) -> set[str]:
    found, _ = holder.result()
    return {name.split()[0] if "aborted" not in name else name for name in found}


@pytest.mark.parametrize("kind", ["udp", "tcp"])
@pytest.mark.parametrize(
    ("state", "option", "ends"),
    [
        ("gone", "gone", {"tcp"}),
        ("unready", "gone", set[str]()),
        ("unready", "unready", {"tcp"}),
        ("gone", "never", set[str]()),
        ("terminating", "unready", set[str]()),
    ],
)
def test_stale_tcp_closes_only_sockets_of_the_service_that_lost_the_backend(
    cluster: SharedBackendCluster,
    agent: Callable[..., Agent],
    kind: str,
    state: str,
    option: str,
    ends: set[str],
) -> None:
    """Sockets of the other Service and those that connected to the pod itself stay open.

    UDP sockets are redirected: tests/field/test_udp_stale.py.
    """
    agent("--stale-tcp", option)
    holder = cluster.hold(kind)
    wanted = THROUGH if kind in ends else set()
    holder.watch(len(wanted))
    cluster.set_backend(state)
    assert ended(holder) == wanted


def test_connection_in_syn_sent_to_a_removed_backend_is_closed(
    cluster: SharedBackendCluster, agent: Callable[..., Agent]
) -> None:
    agent()
    slow = manifests.service("slow", clusterIPs=["10.96.5.9"], ports=PORTS)
    silent = manifests.slice_of("slow", [manifests.endpoint(SILENT, "node-b")], ports=SLICE_PORTS)
    manifests.write(cluster.folder / "slow.yaml", slow, silent)
    deadline = time.monotonic() + 60
    while f"{SILENT}:8080/TCP" not in cluster.backends():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    holder = Holder(cluster.client, [("opening", "tcp-opening", "10.96.5.9", 80, 3)])
    holder.wait()
    holder.watch(3)
    manifests.write(cluster.folder / "slow.yaml", slow)
    found, _ = holder.result()
    assert found == {"opening": 3}


def test_sockets_of_a_backend_removed_while_no_agent_ran_are_closed_at_start(
    cluster: SharedBackendCluster, agent: Callable[..., Agent]
) -> None:
    first = agent()
    holder = cluster.hold("tcp")
    first.kill()
    cluster.set_backend("gone")
    agent()
    # The socket keeps its error until it is read, so that the start time of the agent does not matter.
    holder.watch(len(THROUGH))
    assert ended(holder) == THROUGH


@pytest.mark.parametrize("option", ["unready", "gone"])
def test_sockets_of_an_endpoint_that_is_unready_when_the_next_agent_starts(
    cluster: SharedBackendCluster, agent: Callable[..., Agent], option: str
) -> None:
    """The agent before it was waiting for the endpoint to be added again."""
    first = agent("--stale-tcp-seconds", "600", "--stale-tcp", option)
    holder = cluster.hold("tcp")
    cluster.set_backend("gone")
    until(lambda: cluster.backends()[f"[{cluster.web.address6}]:8080/TCP"]["state"] == "quarantined")
    first.kill()
    cluster.set_backend("unready")
    agent("--stale-tcp-seconds", "600", "--stale-tcp", option)
    wanted = THROUGH if option == "unready" else set()
    holder.watch(len(wanted))
    assert ended(holder) == wanted
    holder.close()


def test_connection_that_outlives_its_service_is_no_later_ones(
    cluster: SharedBackendCluster, agent: Callable[..., Agent]
) -> None:
    """The later Service would get the id of the former, and its connections would end with its endpoint."""

    first = agent()
    cluster.write_late("former", cluster.web.address)
    holder = Holder(cluster.client, [("late", "tcp", LATE, 80, 1)])
    holder.wait()
    (cluster.folder / "former.yaml").unlink()
    until(lambda: not cluster.is_served("former"))
    first.kill()
    agent()
    cluster.write_late("later", cluster.web.address)
    cluster.write_late("later")
    holder.watch()
    assert ended(holder) == set()
    holder.close()
    (cluster.folder / "later.yaml").unlink()


def test_backend_id_is_not_reused_while_connections_are_open(
    cluster: SharedBackendCluster, agent: Callable[..., Agent]
) -> None:
    agent("--stale-tcp", "never")
    holder = Holder(cluster.client, [("v6", "tcp", SERVICE6, 80, 5)])
    holder.wait()
    name = f"[{cluster.web.address6}]:8080/TCP"
    assert cluster.backends()[name]["open"] == 5
    cluster.set_backend("gone")
    until(lambda: cluster.backends()[name]["state"] == "gone")
    assert cluster.backends()[name]["open"] == 5
    # The same endpoint gets another backend id when it is added again.
    cluster.set_backend("ready")
    until(lambda: cluster.backends()[name]["state"] == "active")
    holder.watch()
    holder.result()
    holder.watch()
    until(lambda: cluster.backends()[name]["open"] == 0)


@pytest.mark.parametrize("sizes", [(), ("--max-services", "1000")], ids=["same size", "other size"])
@pytest.mark.parametrize("option", ["unready", "gone"])
def test_sockets_of_a_service_that_was_deleted_while_no_agent_ran(
    cluster: SharedBackendCluster, agent: Callable[..., Agent], option: str, sizes: tuple[str, ...]
) -> None:
    """TCP outlives its Service, unless connections end once an endpoint is not ready."""
    first = agent("--stale-tcp", option)
    cluster.write_late("deleted", cluster.web.address)
    holder = Holder(cluster.client, [("late", "tcp", LATE, 80, 1)])
    holder.wait()
    first.kill()
    (cluster.folder / "deleted.yaml").unlink()
    agent("--stale-tcp", option, *sizes)
    assert not cluster.is_served("deleted")
    holder.watch(int(option == "unready"))
    assert ended(holder) == ({"late"} if option == "unready" else set())
    holder.close()


#: With two backends, half of the sockets are stale: 20,000.
NAMESPACES, SOCKETS, DIRECT = 20, 2000, 50


def test_stale_sockets_in_20_namespaces_are_redirected() -> None:
    """Half of them have a backend that stays, and some are connected to the removed one directly."""
    with Lab() as lab:
        node = lab.node("node-a")
        pods = [node.pod(f"client{i}") for i in range(NAMESPACES)]
        goes, stays = "10.244.2.10", "10.244.2.11"

        def write(*addresses: str) -> None:
            manifests.write(
                lab.folder / "manifests" / "all.yaml",
                manifests.service("web", clusterIPs=[SERVICE], ports=PORTS),
                manifests.slice_of(
                    "web", [manifests.endpoint(a, "node-b") for a in addresses], ports=SLICE_PORTS
                ),
            )

        write(goes, stays)
        agent = node.agent(manifests=lab.folder / "manifests").start()
        specs = [("web", "udp", SERVICE, 53, SOCKETS), ("direct", "udp", goes, 8053, DIRECT)]
        holders = [Holder(pod, [*specs], seconds=4.0) for pod in pods]
        connected: Counter[str] = Counter()
        for holder in holders:
            connected += holder.wait()
        assert sum(connected.values()) == NAMESPACES * (SOCKETS + DIRECT)
        began = time.time()
        write(stays)
        agent.wait_log("redirected stale sockets")
        took = time.time() - began
        status = json.loads(node.cli("status", "-o", "json"))
        redirected = next(each["entries"] for each in status["maps"] if each["name"] == "sock_redirects")
        assert redirected == connected[f"web {goes}"]
        print(f"{redirected} sockets redirected {took:.3f} s after the change")
