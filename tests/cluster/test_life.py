"""What becomes of nodes and agents in a cluster that is in use: versions, memory, drains, reboots; nobody's request is lost."""

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
from tests.cluster.load import Failure, asking

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]

#: Takes memory in the cgroup that is named until the kernel ends a process there, which is not this one.
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
    """Services that are served by the agent alone."""
    cluster.ebpfproxy("install", "--image", images.AGENT)
    made = App(cluster)
    yield made
    made.remove()
    cluster.ebpfproxy("uninstall", "--cleanup", "--force")


@pytest.fixture(scope="module")
def bpffs(folder: Path) -> Path:
    """One that outlives the boots of a node."""
    made = folder / "bpffs"
    made.mkdir()
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(made)], check=True)
    return made


def _agent(cluster: Cluster, node: Node) -> Object:
    """The status of the agent's container."""
    pod = cluster.get("-n", "kube-system", "pod", cluster.agent_pods()[node.name])
    (found,) = (each for each in pod["status"]["containerStatuses"] if each["name"] == "ebpfproxy")
    return dict(found)


def _ask_agent(cluster: Cluster, node: Node, *arguments: str) -> Any:
    """What the operator's command in the agent's container answers."""
    pod = cluster.agent_pods()[node.name]
    command = ["ebpfproxy", *arguments, "-o", "json"]
    return json.loads(cluster.kubectl("-n", "kube-system", "exec", pod, "-c", "ebpfproxy", "--", *command))


def _exhaust_memory(node: Node, container: str) -> None:
    """Leaves the container's cgroup 8 MB, and takes more than that in it."""
    groups = node.run(["cat", f"/proc/{node.pids()[container]}/cgroup"]).splitlines()
    (path,) = (line.split(":")[2] for line in groups if "memory" in line.split(":")[1].split(","))
    group = f"/sys/fs/cgroup/memory{path}"
    used = int(node.run(["cat", f"{group}/memory.usage_in_bytes"]))
    node.path(f"{group}/memory.limit_in_bytes").write_text(str(used + (8 << 20)))
    node.run(["python3", "-c", _TAKE, group], check=False)


def test_a_new_version_and_the_old_one_again_lose_no_request(app: App) -> None:
    """``install`` with another image replaces the agent on one node after the other, and back, under load."""
    cluster = app.cluster
    with asking(*app.everywhere()):
        for image in (images.NEXT, images.AGENT):
            cluster.ebpfproxy("install", "--image", image)
            for node in cluster.nodes:
                state = _agent(cluster, node)
                assert state["ready"] and state["image"].endswith(image), state


def test_an_agent_that_the_kernel_ends_for_memory_is_back_and_nobody_notices(app: App) -> None:
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


def test_a_drained_nodes_endpoints_leave_and_connections_go_to_the_others(app: App) -> None:
    """``kubectl drain`` and ``uncordon`` of a node: only connections end whose server ended."""
    cluster, node = app.cluster, app.cluster.nodes[1]
    gone = app.servers(node)
    assert len(gone) == 2

    def ended(failure: Failure) -> bool:
        return failure.held and failure.way.startswith("tcp") and failure.server in gone

    with asking(*app.everywhere(), ended=ended):
        cluster.kubectl("drain", node.name, "--ignore-daemonsets", "--timeout=120s")
        app.wait()
        assert not app.servers(node)
        cluster.kubectl("uncordon", node.name)
    with asking(*(clients := app.everywhere())):
        time.sleep(2)
    assert not gone & {server for client in clients for server in client.servers}


def _reboot(app: App, node: Node, bpffs: Path) -> None:
    """Returns once every pod of the node is another one, with the name that it had, and ready."""
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
    """Every endpoint of the API's, as the agent's commands write it."""
    found = set()
    for item in cluster.get("endpointslices", "-A")["items"]:
        for endpoint in item.get("endpoints") or ():
            for port in item.get("ports") or ():
                address = ipaddress.ip_address(endpoint["addresses"][0])
                host = f"[{address}]" if address.version == 6 else str(address)
                found.add(f"{host}:{port['port']}")
    return found


def test_a_node_that_reboots_serves_again(app: App, bpffs: Path) -> None:
    """A reboot takes programs and maps with it; the pods come back with other addresses, which the maps hold."""
    app.spread()
    node = app.cluster.nodes[1]
    _reboot(app, node, bpffs)
    _works_and_nothing_is_stale(app, node)


def test_a_node_that_lost_its_processes_only_serves_again(app: App, bpffs: Path) -> None:
    """Where pins outlive all processes and the cgroups, the agent goes on with them, and nothing stale stays."""
    node = app.cluster.nodes[1]
    _reboot(app, node, bpffs)
    _works_and_nothing_is_stale(app, node)
