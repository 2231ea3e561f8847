"""kube-proxy's DaemonSet is kept from one node and comes back: the patches, and their requests."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ebpfproxy.migrate import cluster
from ebpfproxy.migrate.cluster import Cluster, ClusterError

_PREFIX = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-proxy"


def daemon_set(*terms: dict[str, Any]) -> dict[str, Any]:
    """As kubeadm makes it, with these alternatives of a required node affinity."""
    pod: dict[str, Any] = {
        "containers": [{"name": "kube-proxy", "image": "registry.k8s.io/kube-proxy:v1.36.2"}],
        "nodeSelector": {"kubernetes.io/os": "linux"},
    }
    if terms:
        required = {"nodeSelectorTerms": list(terms)}
        pod["affinity"] = {
            "podAffinity": {"kept": True},
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": required,
                "preferredDuringSchedulingIgnoredDuringExecution": ["kept"],
            },
        }
    return {"metadata": {"resourceVersion": "7"}, "spec": {"template": {"spec": pod}}}


def patched(item: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """RFC 6902, as far as it is used."""
    made = copy.deepcopy(item)
    for step in patch:
        *path, last = [p.replace("~1", "/").replace("~0", "~") for p in step["path"].split("/")[1:]]
        at = made
        for part in path:
            at = at[part]
        if step["op"] == "test":
            assert at[last] == step["value"]
        elif step["op"] == "add":
            at[last] = step["value"]
        else:
            del at[last]
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
        (
            [{"matchExpressions": [EXPRESSION]}, {"matchExpressions": [OTHER]}],
            [{"matchExpressions": [EXPRESSION]}, {"matchExpressions": [OTHER, EXPRESSION]}],
        ),
    ],
)
def test_every_alternative_of_the_affinity_excludes_labelled_nodes(
    terms: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    before = daemon_set(*terms)
    assert not cluster.avoids(before)
    after = patched(before, cluster.avoid(before))
    affinity = after["spec"]["template"]["spec"]["affinity"]
    required = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == expected
    assert ("podAffinity" in affinity) == bool(terms)
    assert cluster.avoids(after)
    assert cluster.avoid(after) == []


def test_a_label_comes_and_goes_and_others_stay() -> None:
    node: dict[str, Any] = {"metadata": {"labels": {"a": "b"}}}
    off = patched(node, cluster.label(node, off=True))
    assert off["metadata"]["labels"] == {"a": "b", "ebpfproxy.io/kube-proxy": "off"}
    assert cluster.label(off, off=True) == []
    assert patched(off, cluster.label(off, off=False)) == node
    assert cluster.label(node, off=False) == []
    bare: dict[str, Any] = {"metadata": {}}
    assert cluster.label(patched(bare, cluster.label(bare, off=True)), off=True) == []


class Api:
    """What the API server has, and the DaemonSet controller's part in it."""

    def __init__(self) -> None:
        self.daemon_set: dict[str, Any] | None = daemon_set()
        self.node: dict[str, Any] = {"metadata": {"name": "node-a", "labels": {}}}
        self.patches: list[str] = []

    def pods(self) -> list[dict[str, Any]]:
        away = self.daemon_set is None or (
            cluster.avoids(self.daemon_set) and "ebpfproxy.io/kube-proxy" in self.node["metadata"]["labels"]
        )
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        owners = [("DaemonSet", "kube-flannel-ds", "flannel-1")]
        owners += [] if away else [("DaemonSet", "kube-proxy", "kube-proxy-x7k2p")]
        return [
            {
                "metadata": {"name": name, "ownerReferences": [{"kind": kind, "name": owner}]},
                "status": ready,
            }
            for kind, owner, name in owners
        ]

    def get(self, path: str) -> Any:
        if path.startswith("/api/v1/namespaces/kube-system/pods"):
            assert "fieldSelector=spec.nodeName%3Dnode-a" in path
            return {"items": self.pods()}
        return {_PREFIX: self.daemon_set, "/api/v1/nodes/node-a": self.node}.get(path)

    def patch(self, path: str, kind: str, body: list[dict[str, Any]]) -> Any:
        assert kind == "application/json-patch+json"
        self.patches.append(path)
        if path == _PREFIX:
            assert self.daemon_set is not None
            self.daemon_set = patched(self.daemon_set, body)
            return self.daemon_set
        self.node = patched(self.node, body)
        return self.node


@pytest.fixture
def api() -> Iterator[tuple[Api, str]]:
    state = Api()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(state.get(self.path))

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(state.patch(self.path, self.headers["Content-Type"], body))

        def _answer(self, found: Any) -> None:
            data = json.dumps(found or {}).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_it_leaves_one_node_and_comes_back(api: tuple[Api, str]) -> None:
    state, url = api
    node = Cluster(None, url, "node-a")
    found = node.find()
    assert found is not None
    assert (found.pods, found.avoids, found.labelled) == (("kube-proxy-x7k2p",), False, False)
    assert found.image == "registry.k8s.io/kube-proxy:v1.36.2"
    assert node.config() == ""

    assert node.stop(5)[-1] == "kube-proxy's pod is gone"
    assert state.patches == [_PREFIX, "/api/v1/nodes/node-a"]
    assert [pod["metadata"]["name"] for pod in state.pods()] == ["flannel-1"]
    assert node.stop(5) == ["kube-proxy's pod is gone"], "again is nothing to do"
    assert len(state.patches) == 2

    assert node.start(5) == [
        "removed label ebpfproxy.io/kube-proxy from node node-a",
        "kube-proxy's pod is ready",
    ]
    assert node.pods() == ["kube-proxy-x7k2p"]


def test_a_pod_that_stays_and_a_node_that_is_not_there_are_errors(api: tuple[Api, str]) -> None:
    state, url = api
    state.pods = lambda: Api.pods(Api())  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match=r"its pod is still on the node after 0\.1 s"):
        Cluster(None, url, "node-a").stop(0.1)
    with pytest.raises(ClusterError, match="no node node-b"):
        Cluster(None, url, "node-b").find()
    with pytest.raises(ClusterError, match="Connection refused"):
        Cluster(None, "http://127.0.0.1:1", "node-a").find()


def test_a_cluster_without_the_daemon_set_has_none(api: tuple[Api, str]) -> None:
    state, url = api
    state.daemon_set = None
    assert Cluster(None, url, "node-a").find() is None
