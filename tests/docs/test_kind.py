"""kind, as in install.md: an agent in the cgroup namespace of a node serves that node only."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.lab import Lab, LabNode, clients, manifests, servers
from tests.lab.spaces import Space
from tests.lab.waiting import READY_SECONDS

pytestmark = pytest.mark.root

IP = "10.96.0.10"


def _run_as_in_kind(node: LabNode, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Mounts cgroup v2 as a container runtime does: the root of the mount is the node's cgroup."""
    mount = log.with_suffix(".cgroup")
    mount.mkdir()
    agent = f"{sys.executable} -m ebpfproxy run --bpf-root {node.bpf_root} --cgroup-root {mount}"
    script = f"mount -t cgroup2 none {mount} && exec {agent} --manifests {folder}"
    with log.open("wb") as output:
        process = node.popen(["unshare", "-C", "-m", "sh", "-c", script], stdout=output, stderr=output)
    deadline = time.monotonic() + READY_SECONDS
    while "programs are attached" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return process


def test_the_root_of_a_cgroup_namespace_is_served() -> None:
    with Lab() as lab:
        node, other = lab.node("node-a"), lab.node("node-b")
        client, web = node.pod("client"), node.pod("web-1")
        servers.start(web, web.name, 8080, 8053)
        folder = lab.folder / "manifests"
        endpoints = [manifests.endpoint(web.address, node.name)]
        manifests.write(
            folder / "web.yaml",
            manifests.service("web", clusterIPs=[IP]),
            manifests.slice_of("web", endpoints),
        )
        process = _run_as_in_kind(node, folder, lab.folder / "kind.log")

        def flows() -> int:
            return len(json.loads(node.cli("conntrack", "list", "-o", "json")))

        # The socket hook translates, so that no flow is created.
        assert client.call(clients.ask_tcp, IP, 80)["getpeername"] == (IP, 80)
        assert flows() == 0
        # A process in another node's cgroup, here in the same pod's namespace, is served in packets.
        foreign = Space(client.netns, other.cgroup)
        assert foreign.call(clients.ask_tcp, IP, 80)["name"] == web.name
        assert flows() == 1
        process.terminate()
        process.wait(10)
