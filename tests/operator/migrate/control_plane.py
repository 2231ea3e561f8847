"""An API server with the parts of a control plane that a migration uses: DaemonSet controller and logs of pods.

The controller implements affinity, node labels and both update strategies. Tests act as the kubelets of pods.
``requests`` has the requests without reads.
"""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

Item = dict[str, Any]

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PLURALS = {"pods": "Pod", "nodes": "Node", "daemonsets": "DaemonSet", "configmaps": "ConfigMap"}


class Kubelet(Protocol):
    """Both are called in threads of their own; ``report`` sets a pod's status."""

    def start(self, pod: Item, control_plane: ControlPlane) -> None: ...

    def stop(self, pod: Item) -> None: ...


class ApiError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ControlPlane:
    def __init__(self, kubelet: Kubelet, *nodes: str) -> None:
        self.kubelet = kubelet
        self.lock = threading.RLock()
        #: Objects by kind, then by namespace and name.
        self.objects: dict[str, dict[tuple[str, str], Item]] = {kind: {} for kind in _PLURALS.values()}
        self.logs: dict[str, str] = {}
        self.events: list[Item] = []
        self.requests: list[tuple[str, str]] = []
        #: Requests to reject, by method and end of the path, with status and message; those in ``once`` are rejected
        #: once.
        self.refusals: dict[tuple[str, str], tuple[int, str]] = {}
        self.once: set[tuple[str, str]] = set()
        #: Pods that a rolling update has ended.
        self.restarted: list[str] = []
        #: Work pods in the order of creation: node and arguments.
        self.worked: list[tuple[str, list[str]]] = []
        self._numbers = itertools.count(1)
        self._threads: list[threading.Thread] = []
        for name in nodes:
            self.put(node(name))

    # -- objects

    def put(self, item: Item) -> None:
        with self.lock:
            item["metadata"]["resourceVersion"] = str(next(self._numbers))
            meta = item["metadata"]
            self.objects[item["kind"]][meta.get("namespace", ""), meta["name"]] = item
        self.sync()

    def get(self, kind: str, namespace: str, name: str) -> Item:
        try:
            return self.objects[kind][namespace, name]
        except KeyError:
            raise ApiError(404, f'{kind.lower()}s "{name}" not found') from None

    def labels(self, node: str) -> Item:
        return dict(self.get("Node", "", node)["metadata"]["labels"])

    def pods(self, owner: str, node: str) -> list[Item]:
        """Returns a DaemonSet's pods on a node."""
        with self.lock:
            return [
                pod
                for pod in self.objects["Pod"].values()
                if pod["spec"]["nodeName"] == node
                and any(each["name"] == owner for each in pod["metadata"].get("ownerReferences", ()))
            ]

    def report(self, pod: Item, **status: Any) -> None:
        """Sets the status of a pod, as the kubelet does."""
        with self.lock:
            meta = pod["metadata"]
            if (found := self.objects["Pod"].get((meta["namespace"], meta["name"]))) is not None:
                found["status"] = status

    # -- the controller

    def sync(self) -> None:
        with self.lock:
            for daemon_set in self.objects["DaemonSet"].values():
                for name in [name for _, name in self.objects["Node"]]:
                    self._sync(daemon_set, self.get("Node", "", name))

    def _sync(self, daemon_set: Item, node: Item) -> None:
        name = daemon_set["metadata"]["name"]
        there = self.pods(name, node["metadata"]["name"])
        if not _fits(daemon_set["spec"]["template"]["spec"], node["metadata"].get("labels", {})):
            for pod in there:
                self._end(pod)
        elif not there:
            self._make(
                {
                    "kind": "Pod",
                    "metadata": {
                        "name": f"{name}-{next(self._numbers)}",
                        "namespace": daemon_set["metadata"]["namespace"],
                        "ownerReferences": [{"kind": "DaemonSet", "name": name}],
                    },
                    "spec": {
                        **copy.deepcopy(daemon_set["spec"]["template"]["spec"]),
                        "nodeName": node["metadata"]["name"],
                    },
                    "status": {"phase": "Pending"},
                }
            )
        elif daemon_set["spec"]["updateStrategy"]["type"] == "RollingUpdate":
            template = {**daemon_set["spec"]["template"]["spec"], "nodeName": node["metadata"]["name"]}
            for pod in there:
                if pod["spec"] != template and "deletionTimestamp" not in pod["metadata"]:
                    self.restarted.append(pod["metadata"]["name"])
                    self._end(pod)

    def _make(self, pod: Item) -> None:
        self.objects["Pod"][pod["metadata"]["namespace"], pod["metadata"]["name"]] = pod
        self._begin(lambda: self.kubelet.start(pod, self))

    def _end(self, pod: Item) -> None:
        meta = pod["metadata"]
        if "deletionTimestamp" in meta:
            return
        meta["deletionTimestamp"] = "2026-11-21T00:00:00Z"

        def end() -> None:
            self.kubelet.stop(pod)
            with self.lock:
                self.objects["Pod"].pop((meta["namespace"], meta["name"]), None)
            self.sync()

        self._begin(end)

    def _begin(self, function: Any) -> None:
        thread = threading.Thread(target=function, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)

    # -- requests

    def answer(self, method: str, target: str, body: Any) -> Any:
        split = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        if method != "GET":
            self.requests.append((method, split.path))
        for (refused, end), (status, words) in list(self.refusals.items()):
            if refused == method and split.path.endswith(end):
                if (refused, end) in self.once:
                    del self.refusals[refused, end]
                raise ApiError(status, words)
        parts = split.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if parts[0] == "namespaces":
            namespace, parts = parts[1], parts[2:]
        with self.lock:
            return self._answer(method, namespace, parts, query, body)

    def _answer(self, method: str, namespace: str, parts: list[str], query: Any, body: Any) -> Any:
        if parts[0] == "events":
            return {"items": self.events}
        kind = _PLURALS[parts[0]]
        if method == "POST":
            return self._create(namespace, body)
        if len(parts) == 1:
            return {"items": self._list(kind, namespace, query)}
        if parts[2:] == ["log"]:
            return self.logs.get(parts[1], "")
        found = self.get(kind, namespace, parts[1])
        if method == "PATCH":
            found = patched(found, body)
            self.put(found)
        elif method == "DELETE":
            self._end(found)
        return found

    def _create(self, namespace: str, pod: Item) -> Item:
        name = pod["metadata"]["name"]
        if (namespace, name) in self.objects["Pod"]:
            raise ApiError(409, f'pods "{name}" already exists')
        pod["metadata"]["namespace"] = namespace
        pod["status"] = {"phase": "Pending"}
        self.worked.append((pod["spec"]["nodeName"], pod["spec"]["containers"][0]["args"]))
        self._make(pod)
        return pod

    def _list(self, kind: str, namespace: str, query: dict[str, str]) -> list[Item]:
        found = [item for (where, _), item in self.objects[kind].items() if where == namespace]
        if fields := query.get("fieldSelector", ""):
            name, _, value = fields.partition("=")
            assert name == "spec.nodeName"
            found = [item for item in found if item["spec"]["nodeName"] == value]
        if labels := query.get("labelSelector", ""):
            name, _, value = labels.partition("=")
            found = [item for item in found if item["metadata"]["labels"].get(name) == value]
        return found


def _fits(pod: Item, labels: dict[str, str]) -> bool:
    """Evaluates the expressions in use there."""
    required = pod.get("affinity", {}).get("nodeAffinity", {}).get(_REQUIRED)
    if required is None:
        return True
    return any(
        all(labels.get(each["key"]) not in each["values"] for each in term["matchExpressions"])
        for term in required["nodeSelectorTerms"]
        if term
    )


def node(name: str, *, ready: bool = True, **labels: str) -> Item:
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux", **labels}},
        "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def daemon_set(name: str, image: str, **pod: Any) -> Item:
    return {
        "kind": "DaemonSet",
        "metadata": {"name": name, "namespace": "kube-system"},
        "spec": {
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "template": {"spec": {"containers": [{"name": name, "image": image}], **pod}},
        },
    }


def kube_proxy() -> Item:
    made = daemon_set(
        "kube-proxy",
        "registry.k8s.io/kube-proxy:v1.36.2",
        volumes=[{"name": "kube-proxy", "configMap": {"name": "kube-proxy"}}],
    )
    (container,) = made["spec"]["template"]["spec"]["containers"]
    container["command"] = ["/usr/local/bin/kube-proxy", "--config=/var/lib/kube-proxy/config.conf"]
    container["volumeMounts"] = [{"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"}]
    return made


def agent() -> Item:
    return daemon_set("ebpfproxy", "example.org/ebpfproxy:0.1.0")


def patched(item: Item, patch: list[Item]) -> Item:
    """Applies RFC 6902 patches as far as used; a failed test operation has the API server's response."""
    made = copy.deepcopy(item)
    for step in patch:
        *path, last = [p.replace("~1", "/").replace("~0", "~") for p in step["path"].split("/")[1:]]
        at = made
        for part in path:
            at = at[part]
        if step["op"] == "test":
            if at[last] != step["value"]:
                raise ApiError(422, f"testing value {step['path']} failed: test failed")
        elif step["op"] == "add":
            at[last] = step["value"]
        else:
            del at[last]
    return made


@contextmanager
def serving(control_plane: ControlPlane) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # A body that follows its header in another segment would wait for the client's delayed ACK.
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if self.command == "PATCH":
                assert self.headers["Content-Type"] == "application/json-patch+json"
            status, found = 200, None
            try:
                found = control_plane.answer(self.command, self.path, body)
            except ApiError as error:
                status = error.status
                found = {"kind": "Status", "code": status, "message": str(error)}
            data = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PATCH = do_POST = do_DELETE = _do  # noqa: N815 - the base class's names

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        control_plane.join()
