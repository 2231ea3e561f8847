"""Kubernetes events about Services and Nodes with problems, as ``kubectl describe`` shows them."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import ebpfproxy
from tests.apiserver import objects
from tests.kube.files import kubeconfig
from tests.lab import Agent, Lab, LabNode
from tests.lab.waiting import until

pytestmark = pytest.mark.root

TAKEN = 31555
_HOLD = f"""
import socket, time
sockets = [socket.create_server(("", port)) for port in ({TAKEN}, 10256)]
print("held", flush=True)
time.sleep(3600)
"""


class Cluster:
    """A node with two ports in use, and Services with invalid or conflicting fields."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.node: LabNode = lab.node("node-a")
        self._started(sys.executable, "-c", _HOLD)
        self.url = self._started(sys.executable, "-m", "tests.apiserver", "--services", "1")
        self.put("services", named("annotated", "10.96.9.1", {"ebpfproxy.io/lb-algorithm": "bogus"}))
        self.put("services", named("older", "10.96.9.2"))
        self.put("services", named("younger", "10.96.9.2"))
        self.put("services", named("sliced", "10.96.9.3"))
        self.put("endpointslices", objects.endpoint_slice("sliced", [objects.endpoint("10.0.0.300", "n")]))
        local: dict[str, Any] = {
            "type": "LoadBalancer",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": TAKEN,
        }
        self.put("services", named("checked", "10.96.9.4", **local))
        ports = [{"name": f"p{i}", "protocol": "TCP", "port": 1000 + i} for i in range(60)]
        self.put("services", named("wide", "10.96.9.5", ports=ports))

    def _started(self, *command: str) -> str:
        process = self.node.popen(list(command), join_cgroup=False, stdout=subprocess.PIPE)
        assert process.stdout is not None
        return process.stdout.readline().decode().strip()

    def control(self, path: str, body: bytes = b"") -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            connection = http.client.HTTPConnection(self.url.partition("://")[2], timeout=20)
            connection.request("POST", f"/control/{path}", body)
            found: dict[str, Any] = json.loads(connection.getresponse().read())
            return found

        return self.node.call(ask)

    def put(self, resource: str, item: dict[str, Any]) -> None:
        self.control(f"put?resource={resource}", json.dumps(item).encode())

    def agent(self, *arguments: str) -> Agent:
        path = kubeconfig(self.lab.folder / "kubeconfig", self.url, {})
        return self.node.agent("--kubeconfig", str(path), "--max-services", "40", *arguments).start()

    def events(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Events by reason and name of the object; one of several."""
        found = self.control("events")["items"]
        return {(each["reason"], each["regarding"]["name"]): each for each in found}


def named(name: str, address: str, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    made = objects.service(name, address, **spec)
    made["metadata"]["annotations"] = annotations or {}
    return made


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(lab)


WANTED = {
    ("Starting", "node-a"): f"ebpfproxy {ebpfproxy.__version__}",
    ("FailedToStartProxierHealthcheck", "node-a"): "healthz server failed: 0.0.0.0:10256: [Errno 98]",
    ("FailedToStartServiceHealthcheck", "checked"): (
        f'node node-a failed to start healthcheck "load/checked" on port {TAKEN}: [Errno 98]'
    ),
    ("ValueNotUsed", "annotated"): "metadata.annotations[ebpfproxy.io/lb-algorithm]: ",
    ("ValueNotUsed", "sliced"): "EndpointSlice sliced-x7k2p: endpoints[0].addresses[0]: ",
    ("AddressConflict", "younger"): "ClusterIP: 10.96.9.2:80/TCP already belongs to load/older",
    ("NoRoomForServicePort", "wide"): "node node-a: load/wide:p",  # the first of several
}


def test_events_report_the_problem_of_each_object(cluster: Cluster) -> None:
    agent = cluster.agent()
    until(lambda: cluster.events().keys() >= WANTED.keys(), "some events are missing", seconds=60)
    found = cluster.events()
    for key, note in WANTED.items():
        assert found[key]["note"].startswith(note), key
        assert found[key]["type"] == ("Normal" if key[0] == "Starting" else "Warning")
    assert found.keys() == WANTED.keys()
    created = len(cluster.control("events")["items"])
    until(lambda: f'ebpfproxy_events_total{{result="created"}} {created}.0' in _metrics(agent))
    assert agent.text.count("failed to send event") == 0
    agent.stop()


def test_restart_sends_only_the_starting_event(cluster: Cluster) -> None:
    before = cluster.control("events")["items"]
    agent = cluster.agent()
    until(lambda: 'ebpfproxy_events_total{result="created"} 1.0' in _metrics(agent))
    until(lambda: 'ebpfproxy_events_total{result="exists"} 0.0' not in _metrics(agent))
    agent.stop()
    after = cluster.control("events")["items"]
    assert [each["reason"] for each in after[len(before) :]] == ["Starting"]


def _metrics(agent: Agent) -> str:
    return agent.http("/metrics", 10249)[1]
