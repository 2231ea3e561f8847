"""Updates, memory limits, drains and reboots in a cluster under load, without lost requests."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import images
from tests.cluster.app import App
from tests.cluster.cluster import Cluster, Node, Object, until
from tests.cluster.request_load import Failure, asking

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]

#: Allocates memory in the named cgroup until the kernel kills another process there.
_TAKE = """
import pathlib, sys
group = pathlib.Path(sys.argv[1])
(group / "cgroup.procs").write_text("0")
try:
    pathlib.Path("/proc/self/oom_score_adj").write_text("-1000")
except OSError:
    pass
b"x" * (64 << 20)
"""


@pytest.fixture(scope="module")
def app(cluster: Cluster) -> Iterator[App]:
    """Services of a cluster without kube-proxy."""
    cluster.ebpfproxy("install", "--image", images.AGENT)
    made = App(cluster)
    yield made
    made.remove()
    cluster.ebpfproxy("uninstall", "--cleanup", "--force")


@pytest.fixture(scope="module")
def bpffs(folder: Path) -> Path:
    """Yields one that outlives boots of a node."""
    made = folder / "bpffs"
    made.mkdir()
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(made)], check=True)
    return made


def _agent(cluster: Cluster, node: Node) -> Object:
    """Returns the status of the agent's container."""
    pod = cluster.get("-n", "kube-system", "pod", cluster.agent_pods()[node.name])
    (found,) = (each for each in pod["status"]["containerStatuses"] if each["name"] == "ebpfproxy")
    return dict(found)


def _ask_agent(cluster: Cluster, node: Node, *arguments: str) -> Any:
    """Returns the output of an operator's command in the agent's container."""
    pod = cluster.agent_pods()[node.name]
    command = ["ebpfproxy", *arguments, "-o", "json"]
    return json.loads(cluster.kubectl("-n", "kube-system", "exec", pod, "-c", "ebpfproxy", "--", *command))


def _exhaust_memory(node: Node, container: str) -> None:
    """Leaves 8 MB to the container's cgroup and allocates more than that in it."""
    groups = node.run(["cat", f"/proc/{node.pids()[container]}/cgroup"]).splitlines()
    (path,) = (line.split(":")[2] for line in groups if "memory" in line.split(":")[1].split(","))
    group = f"/sys/fs/cgroup/memory{path}"
    used = int(node.run(["cat", f"{group}/memory.usage_in_bytes"]))
    node.path(f"{group}/memory.limit_in_bytes").write_text(str(used + (8 << 20)))
    node.run(["python3", "-c", _TAKE, group], check=False)


def test_update_and_rollback_of_the_agent_lose_no_request(app: App) -> None:
    """``install`` with another image replaces the agent on one node after the other, and back, under load."""
    cluster = app.cluster
    with asking(*app.everywhere()):
        for image in (images.NEXT, images.AGENT):
            cluster.ebpfproxy("install", "--image", image)
            for node in cluster.nodes:
                state = _agent(cluster, node)
                assert state["ready"] and state["image"].endswith(image), state


def test_agent_killed_for_memory_restarts_and_no_request_fails(app: App) -> None:
    """Where the agent's cgroup has no memory left the kernel kills it; the kubelet starts it, under load."""
    cluster, node = app.cluster, app.cluster.nodes[1]
    before = _agent(cluster, node)
    with asking(*app.everywhere()):
        _exhaust_memory(node, before["containerID"].removeprefix("containerd://"))
        until(
            lambda: _agent(cluster, node)["restartCount"] > before["restartCount"],
            "the kubelet sees it",
        )
        until(lambda: _agent(cluster, node)["ready"], "the agent is ready again")
    assert _agent(cluster, node)["lastState"]["terminated"]["reason"] == "OOMKilled"
    assert _ask_agent(cluster, node, "status")["healthy"]


def test_connections_go_to_other_endpoints_when_a_node_is_drained(app: App) -> None:
    """``kubectl drain`` and ``uncordon`` of a node: only connections end whose server ended.

    A datagram that such a server had not answered is lost, once for each socket, with kube-proxy as well.
    """
    cluster, node = app.cluster, app.cluster.nodes[1]
    gone = app.servers(node)
    assert len(gone) == 2

    lost: set[Failure] = set()

    def ended(failure: Failure) -> bool:
        if failure.way.startswith("tcp"):
            return failure.held and failure.server in gone
        known = {(each.client, each.way) for each in lost}
        lost.add(failure)
        return failure.held and failure.server in gone and (failure.client, failure.way) not in known

    with asking(*app.everywhere(), ended=ended):
        cluster.kubectl("drain", node.name, "--ignore-daemonsets", "--timeout=120s")
        app.wait()
        assert not app.servers(node)
        cluster.kubectl("uncordon", node.name)
    with asking(*(clients := app.everywhere())):
        time.sleep(2)
    assert not gone & {server for client in clients for server in client.servers}


def _reboot(app: App, node: Node, bpffs: Path) -> None:
    """Returns once every pod of the node is replaced by a ready one of the same name."""
    cluster = app.cluster

    def containers() -> dict[str, str]:
        pods = cluster.get("pods", "-A", f"--field-selector=spec.nodeName={node.name}")["items"]
        return {
            pod["metadata"]["name"]: status["containerID"]
            for pod in pods
            for status in pod["status"].get("containerStatuses", ())
            if status["ready"]
        }

    before = containers()
    node.power_off()
    cluster.boot_node(node, bpffs)
    node.start_kubelet()

    def back() -> bool:
        now = containers()
        return now.keys() == before.keys() and not {*now.values()} & {*before.values()}

    until(back, f"pods of {node.name} are back")


def _works_and_nothing_is_stale(app: App, node: Node) -> None:
    cluster = app.cluster
    clients = [*app.everywhere(), app.on_node(node)]
    with asking(*clients):
        assert _ask_agent(cluster, node, "status")["problems"] == []
    until(lambda: _in_maps(cluster, node) == _endpoints(cluster), "maps hold what the API has")


def _in_maps(cluster: Cluster, node: Node) -> set[str]:
    return {row["address"] for row in _ask_agent(cluster, node, "backend", "list")}


def _endpoints(cluster: Cluster) -> set[str]:
    """Returns every endpoint of the API in the notation of the agent's commands."""
    found = set()
    for item in cluster.get("endpointslices", "-A")["items"]:
        for endpoint in item.get("endpoints") or ():
            for port in item.get("ports") or ():
                address = ipaddress.ip_address(endpoint["addresses"][0])
                host = f"[{address}]" if address.version == 6 else str(address)
                found.add(f"{host}:{port['port']}")
    return found


def test_rebooted_node_serves_again(app: App, bpffs: Path) -> None:
    """A reboot takes programs and maps with it; the pods come back with other addresses, which the maps hold."""
    app.spread()
    node = app.cluster.nodes[1]
    _reboot(app, node, bpffs)
    _works_and_nothing_is_stale(app, node)


def test_node_that_lost_only_its_processes_serves_again(app: App, bpffs: Path) -> None:
    """Where pins outlive all processes and the cgroups, the agent goes on with them, and nothing stale stays."""
    node = app.cluster.nodes[1]
    _reboot(app, node, bpffs)
    _works_and_nothing_is_stale(app, node)
