"""An agent on an API server: what it does while that is away, wrong or slow; traffic must not notice."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.lab import Agent, Lab, LabNode, Pod, clients, servers
from tests.lab.waiting import until
from tools.bench.sockets import start_api

pytestmark = pytest.mark.root

IP = "10.96.250.10"
PORT = 7777


class Cluster:
    def __init__(self, lab: Lab) -> None:
        self.node: LabNode = lab.node("node-a")
        self.client: Pod = self.node.pod("client")
        self.web: Pod = self.node.pod("web")
        servers.start(self.web, "web", PORT)
        self.api = self.start_api(0)
        self.agent: Agent = self.node.agent("--master", self.url).start()

    def start_api(self, port: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.apiserver", "--services", "20", "--port", str(port)]
        command += ["--bench-service", f"{IP}={self.web.address}"]
        process = self.node.popen(command, join_cgroup=False, stdout=subprocess.PIPE)
        assert process.stdout is not None
        self.url = process.stdout.readline().decode().strip()
        return process

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.node.cli("status", "-o", "json"))
        return found

    def watches(self) -> set[str]:
        agent = self.status()["agent"]
        assert isinstance(agent, dict)
        return {watch["state"] for watch in agent["watches"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        yield Cluster(lab)


def test_services_of_the_api_server_are_reached(cluster: Cluster) -> None:
    assert cluster.client.call(clients.ask_tcp, IP, PORT)["name"] == "web"
    assert cluster.status()["services"] == 21
    assert cluster.agent.http("/healthz")[0] == 200
    assert cluster.agent.http("/proxyMode", 10249) == (200, "ebpf")


def _churn(url: str) -> None:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=20)
    connection.request("POST", "/control/churn?rate=100&seconds=0.5")
    assert connection.getresponse().read()


def test_changes_are_measured_from_their_trigger_to_the_maps(cluster: Cluster) -> None:
    """The annotation endpoints.kubernetes.io/last-change-trigger-time, as kube-proxy's metric uses it."""

    def counted(name: str) -> float:
        text = cluster.agent.http("/metrics", 10249)[1]
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    cluster.node.call(_churn, cluster.url)
    until(lambda: counted("ebpfproxy_event_to_map_seconds_count") >= 50, "changes are not counted")
    assert counted('kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}') >= 50
    assert counted("kubeproxy_network_programming_duration_seconds_sum") < 50


def test_while_the_api_server_is_away_the_node_serves_what_it_knows(cluster: Cluster) -> None:
    port = int(cluster.url.rpartition(":")[2])
    cluster.api.kill()
    cluster.api.wait()
    cluster.agent.wait_log("watch is failing", times=3)
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    until(lambda: cluster.watches() == {"failing"}, "status does not say that it fails")
    assert cluster.agent.http("/livez")[0] == 200, "no change waits, so the proxy is healthy"
    lines = cluster.agent.text.count("watch is failing")
    time.sleep(1.5)
    assert cluster.agent.text.count("watch is failing") == lines, "one line, not one for every try"

    # It comes back with other versions: what is the same is not written again.
    cluster.api = cluster.start_api(port)
    cluster.agent.wait_log("watch is connected", times=6)
    until(lambda: cluster.watches() == {"connected"}, "status does not say that it works")
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    assert cluster.status()["services"] == 21


def test_a_restart_while_the_api_server_is_away_changes_nothing(cluster: Cluster) -> None:
    cluster.agent.kill()
    port = int(cluster.url.rpartition(":")[2])
    cluster.api.kill()
    cluster.api.wait()
    again = cluster.node.agent("--master", cluster.url).start(wait=False)
    again.wait_log("watch is failing", times=3)
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    assert again.http("/healthz")[0] == 503, "nothing is known yet"
    cluster.api = cluster.start_api(port)
    again.wait_ready()
    assert "changed=nothing" in again.text
    assert again.http("/healthz")[0] == 200
    again.stop()


def test_closed_sockets_leave_nothing_in_the_maps(cluster: Cluster) -> None:
    """Connected sockets' origins go when they are closed, also by the end of a process."""

    def origins() -> int:
        maps = cluster.status()["maps"]
        assert isinstance(maps, list)
        return int(next(m["entries"] for m in maps if m["name"] == "sock_origin"))

    until(lambda: origins() == 0, f"{origins()} origins of earlier tests")
    cluster.client.call(clients.spread_tcp, IP, PORT, 30)
    cluster.client.call(clients.ask_udp_connected, IP, PORT)
    holder = cluster.client.popen(["socat", "-", f"TCP:{IP}:{PORT}"], stdin=-1, stdout=-3)
    until(lambda: origins() == 1, "an open socket has no origin")
    holder.kill()
    until(lambda: origins() == 0, "a closed socket has one")


def test_without_a_node_object_the_node_is_not_eligible() -> None:
    with Lab() as lab:
        node = lab.node("node-x")
        command_url = start_api(node, 2)
        agent = node.agent("--master", command_url, "--hostname-override", "someone-else").start()
        assert agent.http("/livez")[0] == 200
        status, body = agent.http("/healthz")
        assert (status, json.loads(body)["nodeEligible"]) == (503, False)
