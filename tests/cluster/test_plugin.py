"""``kubectl ebpfproxy`` and ``sysdump``, through a real API server, kubelet and containerd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import agents, binaries
from tests.cluster.cluster import Cluster, until
from tests.cluster.web import NAMESPACE, Web
from tests.lab.interrupts import take_interrupts
from tests.lab.terminal import Terminal

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def web(cluster: Cluster) -> Iterator[Web]:
    cluster.install_agent()
    made = Web(cluster, ["node-1", "node-2"])
    made.wait()
    yield made
    made.remove()
    cluster.uninstall_agent()


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A folder for PATH with the program that the wheel installs."""
    program = tmp_path / "kubectl-ebpfproxy"
    program.write_text(f"#!{sys.executable}\nfrom ebpfproxy.cli.kubectl import main\nmain()\n")
    program.chmod(0o755)
    return tmp_path


def _kubectl(cluster: Cluster, plugin: Path, *arguments: str) -> list[str]:
    command = [str(binaries.KUBE_BIN / "kubectl"), "ebpfproxy", *arguments]
    return ["env", f"PATH={plugin}:{os.environ['PATH']}", *command]


def _runs(cluster: Cluster, node: str, command: str) -> bool:
    """True while a command of the plugin's runs on the node."""
    (each,) = (each for each in cluster.nodes if each.name == node)
    found = each.run(["sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '"])
    return f"--end-with-input {command}" in found


def test_commands_run_on_the_node_of_a_pod(cluster: Cluster, web: Web, plugin: Path) -> None:
    """`kubectl ebpfproxy explain` runs on the node of the pod that it names, and has its exit code."""
    for node in ("node-1", "node-2"):
        words = ("explain", f"{NAMESPACE}/client-{node}", "web:80", "-o", "json")
        report = json.loads(cluster.command(_kubectl(cluster, plugin, *words)))
        assert report["works"]
        assert {each["client"] for each in report["explanations"]} == {f"{NAMESPACE}/client-{node}"}
    failed = cluster.command(
        _kubectl(cluster, plugin, "explain", "host", "web/nothing:80", "--node", "node-1"), check=False
    )
    assert "no Service web/nothing" in failed


def test_trace_ends_in_the_pod_when_the_plugin_ends(cluster: Cluster, web: Web, plugin: Path) -> None:
    """`kubectl ebpfproxy trace` leaves no process in the agent's pod: neither interrupted nor killed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        command = _kubectl(cluster, plugin, "trace", "--pod", f"{NAMESPACE}/client-node-2", "-n", NAMESPACE)
        tracing = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{cluster.network.outside}", *command],
            env={**os.environ, "KUBECONFIG": str(cluster.kubeconfig)},
            stdout=-1,
            stderr=-1,
            text=True,
            preexec_fn=take_interrupts,
        )
        assert tracing.stdout is not None and tracing.stderr is not None
        assert tracing.stderr.readline() == "tracing\n"
        assert _runs(cluster, "node-2", "trace") and not _runs(cluster, "node-1", "trace")
        assert web.from_pod(web.cluster_ips()[0], "node-2")
        assert f"{NAMESPACE}/web" in tracing.stdout.readline()
        tracing.send_signal(number)
        tracing.communicate(timeout=60)
        until(lambda: not _runs(cluster, "node-2", "trace"), "the command in the pod ends")
    agents.assert_healthy(cluster)


def test_top_of_all_nodes_is_one_screen(cluster: Cluster, web: Web, plugin: Path) -> None:
    """`kubectl ebpfproxy top --all-nodes` needs no terminal in the pods, and leaves no process there."""
    words = _kubectl(cluster, plugin, "top", "--all-nodes", "-n", NAMESPACE, "--interval", "500ms")
    command = ["nsenter", f"--net=/run/netns/{cluster.network.outside}", *words]
    with Terminal(command, env={"KUBECONFIG": str(cluster.kubeconfig)}) as screen:
        screen.wait_for("2 of 2 nodes")
        assert _runs(cluster, "node-1", "top") and _runs(cluster, "node-2", "top")
        for node in ("node-1", "node-2"):
            assert web.from_pod(web.cluster_ips()[0], node)
        screen.wait_for(f"{NAMESPACE}/web")
        screen.type("q")
        assert screen.wait() == 0
        assert screen.is_restored
    nodes = ("node-1", "node-2")
    until(lambda: not any(_runs(cluster, node, "top") for node in nodes), "the commands in the pods end")


def test_sysdump_has_all_nodes(cluster: Cluster, web: Web, plugin: Path, tmp_path: Path) -> None:
    """`kubectl ebpfproxy sysdump` has every node's archive, its pod's log, and no token."""
    out = tmp_path / "all.tgz"
    said = cluster.command([*_kubectl(cluster, plugin, "sysdump", str(out))], check=False)
    assert sorted(said.splitlines()) == ["node-1: done", "node-2: done"]
    with tarfile.open(out) as tar:
        found = {each.name: tar.extractfile(each).read().decode() for each in tar}  # type: ignore[union-attr]
    for node in ("node-1", "node-2"):
        top = f"ebpfproxy-sysdump/{node}"
        assert json.loads(found[f"{top}/status.json"])["healthy"]
        assert json.loads(found[f"{top}/check.json"])["agent"] == "answered"
        assert "programs are attached" in found[f"{top}/logs/ebpfproxy.log"]
        lines = found.get(f"{top}/errors.txt", "").splitlines()
        # The log is the kubelet's; the image has no journalctl, and the agent may not ask for legacy tables.
        assert {line.partition(":")[0] for line in lines} <= {"agent.log", "journal.log", "iptables.txt"}, (
            lines
        )
    assert "client-node-1" in found["ebpfproxy-sysdump/node-1/namespaces.json"]
    assert not [name for name, text in found.items() if "eyJhbGciOi" in text]
