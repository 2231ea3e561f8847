"""kube-proxy's DaemonSet: kept away from one node by a label, so that the others go on with it.

``stop`` gives the DaemonSet an affinity against nodes with the label, once, and labels the node: the
controller then deletes its pod there (pkg/controller/daemon/daemon_controller.go, NodeShouldRunDaemonPod).
``start`` takes the label away. The affinity stays: without the label it means nothing. Changing it restarts
kube-proxy's pods on all nodes, one after the other; their rules stay meanwhile.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import urllib3
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

LABEL, OFF = "ebpfproxy.io/kube-proxy", "off"
_NAMESPACE, _NAME = "kube-system", "kube-proxy"
_NOT_FOUND = 404
_SECONDS = 10.0
_EXPRESSION = {"key": LABEL, "operator": "NotIn", "values": [OFF]}

Object = dict[str, Any]
Patch = list[dict[str, Any]]


class ClusterError(Exception):
    """The API server cannot be asked, or said no; the message has its words."""


class DaemonSet(msgspec.Struct, frozen=True, kw_only=True):
    """What of kube-proxy's DaemonSet matters here."""

    name: str
    image: str
    #: Kept away from nodes with the label already.
    avoids: bool
    #: Of this node: it has the label.
    labelled: bool
    #: kube-proxy pods on this node, by name.
    pods: tuple[str, ...]


# -- decisions


def avoids(daemon_set: Object) -> bool:
    """Whether every alternative of its node affinity keeps it from labelled nodes."""
    terms = _terms(daemon_set["spec"]["template"]["spec"])
    return bool(terms) and all(_EXPRESSION in term.get("matchExpressions", []) for term in terms)


def avoid(daemon_set: Object) -> Patch:
    """A JSON patch (RFC 6902) that does; empty where there is nothing to do. Other affinities stay."""
    if avoids(daemon_set):
        return []
    pod = daemon_set["spec"]["template"]["spec"]
    affinity: Object = copy.deepcopy(pod.get("affinity") or {})
    required = affinity.setdefault("nodeAffinity", {}).setdefault(
        "requiredDuringSchedulingIgnoredDuringExecution", {}
    )
    # Terms are alternatives: each must exclude the node.
    required["nodeSelectorTerms"] = [
        term
        if _EXPRESSION in term.get("matchExpressions", [])
        else {**term, "matchExpressions": [*term.get("matchExpressions", []), _EXPRESSION]}
        for term in _terms(pod) or [{}]
    ]
    version = daemon_set["metadata"]["resourceVersion"]
    return [
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "add", "path": "/spec/template/spec/affinity", "value": affinity},
    ]


def _terms(pod: Object) -> list[Object]:
    required = ((pod.get("affinity") or {}).get("nodeAffinity") or {}).get(
        "requiredDuringSchedulingIgnoredDuringExecution"
    ) or {}
    return list(required.get("nodeSelectorTerms") or [])


def label(node: Object, *, off: bool) -> Patch:
    """A JSON patch that labels the node, or takes the label away; empty where it is so."""
    labels = node["metadata"].get("labels")
    path = f"/metadata/labels/{LABEL.replace('/', '~1')}"
    if off:
        if (labels or {}).get(LABEL) == OFF:
            return []
        made: Patch = [] if labels is not None else [{"op": "add", "path": "/metadata/labels", "value": {}}]
        return [*made, {"op": "add", "path": path, "value": OFF}]
    return [{"op": "remove", "path": path}] if LABEL in (labels or {}) else []


# -- the API


class Cluster:
    """Needs more than the agent may: get and patch of the DaemonSet and the node, list of pods."""

    def __init__(self, kubeconfig: Path | None, master: str | None, node: str) -> None:
        """Raises ClusterError."""
        configuration = kube_client.Configuration()
        configuration.retries = False
        try:
            if kubeconfig is not None:
                kube_config.load_kube_config(
                    str(kubeconfig), client_configuration=configuration, persist_config=False
                )
            elif master is None:
                kube_config.load_incluster_config(client_configuration=configuration)
        except (ConfigException, OSError, ValueError) as error:
            raise ClusterError(f"{kubeconfig or 'service account'}: {error}") from error
        if master is not None:
            configuration.host = master.rstrip("/")
        self.host = str(configuration.host)
        self.node = node
        api = kube_client.ApiClient(configuration)
        self._core, self._apps = kube_client.CoreV1Api(api), kube_client.AppsV1Api(api)

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Object:
        try:
            answer = function(*arguments, **options, _preload_content=False, _request_timeout=_SECONDS)
        except ApiException as error:
            if error.status == _NOT_FOUND:
                raise KeyError(arguments[0]) from error
            raise ClusterError(f"{self.host}: {error.status} {error.reason}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ClusterError(f"{self.host}: {error}") from error
        found: Object = json.loads(answer.data)
        return found

    def find(self) -> DaemonSet | None:
        """None where the cluster has no DaemonSet of that name. Raises ClusterError."""
        try:
            found = self._daemon_set()
        except KeyError:
            return None
        return DaemonSet(
            name=f"{_NAMESPACE}/{_NAME}",
            image=found["spec"]["template"]["spec"]["containers"][0].get("image", ""),
            avoids=avoids(found),
            labelled=not label(self._node(), off=True),
            pods=tuple(self.pods()),
        )

    def _daemon_set(self) -> Object:
        return self._call(self._apps.read_namespaced_daemon_set, _NAME, _NAMESPACE)

    def _node(self) -> Object:
        try:
            return self._call(self._core.read_node, self.node)
        except KeyError as error:
            raise ClusterError(f"{self.host}: no node {self.node}") from error

    def pods(self, *, ready: bool = False) -> list[str]:
        """kube-proxy's pods on this node: those of the DaemonSet, by their owner."""
        listed = self._call(
            self._core.list_namespaced_pod, _NAMESPACE, field_selector=f"spec.nodeName={self.node}"
        )
        return [
            pod["metadata"]["name"]
            for pod in listed["items"]
            if any(
                owner["kind"] == "DaemonSet" and owner["name"] == _NAME
                for owner in pod["metadata"].get("ownerReferences", ())
            )
            and (not ready or _is_ready(pod))
        ]

    def config(self) -> str:
        """The configuration that kubeadm gives kube-proxy; empty without one."""
        try:
            found = self._call(self._core.read_namespaced_config_map, _NAME, _NAMESPACE)
        except KeyError:
            return ""
        return str((found.get("data") or {}).get("config.conf", ""))

    def stop(self, seconds: float) -> list[str]:
        """Keeps kube-proxy from this node, and waits until it is gone. Raises ClusterError."""
        done = []
        if patch := avoid(self._daemon_set()):
            self._call(self._apps.patch_namespaced_daemon_set, _NAME, _NAMESPACE, patch)
            done.append(f"gave DaemonSet {_NAMESPACE}/{_NAME} an affinity against nodes with {LABEL}={OFF}")
        if patch := label(self._node(), off=True):
            self._call(self._core.patch_node, self.node, patch)
            done.append(f"labelled node {self.node} {LABEL}={OFF}")
        self._wait(lambda: not self.pods(), seconds, "its pod is still on the node")
        return [*done, "kube-proxy's pod is gone"]

    def start(self, seconds: float) -> list[str]:
        """Lets kube-proxy come back to this node, and waits until it is ready. Raises ClusterError."""
        done = []
        if patch := label(self._node(), off=False):
            self._call(self._core.patch_node, self.node, patch)
            done.append(f"removed label {LABEL} from node {self.node}")
        self._wait(lambda: bool(self.pods(ready=True)), seconds, "its pod is not ready")
        return [*done, "kube-proxy's pod is ready"]

    def _wait(self, condition: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() >= deadline:
                raise ClusterError(f"kube-proxy: {what} after {seconds:g} s")
            time.sleep(0.5)


def _is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
