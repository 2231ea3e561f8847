"""Processes named kube-proxy: found in their network namespace, read, and ended only where asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.operator.migrate.node import running_kube_proxy
from tests.lab import Lab, LabNode
from tests.operator.migrate import rules

SCRIPT = """#!/usr/bin/python3 -S
import os, signal
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
print("ready", flush=True)
while True: signal.pause()
"""


def start(node: LabNode, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts an idle process with kube-proxy's name and arguments."""
    path = node.lab.folder / "kube-proxy"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    process = node.popen([str(path), *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.fixture
def node() -> Iterator[LabNode]:
    with Lab() as lab:
        yield lab.node("node-a")


@pytest.mark.root
def test_kube_proxy_is_found_in_its_network_namespace_only_with_its_configuration(node: LabNode) -> None:
    config = node.lab.folder / "config.conf"
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "mode: ipvs\nipvs: {scheduler: rr}\nunheardOf: 1\n"
    )
    process = start(node, f"--config={config}", "--hostname-override=node-a")
    (found,) = node.call(running_kube_proxy.find)
    assert found.pid == process.pid
    assert (found.mode, found.config, found.started_by) == ("ipvs", str(config), "process")
    assert any("unheardOf" in problem for problem in found.problems)
    assert process.pid not in [each.pid for each in running_kube_proxy.find()]


@pytest.mark.root
def test_kube_proxy_is_ended_by_sigterm(node: LabNode) -> None:
    process = start(node, "--proxy-mode", "nftables")
    (found,) = node.call(running_kube_proxy.find)
    assert found.mode == "nftables"
    assert node.call(_end_all) == [True]
    assert process.wait(5) == 0
    assert node.call(running_kube_proxy.find) == []


def _end_all() -> list[bool]:
    return [running_kube_proxy.end(process, 5) for process in running_kube_proxy.find()]


def test_reused_pid_of_another_process_is_not_ended() -> None:
    """The process of this test is not a kube-proxy."""
    process = running_kube_proxy.Process(
        pid=os.getpid(), command=("kube-proxy",), started_by="process", mode=""
    )
    assert running_kube_proxy.end(process, 1)


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("0::/kubepods.slice/kubepods-burstable.slice/kubepods-pod1.slice/cri-containerd-2.scope\n", "pod"),
        ("12:pids:/kubepods/besteffort/pod1/2\n0::/kubepods/besteffort/pod1/2\n", "pod"),
        ("0::/system.slice/kube-proxy.service\n", "kube-proxy.service"),
        ("0::/../../podb9d3c1e2-0a4f-4a6e-9c58-0f3a1d2e4b5c/0123abc\n", "pod"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", "process"),
        ("0::/\n", "process"),
        ("", "process"),
    ],
)
def test_manager_of_the_process_is_recognized_by_its_cgroup(cgroup: str, expected: str) -> None:
    assert running_kube_proxy.started_by(cgroup) == expected


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("kube-proxy", "--config=/a"), "/a"),
        (("kube-proxy", "--config", "/a", "--v=2"), "/a"),
        (("kube-proxy", "--config"), ""),
        (("kube-proxy", "--config-sync-period=1s"), ""),
    ],
)
def test_flags_are_parsed(command: tuple[str, ...], expected: str) -> None:
    assert running_kube_proxy.option(command, "config") == expected


def test_defaults_of_a_real_kube_proxy_are_accepted() -> None:
    assert running_kube_proxy.check_config(rules.text("defaults.yaml"), "defaults.yaml") == ("iptables", ())


def test_invalid_configuration_is_a_problem_and_has_no_mode(tmp_path: Path) -> None:
    assert running_kube_proxy.read_config(tmp_path / "none", "shown") == (
        "",
        ("shown: No such file or directory",),
    )
    mode, problems = running_kube_proxy.check_config("- 1\n- [", "shown")
    assert mode == ""
    assert problems
