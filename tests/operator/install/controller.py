"""A DaemonSet controller and kubelets: pods by node, their status and that of the DaemonSet."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable
from typing import Any

Object = dict[str, Any]
_DAEMON_SETS = "/apis/apps/v1/namespaces/kube-system/daemonsets"
_PODS = "/api/v1/namespaces/kube-system/pods"
READY: Object = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


class Controller:
    """Works on everything in kube-system that it finds, until it is stopped.

    ``nodes``: all of them; ``down``: there nothing starts or ends; ``status``: of pods that are not ready, by
    DaemonSet and node; ``started``: pods in the order in which they came, as DaemonSet and node.
    """

    def __init__(self, request: Callable[..., Object]) -> None:
        self._request = request
        self.nodes: set[str] = set()
        self.down: set[str] = set()
        self.status: dict[tuple[str, str], Object] = {}
        self.started: list[tuple[str, str]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.wait(0.03):
            # Objects may be deleted between two requests, and the server may stop within a response, which is
            # incomplete then: HTTPException, or ValueError if it has no length.
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._sync()

    def _sync(self) -> None:
        daemon_sets = {each["metadata"]["name"]: each for each in self._request("GET", _DAEMON_SETS)["items"]}
        pods: dict[tuple[str, str], Object] = {}
        for pod in self._request("GET", _PODS)["items"]:
            owner = pod["metadata"]["ownerReferences"][0]
            node = pod["spec"]["nodeName"]
            known = daemon_sets.get(owner["name"])
            if known is not None and known["metadata"]["uid"] == owner["uid"]:
                pods[owner["name"], node] = pod
            elif node not in self.down:
                self._request("DELETE", f"{_PODS}/{pod['metadata']['name']}?gracePeriodSeconds=0")
        for name, daemon_set in daemon_sets.items():
            self._sync_one(name, daemon_set, pods)

    def _sync_one(self, name: str, daemon_set: Object, pods: dict[tuple[str, str], Object]) -> None:
        generation = str(daemon_set["metadata"]["generation"])
        available = updated = 0
        for node in sorted(self.nodes):
            pod = pods.get((name, node))
            status = self.status.get((name, node), {} if node in self.down else READY)
            if pod is None:
                self._start(name, node, daemon_set, generation)
            elif pod["metadata"]["labels"]["generation"] != generation and node not in self.down:
                self._request("DELETE", f"{_PODS}/{pod['metadata']['name']}?gracePeriodSeconds=0")
            else:
                if status and any(pod["status"].get(key) != value for key, value in status.items()):
                    self._request("PATCH", f"{_PODS}/{pod['metadata']['name']}/status", {"status": status})
                updated += pod["metadata"]["labels"]["generation"] == generation
                available += status == READY
        status = {
            "observedGeneration": int(generation),
            "desiredNumberScheduled": len(self.nodes),
            "currentNumberScheduled": len(self.nodes),
            "updatedNumberScheduled": updated,
            "numberAvailable": available,
            "numberReady": available,
            "numberMisscheduled": 0,
        }
        before = daemon_set.get("status") or {}
        if any(before.get(key, 0) != value for key, value in status.items()):
            self._request("PATCH", f"{_DAEMON_SETS}/{name}/status", {"status": status})

    def _start(self, name: str, node: str, daemon_set: Object, generation: str) -> None:
        template = daemon_set["spec"]["template"]
        owner = {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "name": name,
            "uid": daemon_set["metadata"]["uid"],
            "controller": True,
        }
        images = [{"name": each["name"], "image": each["image"]} for each in template["spec"]["containers"]]
        self._request(
            "POST",
            _PODS,
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{name}-{node}",
                    "namespace": "kube-system",
                    "labels": {**template["metadata"]["labels"], "generation": generation},
                    "ownerReferences": [owner],
                },
                "spec": {"nodeName": node, "containers": images},
                "status": {"phase": "Pending"},
            },
        )
        self.started.append((name, node))
