"""An agent with an API server that is stopped and restarted; Services are served throughout."""

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


def test_services_of_the_api_server_are_reachable(cluster: Cluster) -> None:
    assert cluster.client.call(clients.ask_tcp, IP, PORT)["name"] == "web"
    assert cluster.status()["services"] == 21
    until(lambda: cluster.agent.http("/healthz")[0] == 200, "the agent is not healthy")
    assert cluster.agent.http("/proxyMode", 10249) == (200, "ebpf")


def _churn(url: str) -> None:
    connection = http.client.HTTPConnection(url.partition("://")[2], timeout=20)
    connection.request("POST", "/control/churn?rate=100&seconds=0.5")
    assert connection.getresponse().read()


def test_programming_latency_is_measured_from_the_change_trigger_time(cluster: Cluster) -> None:
    """It starts at the annotation endpoints.kubernetes.io/last-change-trigger-time, as in kube-proxy."""

    def counted(name: str) -> float:
        text = cluster.agent.http("/metrics", 10249)[1]
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    cluster.node.call(_churn, cluster.url)
    until(lambda: counted("ebpfproxy_event_to_map_seconds_count") >= 50, "fewer than 50 changes are counted")
    assert counted('kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"}') >= 50
    assert counted("kubeproxy_network_programming_duration_seconds_sum") < 50


def test_known_services_are_served_while_the_api_server_is_down(cluster: Cluster) -> None:
    port = int(cluster.url.rpartition(":")[2])
    cluster.api.kill()
    cluster.api.wait()
    cluster.agent.wait_log("watch is failing", times=3)
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    until(lambda: cluster.watches() == {"failing"}, "status does not show failing watches")
    assert cluster.agent.http("/livez")[0] == 200, "no change is pending, so that the proxy is healthy"
    lines = cluster.agent.text.count("watch is failing")
    time.sleep(1.5)
    assert cluster.agent.text.count("watch is failing") == lines, "a line is logged for each retry"

    # It restarts with other resource versions; unchanged objects are not written again.
    cluster.api = cluster.start_api(port)
    cluster.agent.wait_log("watch is connected", times=6)
    until(lambda: cluster.watches() == {"connected"}, "status does not show connected watches")
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    assert cluster.status()["services"] == 21


def test_restart_while_the_api_server_is_down_changes_no_map(cluster: Cluster) -> None:
    cluster.agent.kill()
    port = int(cluster.url.rpartition(":")[2])
    cluster.api.kill()
    cluster.api.wait()
    again = cluster.node.agent("--master", cluster.url).start(wait=False)
    again.wait_log("watch is failing", times=3)
    again.wait_log(" started ")
    assert cluster.client.call(clients.spread_tcp, IP, PORT, 20) == {"web": 20}
    assert again.http("/healthz")[0] == 503, "the caches are not synced yet"
    cluster.api = cluster.start_api(port)
    again.wait_ready()
    assert "changed=nothing" in again.text
    until(lambda: again.http("/healthz")[0] == 200, "the agent is not healthy")
    again.stop()


def test_closed_sockets_have_no_entry_in_sock_origin(cluster: Cluster) -> None:
    """The entry of a connected socket is deleted on close(), and at the end of its process."""

    def origins() -> int:
        maps = cluster.status()["maps"]
        assert isinstance(maps, list)
        return int(next(m["entries"] for m in maps if m["name"] == "sock_origin"))

    until(lambda: origins() == 0, f"{origins()} entries of earlier tests are left")
    cluster.client.call(clients.spread_tcp, IP, PORT, 30)
    cluster.client.call(clients.ask_udp_connected, IP, PORT)
    holder = cluster.client.popen(["socat", "-", f"TCP:{IP}:{PORT}"], stdin=-1, stdout=-3)
    until(lambda: origins() == 1, "the open socket has no entry")
    holder.kill()
    until(lambda: origins() == 0, "the closed socket still has an entry")


def test_healthz_fails_without_a_node_object() -> None:
    with Lab() as lab:
        node = lab.node("node-x")
        command_url = start_api(node, 2)
        agent = node.agent("--master", command_url, "--hostname-override", "other-node").start()
        until(lambda: agent.http("/livez")[0] == 200, "the agent is not healthy")
        status, body = agent.http("/healthz")
        assert (status, json.loads(body)["nodeEligible"]) == (503, False)
