"""A cluster in a lab: two nodes whose agents read the stand-in API server, kubelets, and the controllers that a test needs.

Pods run the command of their specification in network namespaces, as the user that it names and without capabilities.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ebpfproxy
from tests.apiserver import ApiServer, objects
from tests.kube.files import kubeconfig
from tests.lab import Agent, Lab, LabNode, command
from tests.lab.lab import OUTSIDE
from tests.lab.spaces import Space, enter_namespace, namespace_restored
from tests.lab.waiting import until

Item = dict[str, Any]
Key = tuple[str, str, str]
"""A pod's namespace, name and uid: one that follows may have its name."""
SYSTEM = "kube-system"
_TOP = Path(ebpfproxy.__file__).parents[1]
_READY = [{"type": "Ready", "status": "True"}]


class LabCluster:
    """The control plane is on the lab's outside host; ``run`` is an administrator's machine there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nodes: dict[str, LabNode] = {name: lab.node(name) for name in ("node-a", "node-b")}
        with namespace_restored():
            lab.outside  # noqa: B018 - it is created at its first use
            enter_namespace(f"/run/netns/{lab.outside.netns}")
            self.server = ApiServer(host=OUTSIDE)
        self.server.__enter__()
        self.kubeconfig = kubeconfig(lab.folder / "admin.conf", self.server.url, {})
        for node in self.nodes.values():
            item = objects.node(node.name, address=node.address)
            item["status"]["addresses"].append({"type": "InternalIP", "address": node.address6})
            item["status"]["conditions"] = _READY
            self.server.store.put("nodes", item)
        self._numbers = itertools.count(1)
        self._agents: dict[Key, Agent] = {}
        self._processes: dict[Key, subprocess.Popen[bytes]] = {}
        self._slices: dict[tuple[str, str], Item] = {}
        self._daemon_set = self.server.cluster.put(_daemon_set())
        for name in self.nodes:
            self._make_agent(name)
        self._sync()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(30)
        self.server.stop()

    def run(self, *arguments: str, interrupt_at: int | None = None) -> command.Done:
        """Runs ``ebpfproxy test``. ``interrupt_at``: sends SIGTERM as soon as there are so many pods."""
        command.import_commands()
        words = ["test", "--kubeconfig", str(self.kubeconfig), *arguments]
        if interrupt_at is None:
            return self.lab.outside.call(command.run, words, timeout=200)
        process = self.lab.outside.fork(_to_file, words, self.lab.folder / "interrupted")
        until(lambda: len(self.pods("ebpfproxy-test")) >= interrupt_at, "the pods are not created")
        process.terminate()
        until(lambda: process.poll() is not None, "the command does not end")
        return command.Done(*json.loads((self.lab.folder / "interrupted").read_text()))

    def pods(self, namespace: str) -> list[Item]:
        return [
            each for each in self.server.cluster.all("pods") if each["metadata"]["namespace"] == namespace
        ]

    def left(self) -> list[str]:
        """What the test has left: namespaces, objects in them, and processes."""
        found = {"default", "kube-public", SYSTEM} ^ self.server.cluster.namespaces
        for resource in ("services", "endpointslices"):
            found |= {f"{resource} {each.key}" for each in self.server.store.items(resource)[1]}
        found |= {f"pod {each['metadata']['name']}" for each in self.pods("ebpfproxy-test")}
        return [*found, *(f"process of {key}" for key in self._processes)]

    # -- kubelets and controllers

    def _run(self) -> None:
        while not self._stopping.wait(0.05):
            self._sync()

    def _sync(self) -> None:
        there = {_key(pod): pod for pod in self.server.cluster.all("pods")}
        for key in [*self._processes.keys() - there.keys()]:
            process = self._processes.pop(key)
            process.kill()
            process.wait()
        for key in [*self._agents.keys() - there.keys()]:
            agent = self._agents.pop(key)
            agent.stop()
            self._make_agent(agent._node.name)
        starting = []
        for key, pod in there.items():
            if key not in self._processes and key not in self._agents:
                if key[0] == SYSTEM:
                    node = self.nodes[pod["spec"]["nodeName"]]
                    self._agents[key] = node.agent("--master", self.server.url).start(wait=False)
                    starting.append(key)
                else:
                    self._start(key, pod)
        for key in starting:
            self._agents[key].wait_ready()
            self._report(key, conditions=_READY)
        self._sync_slices(
            [pod for pod in there.values() if pod.get("status", {}).get("conditions") == _READY]
        )

    def _make_agent(self, node: str) -> None:
        owner = {"kind": "DaemonSet", "name": "ebpfproxy", "uid": self._daemon_set["metadata"]["uid"]}
        self.server.cluster.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"ebpfproxy-{next(self._numbers)}",
                    "namespace": SYSTEM,
                    "labels": {"k8s-app": "ebpfproxy"},
                    "ownerReferences": [owner],
                },
                "spec": {"nodeName": node, "containers": [{"name": "ebpfproxy", "image": "x"}]},
                "status": {"phase": "Pending"},
            }
        )

    def _start(self, key: Key, pod: Item) -> None:
        spec, node = pod["spec"], self.nodes[pod["spec"]["nodeName"]]
        (container,) = spec["containers"]
        space: Space = node
        addresses = [node.address, node.address6]
        if not spec["hostNetwork"]:
            made = node.pod(f"{key[1]}-{next(self._numbers)}")
            space, addresses = made, [made.address, made.address6]
        user = container["securityContext"]["runAsUser"]
        lowered = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--bounding-set=-all"]
        program, *words = container["command"]
        assert program == "python3"
        # -S hides all packages but the standard library, and the package itself is found by its variable.
        process = space.popen(
            [*lowered, "--no-new-privs", sys.executable, "-S", *words, *container["args"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PYTHONPATH": str(_TOP), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self._processes[key] = process
        is_server = "readinessProbe" in container
        status = {
            "phase": "Running",
            "podIPs": [{"ip": each} for each in addresses],
            "containerStatuses": [{"name": container["name"], "ready": True, "state": {"running": {}}}],
        }
        if not is_server:
            status["conditions"] = _READY
        # The log of an earlier pod of this name is gone with it.
        self.server.containers.logs.pop((key[1], container["name"], False), None)
        self._report(key, **status)
        threading.Thread(target=self._read, args=(key, container["name"], process), daemon=True).start()

    def _read(self, key: Key, container: str, process: subprocess.Popen[bytes]) -> None:
        written = ""
        assert process.stdout is not None
        for line in process.stdout:
            written += line.decode()
            with self.server.cluster._lock:
                if self._is_there(key):
                    self.server.containers.logs[key[1], container, False] = written
            if "serving" in json.loads(line):
                self._report(key, conditions=_READY)

    def _report(self, key: Key, **status: Any) -> None:
        """Sets a pod's status, unless it is deleted meanwhile."""
        path = f"/api/v1/namespaces/{key[0]}/pods/{key[1]}/status"
        body = json.dumps({"status": status}).encode()
        headers = {"Content-Type": "application/merge-patch+json"}
        with self.server.cluster._lock:
            if self._is_there(key):
                self.server.cluster.answer("PATCH", path, {}, body, headers, "kubelet")

    def _is_there(self, key: Key) -> bool:
        pod = self.server.cluster.get("pods", *key[:2])
        return pod is not None and _key(pod) == key

    def _sync_slices(self, ready: list[Item]) -> None:
        wanted = {}
        for version in self.server.store.items("services")[1]:
            for made in _slices(json.loads(version.body), ready):
                wanted[made["metadata"]["namespace"], made["metadata"]["name"]] = made
        there = {each.key for each in self.server.store.items("endpointslices")[1]}
        for key, made in wanted.items():
            if self._slices.get(key) != made or key not in there:
                self.server.store.put("endpointslices", made)
        for key in there - wanted.keys():
            self.server.store.delete("endpointslices", *key)
        self._slices = wanted


def _key(pod: Item) -> Key:
    meta = pod["metadata"]
    return meta["namespace"], meta["name"], meta["uid"]


def _slices(service: Item, ready: list[Item]) -> Iterator[Item]:
    meta, spec = service["metadata"], service["spec"]
    chosen = [
        pod
        for pod in ready
        if pod["metadata"]["namespace"] == meta["namespace"]
        and spec["selector"].items() <= pod["metadata"]["labels"].items()
    ]
    for family in ("IPv4", "IPv6"):
        endpoints = [
            objects.endpoint(each["ip"], pod["spec"]["nodeName"])
            for pod in chosen
            for each in pod["status"]["podIPs"]
            if (":" in each["ip"]) == (family == "IPv6")
        ]
        if not endpoints:
            continue
        made = objects.endpoint_slice(
            meta["name"], endpoints, namespace=meta["namespace"], suffix=family.lower()
        )
        made["ports"] = [
            {"name": each["name"], "protocol": each["protocol"], "port": each["targetPort"]}
            for each in spec["ports"]
        ]
        if spec["clusterIP"] == "None":
            made["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
        yield made


def _daemon_set() -> Item:
    template = {
        "metadata": {"labels": {"k8s-app": "ebpfproxy"}},
        "spec": {"containers": [{"name": "ebpfproxy", "image": "registry.example/ebpfproxy:1"}]},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "ebpfproxy", "namespace": SYSTEM},
        "spec": {"selector": {"matchLabels": {"k8s-app": "ebpfproxy"}}, "template": template},
    }


def _to_file(words: list[str], path: Path) -> None:
    path.write_text(json.dumps(command.run(words)))
