"""The pods that clean a node, started as by containerd, have exactly the permissions that they need."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from ebpfproxy.operator.install import node_cleanup
from tests.deploy import objects
from tests.deploy.kubelet import Kubelet, until
from tests.deploy.runtime import Container
from tests.e2e.two_node_cluster import SERVICE_IPS, TwoNodeCluster
from tests.lab import Lab, clients

pytestmark = pytest.mark.root

CLEANUP = {
    ("DaemonSet", "ebpfproxy"): node_cleanup.cleanup(
        objects.base()["DaemonSet", "ebpfproxy"], "ebpfproxy:0.1.0"
    )
}


@pytest.fixture
def kubelet() -> Iterator[Kubelet]:
    with Lab() as lab:
        made = Kubelet(TwoNodeCluster(lab))
        made.cluster.write_web(made.cluster.w1, made.cluster.w2)
        done = made.container("load").run()
        assert done.returncode == 0, done.stdout + done.stderr
        yield made
        made.cluster.a.cli("cleanup")


def container(kubelet: Kubelet, name: str, capabilities: Iterable[str] | None = None) -> Container:
    folder = kubelet.folder / f"{name}-{len(list(kubelet.folder.iterdir()))}"
    folder.mkdir()
    return Container(
        CLEANUP,
        name,
        folder,
        volumes={"bpffs": kubelet.cluster.a.bpf_root},
        variables={},
        network=kubelet.cluster.a.netns,
        capabilities=capabilities,
    )


def pins(kubelet: Kubelet) -> list[Path]:
    return list(kubelet.cluster.a.bpf_root.glob("ebpfproxy/*"))


def test_node_is_cleaned_once_its_agent_has_ended(kubelet: Kubelet) -> None:
    cluster = kubelet.cluster
    with kubelet.running(kubelet.container("ebpfproxy")):
        assert set(cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, clients.ENOUGH)) == {
            "w1",
            "w2",
        }
        beside = container(kubelet, "cleanup").run()
        assert beside.returncode == 1
        assert "Error: " in beside.stderr
        assert set(cluster.client.call(clients.spread_tcp, SERVICE_IPS["v4"], 80, clients.ENOUGH)) == {
            "w1",
            "w2",
        }
    assert pins(kubelet)
    done = container(kubelet, "cleanup").run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "detached connect4" in done.stdout
    assert pins(kubelet) == []
    assert "detached tc-" in done.stdout
    again = container(kubelet, "cleanup").run()
    assert (again.returncode, again.stdout[:17]) == (0, "nothing is pinned")


def test_container_waits_without_capabilities(kubelet: Kubelet) -> None:
    waiting = container(kubelet, "clean", capabilities=[])
    process = subprocess.Popen(waiting.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: process.poll() is not None, 1)
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
    finally:
        waiting.signal("KILL")
        process.wait(10)
        waiting.remove()
