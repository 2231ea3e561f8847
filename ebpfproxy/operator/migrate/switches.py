"""DaemonSets that a label switches off on a node: what to change in them and in nodes, and what has changed.

The DaemonSet gets a node affinity against nodes with the label, once: the controller then deletes its pod
from a node that gets the label (pkg/controller/daemon/daemon_controller.go, NodeShouldRunDaemonPod), and
makes one where it is taken away. That is a change of the pod template. A rolling update would restart the
pods of all nodes for it, one by one; so the update strategy is OnDelete meanwhile: the controller looks at
the template's affinity, not at the pods', and pods stay as they are. An annotation keeps the strategy that
it was.
"""

from __future__ import annotations

import copy
import json

import msgspec

from ebpfproxy.operator import names
from ebpfproxy.operator.api import Object, Patch
from ebpfproxy.operator.names import OFF, UPDATE_STRATEGY

_ON_DELETE = "OnDelete"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"

#: Annotations and labels of tools that restore the objects that they manage.
_OWNERS = {
    "argocd.argoproj.io/tracking-id": "Argo CD",
    "argocd.argoproj.io/instance": "Argo CD",
    "kustomize.toolkit.fluxcd.io/name": "Flux",
    "helm.toolkit.fluxcd.io/name": "Flux",
    names.HELM_RELEASE: "Helm",
    "addonmanager.kubernetes.io/mode": "the addon manager",
    "objectset.rio.cattle.io/id": "RKE2's or k3s' deploy controller",
}


class Switch(msgspec.Struct, frozen=True):
    """One DaemonSet and its label."""

    namespace: str
    name: str
    label: str

    def __str__(self) -> str:
        return f"DaemonSet {self.namespace}/{self.name}"

    @property
    def _expression(self) -> Object:
        return {"key": self.label, "operator": "NotIn", "values": [OFF]}

    # -- the DaemonSet

    def works(self, daemon_set: Object) -> bool:
        """True if every alternative of its node affinity keeps it from labelled nodes."""
        terms = [each for each in _terms(daemon_set["spec"]["template"]["spec"]) if each]
        return bool(terms) and all(self._expression in term.get("matchExpressions", ()) for term in terms)

    def install(self, daemon_set: Object) -> Patch:
        """Returns a patch that makes it work, empty where it does. Other affinities stay."""
        if self.works(daemon_set):
            return []
        pod = daemon_set["spec"]["template"]["spec"]
        affinity: Object = copy.deepcopy(pod.get("affinity") or {})
        # Terms are alternatives: each must exclude the node. An empty one matches no node.
        affinity.setdefault("nodeAffinity", {}).setdefault(_REQUIRED, {})["nodeSelectorTerms"] = [
            term
            if not term or self._expression in term.get("matchExpressions", ())
            else {**term, "matchExpressions": [*term.get("matchExpressions", ()), self._expression]}
            for term in _terms(pod)
        ] or [{"matchExpressions": [self._expression]}]
        patch = _tested(daemon_set)
        strategy = daemon_set["spec"].get("updateStrategy") or {}
        if strategy.get("type") != _ON_DELETE:
            if daemon_set["metadata"].get("annotations") is None:
                patch.append({"op": "add", "path": "/metadata/annotations", "value": {}})
            patch += [
                {"op": "add", "path": _annotation(), "value": json.dumps(strategy)},
                {"op": "add", "path": "/spec/updateStrategy", "value": {"type": _ON_DELETE}},
            ]
        return [*patch, {"op": "add", "path": "/spec/template/spec/affinity", "value": affinity}]

    def uninstall(self, daemon_set: Object) -> Patch:
        """Returns a patch that undoes :meth:`install`; empty where that was not called, or is undone."""
        annotations = daemon_set["metadata"].get("annotations") or {}
        if UPDATE_STRATEGY not in annotations:
            return []
        patch = [*_tested(daemon_set), {"op": "remove", "path": _annotation()}]
        if daemon_set["spec"].get("updateStrategy", {}).get("type") == _ON_DELETE:
            strategy = json.loads(annotations[UPDATE_STRATEGY])
            patch.append({"op": "add", "path": "/spec/updateStrategy", "value": strategy})
        if self.works(daemon_set):
            affinity = self._without(daemon_set["spec"]["template"]["spec"]["affinity"])
            path = "/spec/template/spec/affinity"
            patch.append(
                {"op": "add", "path": path, "value": affinity} if affinity else {"op": "remove", "path": path}
            )
        return patch

    def _without(self, affinity: Object) -> Object:
        made = copy.deepcopy(affinity)
        required = made["nodeAffinity"][_REQUIRED]
        terms = [self._restored(term) if term else term for term in required["nodeSelectorTerms"]]
        required["nodeSelectorTerms"] = [each for each in terms if each is not None]
        if not required["nodeSelectorTerms"]:
            del made["nodeAffinity"][_REQUIRED]
        return made if made["nodeAffinity"] else _but(made, "nodeAffinity")

    def _restored(self, term: Object) -> Object | None:
        """Returns None where nothing else was in it."""
        rest = [each for each in term["matchExpressions"] if each != self._expression]
        return ({**term, "matchExpressions": rest} if rest else _but(term, "matchExpressions")) or None

    # -- nodes

    def is_off(self, node: Object) -> bool:
        return (node["metadata"].get("labels") or {}).get(self.label) == OFF

    def turn(self, node: Object, *, off: bool) -> Patch:
        """Returns a patch that adds or removes the node's label; empty where nothing changes."""
        labels = node["metadata"].get("labels")
        path = f"/metadata/labels/{_escaped(self.label)}"
        if off:
            if self.is_off(node):
                return []
            made: Patch = (
                [] if labels is not None else [{"op": "add", "path": "/metadata/labels", "value": {}}]
            )
            return [*made, {"op": "add", "path": path, "value": OFF}]
        return [{"op": "remove", "path": path}] if self.label in (labels or {}) else []


KUBE_PROXY = Switch(names.SYSTEM, names.KUBE_PROXY, names.KUBE_PROXY_SWITCH)
AGENT = Switch(names.SYSTEM, names.AGENT, names.AGENT_SWITCH)


def owner(daemon_set: Object) -> str:
    """Returns the tool that is likely to undo a change of the DaemonSet; empty where none is known."""
    meta = daemon_set["metadata"]
    marks = {**(meta.get("labels") or {}), **(meta.get("annotations") or {})}
    return next((name for mark, name in _OWNERS.items() if mark in marks), "")


def _terms(pod: Object) -> list[Object]:
    required = ((pod.get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED) or {}
    return list(required.get("nodeSelectorTerms") or [])


def _tested(item: Object) -> Patch:
    version = item["metadata"]["resourceVersion"]
    return [{"op": "test", "path": "/metadata/resourceVersion", "value": version}]


def _annotation() -> str:
    return f"/metadata/annotations/{_escaped(UPDATE_STRATEGY)}"


def _escaped(name: str) -> str:
    """Escapes a name for a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _but(item: Object, name: str) -> Object:
    return {key: value for key, value in item.items() if key != name}
