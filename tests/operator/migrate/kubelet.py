"""Kubelets of lab nodes: kube-proxy's pod loads recorded rules, the agent's pod runs the agent, runc runs work pods.

The container of a work pod has the user, capabilities, seccomp profile, read-only root, volumes, network and PID
namespace of its manifest.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from ebpfproxy.operator.migrate.cluster import work_pod
from tests.deploy import runtime
from tests.deploy.runtime import Container
from tests.lab import Agent, LabNode
from tests.operator.migrate.control_plane import ControlPlane, Item
from tests.operator.migrate.test_running_kube_proxy import start as start_kube_proxy

_READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
_RUNNING = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}


class PodContainer(Container):
    """The container of a work pod on a lab node."""

    def __init__(
        self,
        pod: Item,
        node: LabNode,
        folder: Path,
        *,
        capabilities: Iterable[str] | None = None,
        seccomp: bool = True,
        image: Path | None = None,
    ) -> None:
        spec = pod["spec"]
        assert spec["hostNetwork"]
        assert not spec["automountServiceAccountToken"]
        template = {"template": {"spec": {**spec, "initContainers": []}}}
        lock = Path("/run/xtables.lock")
        lock.touch()
        node.bpf_root.mkdir(parents=True, exist_ok=True)
        self._shares_processes = spec["hostPID"]
        super().__init__(
            {("DaemonSet", "ebpfproxy"): {"spec": template}},
            work_pod.CONTAINER,
            folder,
            volumes={"bpffs": node.bpf_root, "xtables-lock": lock},
            variables={},
            network=node.netns,
            capabilities=capabilities,
            seccomp=seccomp,
            image=image,
        )

    def configuration(self) -> Item:
        configuration = super().configuration()
        if self._shares_processes:
            linux = configuration["linux"]
            linux["namespaces"] = [each for each in linux["namespaces"] if each["type"] != "pid"]
        return configuration


class LabKubelet:
    def __init__(self, nodes: Iterable[LabNode], manifests: Path, mode: str) -> None:
        """``mode`` is kube-proxy's mode, whose rules its pod loads when it starts."""
        runtime.install("runc", "runc")
        self.nodes = {node.name: node for node in nodes}
        self._manifests, self._mode = manifests, mode
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._agents: dict[str, Agent] = {}
        self._count = 0
        self._lock = threading.Lock()

    def start(self, pod: Item, plane: ControlPlane) -> None:
        node, name = self.nodes[pod["spec"]["nodeName"]], pod["metadata"]["name"]
        match pod["spec"]["containers"][0]["name"]:
            case "kube-proxy":
                with self._lock:
                    load = f"from tests.operator.migrate import rules; rules.load({self._mode!r}, lab=True)"
                    node.run([sys.executable, "-c", load])
                    if self._mode == "nftables":
                        # The dump has only the address of the first node.
                        element = f"add element ip kube-proxy nodeport-ips {{ {node.address} }}"
                        node.run(["nft", element])
                    self._processes[name] = start_kube_proxy(node, "--proxy-mode=iptables")
                plane.report(pod, **_READY)
            case "ebpfproxy":
                self._agents[name] = node.agent(manifests=self._manifests).start()
                plane.report(pod, **_READY)
            case _:
                self._work(pod, node, plane)

    def stop(self, pod: Item) -> None:
        name = pod["metadata"]["name"]
        if (process := self._processes.pop(name, None)) is not None:
            process.terminate()
            process.wait(10)
        elif (agent := self._agents.pop(name, None)) is not None:
            agent.stop()

    def _work(self, pod: Item, node: LabNode, plane: ControlPlane) -> None:
        with self._lock:
            self._count += 1
            folder = node.lab.folder / f"work-{self._count}"
        folder.mkdir()
        container = PodContainer(pod, node, folder)
        name = pod["metadata"]["name"]
        plane.logs[name] = ""
        plane.report(pod, **_RUNNING)
        with subprocess.Popen(
            container.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                plane.logs[name] += line
        container.remove()
        code = process.returncode
        state = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
        phase = "Failed" if code else "Succeeded"
        plane.report(pod, phase=phase, containerStatuses=[{"state": state}])
