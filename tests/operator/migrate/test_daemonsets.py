"""kube-proxy's DaemonSet is excluded from a node and restored, by patches and their requests."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.migrate import daemonsets
from ebpfproxy.operator.migrate.daemonsets import Cluster
from ebpfproxy.operator.migrate.switches import KUBE_PROXY, owner
from ebpfproxy.operator.names import UPDATE_STRATEGY
from ebpfproxy.operator.waiting import WaitError
from tests.operator.migrate import control_plane
from tests.operator.migrate.control_plane import ControlPlane, Item, patched, serving

_DAEMON_SET = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"


def daemon_set(*terms: Item) -> Item:
    """Returns kubeadm's DaemonSet with these terms of a required node affinity."""
    made = control_plane.kube_proxy()
    made["metadata"]["resourceVersion"] = "7"
    if terms:
        made["spec"]["template"]["spec"]["affinity"] = {
            "podAffinity": {"kept": True},
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": list(terms)},
                "preferredDuringSchedulingIgnoredDuringExecution": ["kept"],
            },
        }
    return made


EXPRESSION = {"key": "ebpfproxy.io/kube-proxy", "operator": "NotIn", "values": ["off"]}
OTHER = {"key": "a", "operator": "Exists"}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([], [{"matchExpressions": [EXPRESSION]}]),
        (
            [{"matchExpressions": [OTHER]}, {"matchFields": [OTHER]}],
            [
                {"matchExpressions": [OTHER, EXPRESSION]},
                {"matchFields": [OTHER], "matchExpressions": [EXPRESSION]},
            ],
        ),
        ([{}, {"matchFields": [OTHER]}], [{}, {"matchFields": [OTHER], "matchExpressions": [EXPRESSION]}]),
    ],
    ids=["without an affinity", "two alternatives", "one that matches nothing"],
)
def test_every_affinity_term_excludes_labelled_nodes_and_is_restored(
    terms: list[Item], expected: list[Item]
) -> None:
    before = daemon_set(*terms)
    assert not KUBE_PROXY.works(before)
    after = patched(before, KUBE_PROXY.install(before))
    affinity = after["spec"]["template"]["spec"]["affinity"]
    required = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == expected
    assert ("podAffinity" in affinity) == bool(terms)
    assert after["spec"]["updateStrategy"] == {"type": "OnDelete"}, "the patch restarts no pod"
    assert KUBE_PROXY.works(after)
    assert KUBE_PROXY.install(after) == []
    restored = patched(after, KUBE_PROXY.uninstall(after))
    assert restored["metadata"].pop("annotations") == {}
    assert restored == before
    assert KUBE_PROXY.uninstall(restored) == []


def test_affinity_term_that_excludes_labelled_nodes_already_is_kept() -> None:
    before = daemon_set({"matchExpressions": [EXPRESSION]}, {"matchExpressions": [OTHER]})
    after = patched(before, KUBE_PROXY.install(before))
    required = after["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert required["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"] == [
        {"matchExpressions": [EXPRESSION]},
        {"matchExpressions": [OTHER, EXPRESSION]},
    ]


def test_update_strategy_on_delete_of_others_is_kept() -> None:
    before = daemon_set()
    before["spec"]["updateStrategy"] = {"type": "OnDelete"}
    after = patched(before, KUBE_PROXY.install(before))
    assert UPDATE_STRATEGY not in (after["metadata"].get("annotations") or {})
    assert after["spec"]["updateStrategy"] == {"type": "OnDelete"}


def test_fields_changed_back_by_others_are_kept() -> None:
    before = daemon_set()
    changed = patched(before, KUBE_PROXY.install(before))
    changed["spec"] = copy.deepcopy(before["spec"])
    restored = patched(changed, KUBE_PROXY.uninstall(changed))
    assert restored["spec"] == before["spec"]


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"annotations": {"argocd.argoproj.io/tracking-id": "x"}}, "Argo CD"),
        ({"labels": {"addonmanager.kubernetes.io/mode": "Reconcile"}}, "the addon manager"),
        ({"labels": {"k8s-app": "kube-proxy"}, "annotations": None}, ""),
    ],
)
def test_owner_of_the_daemon_set_is_recognized_by_labels_and_annotations(meta: Item, expected: str) -> None:
    assert owner({"metadata": meta}) == expected


def test_label_is_added_and_removed_and_others_are_kept() -> None:
    node: Item = {"metadata": {"labels": {"a": "b"}}}
    off = patched(node, KUBE_PROXY.turn(node, off=True))
    assert off["metadata"]["labels"] == {"a": "b", "ebpfproxy.io/kube-proxy": "off"}
    assert KUBE_PROXY.turn(off, off=True) == []
    assert patched(off, KUBE_PROXY.turn(off, off=False)) == node
    assert KUBE_PROXY.turn(node, off=False) == []
    bare: Item = {"metadata": {}}
    assert KUBE_PROXY.turn(patched(bare, KUBE_PROXY.turn(bare, off=True)), off=True) == []


class Ready:
    """Acts as a kubelet whose pods are ready at once."""

    def __init__(self) -> None:
        self.ends = threading.Event()
        self.ends.set()

    def start(self, pod: Item, control_plane: ControlPlane) -> None:
        control_plane.report(pod, phase="Running", conditions=[{"type": "Ready", "status": "True"}])

    def stop(self, pod: Item) -> None:
        self.ends.wait(10)


@pytest.fixture
def plane() -> Iterator[tuple[ControlPlane, str]]:
    made = ControlPlane(Ready(), "node-a", "node-b")
    made.put(control_plane.kube_proxy())
    with serving(made) as url:
        yield made, url


def test_kube_proxy_is_removed_from_one_node_and_restored(plane: tuple[ControlPlane, str]) -> None:
    state, url = plane
    node = Cluster(Api.from_options(None, url), "node-a")
    found = node.find()
    assert found is not None
    (pod,) = found.pods
    assert (found.avoids, found.labelled) == (False, False)
    assert found.image == "registry.k8s.io/kube-proxy:v1.36.2"
    assert node.configuration() is None

    assert node.stop(5)[-1] == "kube-proxy's pod is gone"
    assert state.requests == [("PATCH", _DAEMON_SET), ("PATCH", "/api/v1/nodes/node-a")]
    assert not state.pods("kube-proxy", "node-a")
    assert len(state.pods("kube-proxy", "node-b")) == 1
    assert state.restarted == []
    assert node.stop(5) == ["kube-proxy's pod is gone"], "a repeated call changes nothing"
    assert len(state.requests) == 2

    assert node.start(5) == [
        "removed label ebpfproxy.io/kube-proxy from node-a",
        "kube-proxy's pod is ready",
    ]
    assert node.tidy() == [
        "DaemonSet kube-system/kube-proxy is as it was: pods that were made meanwhile restart"
    ]
    assert state.get("DaemonSet", "kube-system", "kube-proxy")["spec"] == control_plane.kube_proxy()["spec"]
    (restarted,) = state.restarted
    assert restarted != pod
    assert node.tidy() == []


def test_daemon_set_changed_meanwhile_is_read_again(plane: tuple[ControlPlane, str]) -> None:
    state, url = plane
    words = (422, "testing value /metadata/resourceVersion failed: test failed")
    state.refusals["PATCH", "/kube-proxy"] = words
    state.once.add(("PATCH", "/kube-proxy"))
    assert len(daemonsets.install(Api.from_options(None, url), KUBE_PROXY)) == 1
    state.refusals["PATCH", "/kube-proxy"] = (403, "daemonsets.apps is forbidden: no patch for you")
    state.put(control_plane.kube_proxy())
    with pytest.raises(ApiError, match=r"403 Forbidden: daemonsets\.apps is forbidden: no patch for you$"):
        daemonsets.install(Api.from_options(None, url), KUBE_PROXY)


def test_requests_to_an_overloaded_server_are_retried(
    plane: tuple[ControlPlane, str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("ebpfproxy.kube.client._BACKOFF_FIRST", 0.01)
    state, url = plane
    state.refusals["GET", "/node-a"] = (429, "too many requests")
    state.once.add(("GET", "/node-a"))
    found = Api.from_options(None, url).get("Node", "", "node-a")
    assert found is not None
    assert found["metadata"]["name"] == "node-a"


def test_remaining_pod_and_missing_node_are_errors(plane: tuple[ControlPlane, str]) -> None:
    state, url = plane
    assert isinstance(state.kubelet, Ready)
    state.kubelet.ends.clear()
    with pytest.raises(WaitError, match=r"node-a: kube-proxy: its pod is still there after 0\.1 s"):
        Cluster(Api.from_options(None, url), "node-a").stop(0.1)
    state.kubelet.ends.set()
    with pytest.raises(ApiError, match="no node node-c"):
        Cluster(Api.from_options(None, url), "node-c").find()
    with pytest.raises(ApiError, match="Connection refused"):
        Cluster(Api.from_options(None, "http://127.0.0.1:1"), "node-a").find()


def test_cluster_without_the_daemon_set(plane: tuple[ControlPlane, str]) -> None:
    state, url = plane
    del state.objects["DaemonSet"]["kube-system", "kube-proxy"]
    assert Cluster(Api.from_options(None, url), "node-a").find() is None
