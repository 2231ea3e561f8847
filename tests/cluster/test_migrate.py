"""Migration from a real kube-proxy of kubeadm to the agent and back, by the operator's commands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.cluster import binaries, images
from tests.cluster.app import App
from tests.cluster.cluster import Cluster, Node, until
from tests.cluster.request_load import Failure, asking

pytestmark = [
    pytest.mark.root,
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not binaries.has("kube-proxy"), reason="KUBE_BIN has no kube-proxy"),
]

_LABEL = "ebpfproxy.io/"


@pytest.fixture
def app(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[App]:
    """Yields a cluster with kube-proxy only, in the mode of the test's parameter."""
    cluster.configure_kubeadm(request.param)
    cluster.install_kube_proxy()
    made = App(cluster)
    yield made
    made.remove()
    delete_kube_proxy(cluster)
    for node in cluster.nodes:
        node.run(["/opt/kube/kube-proxy", "--cleanup"])


def delete_kube_proxy(cluster: Cluster) -> None:
    """Deletes kube-proxy as in docs/migrate.md."""
    cluster.kubectl(
        "-n", "kube-system", "delete", "--ignore-not-found", "daemonset/kube-proxy", "configmap/kube-proxy"
    )
    until(lambda: not _pods(cluster, "kube-proxy"), "kube-proxy's pods are gone")


def _pods(cluster: Cluster, name: str) -> list[str]:
    items = cluster.get("-n", "kube-system", "pods", "-l", f"k8s-app={name}")["items"]
    return [item["metadata"]["name"] for item in items]


def _rules(node: Node) -> list[str]:
    """Returns tables of kube-proxy, and its chains in the tables of iptables except KUBE-FIREWALL.

    That belongs to kubelet as well, and `kube-proxy --cleanup` leaves it, too.
    """
    found = [line for line in node.run(["nft", "list", "tables"]).splitlines() if "kube-proxy" in line]
    for command in ("iptables-save", "ip6tables-save"):
        found += [line for line in node.run([command]).splitlines() if re.match(":KUBE-(?!FIREWALL)", line)]
    return found


def _tables(node: Node) -> list[str]:
    """Returns the tables of this project."""
    return [line for line in node.run(["nft", "list", "tables"]).splitlines() if "ebpfproxy" in line]


def _is_clean(node: Node) -> None:
    """Asserts that nothing of the agent is loaded, attached, pinned or in nftables."""
    pinned = node.run(["find", "/sys/fs/bpf", "-mindepth", "1", "-not", "-name", "*.debug"])
    assert pinned == "", "only entries that the kernel has in every bpffs remain"
    attached = node.run(["bpftool", "cgroup", "tree", "/sys/fs/cgroup/unified"], check=False)
    assert "connect4" not in attached, attached
    devices = json.loads(node.run(["bpftool", "-j", "net"]))
    assert not [each for each in devices for kind in ("tc", "xdp") if each.get(kind)], devices
    assert _tables(node) == []


def _is_gone(cluster: Cluster) -> None:
    """Asserts that the API has no object, label or annotation of the agent."""
    kinds = "daemonsets,pods,configmaps,serviceaccounts,clusterroles,clusterrolebindings,roles,rolebindings"
    output = cluster.kubectl("get", kinds, "-A", "-o", "name")
    assert not [line for line in output.splitlines() if "ebpfproxy" in line], output
    for item in cluster.get("nodes,daemonsets", "-A")["items"]:
        assert _LABEL not in json.dumps({**item, "metadata": {**item["metadata"], "managedFields": []}})


def _may_end(failure: Failure) -> bool:
    """Returns True for long connections from outside, which end with our programs, as these translate their packets."""
    return failure.client == "outside" and failure.held and failure.way.startswith("tcp")


@pytest.mark.parametrize("app", ["nftables"], indirect=True)
def test_install_and_uninstall_beside_kube_proxy_without_failed_requests(app: App) -> None:
    """install beside kube-proxy, and uninstall with clean-up, under load: only what has to end ends."""
    cluster = app.cluster
    with asking(*app.everywhere(), ended=_may_end):
        cluster.ebpfproxy("install", "--image", images.AGENT)
        cluster.ebpfproxy("uninstall", "--cleanup")
    for node in cluster.nodes:
        _is_clean(node)
    _is_gone(cluster)


@pytest.mark.parametrize("app", ["nftables", "iptables"], indirect=True)
def test_migration_and_rollback_under_load_leave_nothing(app: App) -> None:
    """plan, run, rollback and uninstall of all nodes: no request fails, and each leaves only what it should."""
    cluster = app.cluster
    everything = ["--all-nodes", "--kubeconfig", str(cluster.kubeconfig)]
    output = cluster.ebpfproxy("migrate", "plan", *everything, "--image", images.AGENT, check=False)
    assert "no agent has run" in output
    with asking(*app.everywhere()):
        cluster.ebpfproxy("install", "--image", images.AGENT)
        cluster.ebpfproxy("migrate", "plan", *everything)
        output = cluster.ebpfproxy("migrate", "run", *everything)
        assert "all 2 chosen nodes are without kube-proxy" in output
        assert not _pods(cluster, "kube-proxy")
        for node in cluster.nodes:
            assert _rules(node) == []
            # Connections that kube-proxy created are still open.
            assert _tables(node) == ["table ip ebpfproxy-handover", "table ip6 ebpfproxy-handover"]
    again = cluster.ebpfproxy("migrate", "run", *everything)
    assert "node-1: done already" in again and "node-2: done already" in again

    with asking(*app.everywhere(), ended=_may_end):
        output = cluster.ebpfproxy("migrate", "rollback", *everything, "--drain", "5s")
        assert "kube-proxy serves all 2 nodes" in output
        # A pod that ends or that a kubelet rejected may still exist for a moment.
        until(lambda: len(_pods(cluster, "kube-proxy")) == 2, "kube-proxy's pods are two")
        assert not _pods(cluster, "ebpfproxy")
        cluster.ebpfproxy("uninstall", "--cleanup")
    for node in cluster.nodes:
        _is_clean(node)
        assert _rules(node)
    _is_gone(cluster)


@pytest.mark.parametrize("app", ["nftables"], indirect=True)
def test_permanent_migration_and_forced_uninstall_leave_nothing(app: App) -> None:
    """Without kube-proxy the agent goes on, uninstall is refused, and forced it leaves nothing on nodes and in the API."""
    cluster = app.cluster
    everything = ["--all-nodes", "--kubeconfig", str(cluster.kubeconfig)]
    cluster.ebpfproxy("install", "--image", images.AGENT)
    cluster.ebpfproxy("migrate", "run", *everything)
    with asking(*app.everywhere()):
        delete_kube_proxy(cluster)
    app.spread()
    with asking(*app.everywhere()):
        output = cluster.ebpfproxy("uninstall", "--cleanup", check=False)
        assert "nobody would follow changes of Services" in output
    cluster.ebpfproxy("uninstall", "--cleanup", "--force")
    for node in cluster.nodes:
        _is_clean(node)
        assert _rules(node) == []
    _is_gone(cluster)
