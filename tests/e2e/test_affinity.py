"""Session affinity and ``ebpfproxy backend drain``, at the socket and in packets."""

from __future__ import annotations

import itertools
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.netlink.namespaces import netns_cookie
from tests.lab import Agent, Lab, Pod, choices, manifests
from tests.lab.waiting import until
from tests.packets.wire import PASS, Wire

pytestmark = pytest.mark.root

BACKENDS = [f"10.244.2.{i}" for i in range(10, 20)]
LOCAL = "10.244.1.77"
#: Cluster IP, load balancer IP and seconds of affinity (0: none), by name of the Service.
SERVICES = {
    "sticky": ("10.96.6.1", "203.0.113.1", 3600),
    "short": ("10.96.6.2", "203.0.113.2", 2),
    "minute": ("10.96.6.5", "203.0.113.5", 60),
    "loose": ("10.96.6.3", "203.0.113.3", 0),
    "sticky-rr": ("10.96.6.4", "203.0.113.4", 3600),
}
_ports = itertools.count(20000)


class AffinityCluster:
    def __init__(self, lab: Lab) -> None:
        self.node = lab.node("node-a")
        self.pods = [self.node.pod(f"client{i}") for i in range(3)]
        self.folder: Path = lab.folder / "manifests"
        self.write(BACKENDS)
        self.agent: Agent = self.node.agent(manifests=self.folder).start()
        self.wire = Wire(self.node)

    def write(self, addresses: list[str], *, not_ready: str = "") -> None:
        endpoints = [manifests.endpoint(each, "node-b", ready=each != not_ready) for each in addresses]
        documents = []
        for name, (cluster_ip, balancer, seconds) in SERVICES.items():
            spec: dict[str, Any] = {}
            if seconds:
                spec["sessionAffinity"] = "ClientIP"
                spec["sessionAffinityConfig"] = {"clientIP": {"timeoutSeconds": seconds}}
            service = manifests.service(
                name,
                type="LoadBalancer",
                clusterIPs=[cluster_ip],
                ports=[
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "other", "port": 54, "protocol": "UDP"},
                ],
                **spec,
            )
            if name == "sticky-rr":
                service["metadata"]["annotations"] = {"ebpfproxy.io/lb-algorithm": "rr"}
            service["status"] = {"loadBalancer": {"ingress": [{"ip": balancer}]}}
            ports = [
                {"name": "dns", "port": 8053, "protocol": "UDP"},
                {"name": "other", "port": 8054, "protocol": "UDP"},
            ]
            documents += [
                service,
                manifests.slice_of(name, endpoints, ports=ports),
            ]
        manifests.write(self.folder / "all.yaml", *documents)

    def set_backends(self, addresses: list[str]) -> None:
        self.write(addresses)

        def programmed() -> bool:
            rows = json.loads(self.node.cli("service", "get", "shop/loose", "-o", "json"))
            return all(
                {b["address"].split(":")[0] for b in row["backends"]} == set(addresses) for row in rows
            )

        until(programmed)

    def socket(self, name: str, pod: int = 0, count: int = 1, port: int = 53) -> set[str]:
        """The backends that connect() of a pod's sockets selects."""
        return set(self.pods[pod].call(choices.choices, SERVICES[name][0], port, count))

    def packet(self, name: str, client: str, count: int = 1) -> set[str]:
        """The backends of new flows of an external client."""
        found = set()
        for _ in range(count):
            result = self.wire.ingress(
                IP(src=client, dst=SERVICES[name][1]) / UDP(sport=next(_ports), dport=53) / b"?"
            )
            assert result.verdict == PASS
            found.add(result.packet[IP].dst)
        return found

    def packet_of_pod(self, name: str, pod: int) -> str:
        """The backend of a new flow of a pod that passed no socket hook."""
        packet = IP(src=self.pods[pod].address, dst=SERVICES[name][0]) / UDP(sport=next(_ports), dport=53)
        result = self.wire.ingress(packet / b"?", device=f"p{pod + 1}")
        assert result.verdict == PASS
        backend: str = result.packet[IP].dst
        return backend

    def age(self, seconds: float) -> None:
        """Moves the last use of every affinity back by ``seconds``, in the map."""
        path = next((self.node.bpf_root / "ebpfproxy").glob("v*/maps/affinity"))
        fd = bpf.get_pinned(path)
        for keys, values, count in bpf.map_lookup_batches(fd, 24, 16, 4096):
            for i in range(count):
                backend, _, last = struct.unpack("=IIQ", values[16 * i : 16 * (i + 1)])
                earlier = struct.pack("=IIQ", backend, 0, last - int(seconds * 1e9))
                bpf.map_update(fd, bytes(keys[24 * i : 24 * (i + 1)]), earlier)
        os.close(fd)

    def affinity(self, *arguments: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.node.cli("affinity", "list", "-o", "json", *arguments))
        return rows


@pytest.fixture(scope="module")
def shared() -> Iterator[AffinityCluster]:
    with Lab() as lab:
        made = AffinityCluster(lab)
        yield made
        made.wire.close()


@pytest.fixture
def cluster(shared: AffinityCluster) -> AffinityCluster:
    shared.set_backends(BACKENDS)
    shared.node.cli("affinity", "flush", "--all")
    return shared


@pytest.mark.parametrize("name", ["sticky", "sticky-rr"])
def test_affinity_keeps_a_pod_or_external_client_at_one_backend(cluster: AffinityCluster, name: str) -> None:
    """All sockets of a pod are one client; outside the cluster an address is one."""
    by_pod = [cluster.socket(name, pod, 30) for pod in range(3)]
    by_address = [cluster.packet(name, f"198.51.100.{i}", 5) for i in range(40)]
    assert all(len(found) == 1 for found in by_pod + by_address)
    assert len(set.union(*by_address)) > 5
    assert [cluster.socket(name, pod, 5) for pod in range(3)] == by_pod


def test_pod_has_one_affinity_at_sockets_and_in_packets(cluster: AffinityCluster) -> None:
    """The agent maps addresses to network namespaces, those of a new pod within a sweep (10 s)."""
    new_pod = cluster.node.pod("new-pod")
    cluster.pods.append(new_pod)
    cluster.wire.close()
    cluster.wire = Wire(cluster.node)
    until(lambda: f"netns:{cookie(new_pod)}" in {row["client"] for row in seen(cluster, 3)})
    for pod in range(4):
        assert cluster.socket("sticky-rr", pod, 3) == {cluster.packet_of_pod("sticky-rr", pod)}
    assert len({row["client"] for row in cluster.affinity("--service", "shop/sticky-rr")}) == 4


def cookie(pod: Pod) -> int:
    found: int = pod.call(netns_cookie)
    return found


def seen(cluster: AffinityCluster, pod: int) -> list[dict[str, Any]]:
    """The affinity entries after one packet of the pod."""
    cluster.node.cli("affinity", "flush", "--all")
    cluster.packet_of_pod("sticky", pod)
    return cluster.affinity()


def test_connections_spread_over_backends_without_affinity(cluster: AffinityCluster) -> None:
    assert len(cluster.socket("loose", 0, 100)) > 5


def test_affinity_is_per_service_port(cluster: AffinityCluster) -> None:
    """As in kube-proxy."""
    dns = [cluster.socket("sticky", pod, 3) for pod in range(3)]
    other = [cluster.socket("sticky", pod, 3, port=54) for pod in range(3)]
    assert all(len(found) == 1 for found in dns + other)
    assert len(cluster.affinity("--service", "shop/sticky")) == 6


def test_affinity_timeout_is_refreshed_by_use_and_expires_without(cluster: AffinityCluster) -> None:
    """The timeout is two seconds: it lasts if used every second, and expires otherwise."""
    names = [f"198.51.100.{i}" for i in range(30)]

    def lasts_three_seconds() -> bool:
        """Returns False if the machine was too busy to use each affinity within two seconds."""
        first, used = {client: cluster.packet("short", client) for client in names}, began
        for _ in range(3):
            time.sleep(1)
            before, found = time.monotonic(), {client: cluster.packet("short", client) for client in names}
            if time.monotonic() - used >= 2:
                return False
            assert found == first
            used = before
        return True

    began = time.monotonic()
    deadline = began + 100
    while not lasts_three_seconds():
        began = time.monotonic()
        assert began < deadline, "the machine is too busy for this test"
    first = {client: cluster.packet("short", client) for client in names}
    time.sleep(2.2)
    assert not cluster.affinity("--service", "shop/short")
    again = {client: cluster.packet("short", client) for client in first}
    assert again != first


def test_removed_backend_is_replaced_for_its_clients_only(cluster: AffinityCluster) -> None:
    before = {client: cluster.packet("sticky", client) for client in (f"198.51.100.{i}" for i in range(50))}
    (gone,) = before["198.51.100.0"]
    cluster.set_backends([backend for backend in BACKENDS if backend != gone])
    after = {client: cluster.packet("sticky", client, 2) for client in before}
    for client, backend in before.items():
        assert len(after[client]) == 1
        assert (after[client] != backend) == (backend == {gone})
    # The backend does not regain its former clients, which have another one now.
    cluster.set_backends(BACKENDS)
    assert {client: cluster.packet("sticky", client) for client in before} == after


def test_affinity_survives_an_agent_restart_and_changes_of_other_backends(cluster: AffinityCluster) -> None:
    before = [cluster.socket("sticky", pod) for pod in range(3)]
    cluster.agent.kill()
    cluster.agent = cluster.node.agent(manifests=cluster.folder).start()
    assert [cluster.socket("sticky", pod, 5) for pod in range(3)] == before
    kept = set.union(*before)
    cluster.set_backends([b for b in BACKENDS if b in kept] + [LOCAL])
    assert [cluster.socket("sticky", pod, 5) for pod in range(3)] == before


def test_affinity_lasts_for_timeout_seconds_since_its_last_use(cluster: AffinityCluster) -> None:
    """The test does not wait: it moves the time of the last use back in the map, not before boot."""
    clients = [f"198.51.100.{i}" for i in range(40)]
    before = {client: cluster.packet("minute", client) for client in clients}
    cluster.age(40)
    assert {client: cluster.packet("minute", client) for client in clients} == before
    cluster.age(40)
    assert {client: cluster.packet("minute", client) for client in clients} == before, (
        "each use restarts the timeout"
    )
    cluster.age(61)
    assert {client: cluster.packet("minute", client) for client in clients} != before


def test_affinity_survives_a_new_map_size_and_a_full_map_evicts(cluster: AffinityCluster) -> None:
    before = [cluster.socket("sticky", pod) for pod in range(3)]
    cluster.agent.stop()
    cluster.agent = cluster.node.agent("--max-affinity", "256", manifests=cluster.folder).start()
    cluster.wire.close()
    cluster.wire = Wire(cluster.node)
    assert [cluster.socket("sticky", pod, 3) for pod in range(3)] == before
    for i in range(2000):
        cluster.packet("sticky", f"198.{18 + i // 250}.{i % 250}.1")
    assert len(cluster.affinity()) <= 256
    assert all(len(cluster.socket("sticky", pod, 20)) == 1 for pod in range(3))


def test_affinity_list_and_flush(cluster: AffinityCluster) -> None:
    (backend,) = cluster.socket("sticky", 1)
    cluster.packet("sticky", "198.51.100.99")
    rows = {row["client"]: row for row in cluster.affinity()}
    (pod,) = (row for row in rows.values() if row["client"].startswith("netns:"))
    assert pod["name"] == cluster.pods[1].netns
    assert (pod["service"], pod["port_name"], pod["backend"]) == ("shop/sticky", "dns", f"{backend}:8053")
    assert 3500 < rows["198.51.100.99"]["expires"] <= 3600
    assert "flushed 1 clients" in cluster.node.cli("affinity", "flush", "--client", pod["name"])
    assert [row["client"] for row in cluster.affinity()] == ["198.51.100.99"]
    assert cluster.node.cli("affinity", "flush", check=False) == ""


def test_drained_backend_gets_no_new_connections_until_the_drain_is_undone(cluster: AffinityCluster) -> None:
    client = next(
        c for c in (f"198.51.100.{i}" for i in range(200)) if cluster.packet("sticky", c) == {BACKENDS[3]}
    )
    assert "is drained" in cluster.node.cli("backend", "drain", BACKENDS[3])
    states = {
        row["address"]: row["state"] for row in json.loads(cluster.node.cli("backend", "list", "-o", "json"))
    }
    assert {a for a, state in states.items() if state == "drained"} == {
        f"{BACKENDS[3]}:8053",
        f"{BACKENDS[3]}:8054",
    }
    assert BACKENDS[3] not in cluster.socket("loose", 0, 200)
    assert cluster.packet("sticky", client) != {BACKENDS[3]}
    cluster.agent.kill()
    cluster.agent = cluster.node.agent(manifests=cluster.folder).start()
    assert BACKENDS[3] not in cluster.socket("loose", 0, 100)
    assert "no longer drained" in cluster.node.cli("backend", "drain", BACKENDS[3], "--undo")
    assert BACKENDS[3] in cluster.socket("loose", 0, 300)


def test_drain_of_one_port_does_not_affect_other_ports(cluster: AffinityCluster) -> None:
    cluster.node.cli("backend", "drain", f"{BACKENDS[0]}:8053")
    assert BACKENDS[0] not in cluster.socket("loose", 0, 200)
    assert BACKENDS[0] in cluster.socket("loose", 0, 300, port=54)
    cluster.node.cli("backend", "drain", f"{BACKENDS[0]}:8053", "--undo")


def test_drain_ends_when_the_endpoint_is_removed(cluster: AffinityCluster) -> None:
    cluster.node.cli("backend", "drain", BACKENDS[5])
    cluster.set_backends(BACKENDS[:5])
    time.sleep(1)
    cluster.set_backends(BACKENDS)
    until(lambda: BACKENDS[5] in cluster.socket("loose", 0, 100))


def test_drain_of_an_endpoint_that_is_not_ready_is_applied_once_it_is(cluster: AffinityCluster) -> None:
    """It gets no new connections anyway: its state says nothing about the request."""
    address = BACKENDS[7]
    cluster.write(BACKENDS, not_ready=address)

    def states() -> set[str]:
        rows = json.loads(cluster.node.cli("backend", "list", "-o", "json"))
        return {row["state"] for row in rows if row["address"].startswith(f"{address}:")}

    until(lambda: states() == {"quarantined"})
    assert "is drained" in cluster.node.cli("backend", "drain", address)
    cluster.write(BACKENDS)
    until(lambda: states() == {"drained"})
    cluster.write(BACKENDS, not_ready=address)
    until(lambda: states() == {"quarantined"})
    assert "no longer drained" in cluster.node.cli("backend", "drain", address, "--undo")
    cluster.set_backends(BACKENDS)


def test_undone_drain_of_a_backend_that_something_else_drains_is_done(cluster: AffinityCluster) -> None:
    both = BACKENDS[8], f"{BACKENDS[8]}:8053"
    for each in both:
        cluster.node.cli("backend", "drain", each)
    first, second = (cluster.node.cli("backend", "drain", each, "--undo") for each in both)
    assert "no longer drained" in first and "still gets no new connections" in first
    assert "no longer drained" in second and "still" not in second


def test_drain_of_an_unknown_backend_fails(cluster: AffinityCluster) -> None:
    for arguments in (["10.99.99.99"], ["10.244.2.10:1"], [BACKENDS[0], "--undo"]):
        with pytest.raises(RuntimeError, match=r"no backend|is not drained"):
            cluster.node.cli("backend", "drain", *arguments)
    with pytest.raises(RuntimeError, match="is not ADDRESS or ADDRESS:PORT"):
        cluster.node.cli("backend", "drain", "web-0")
