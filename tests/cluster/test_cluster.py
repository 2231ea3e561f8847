"""The cluster that every other module of this folder uses."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]


def test_kubeadm_creates_a_cluster_without_kube_proxy(cluster: Cluster) -> None:
    """``kubeadm init --skip-phases=addon/kube-proxy``; Nodes are Ready with both families' addresses."""
    nodes = cluster.get("nodes")["items"]
    assert [node["metadata"]["name"] for node in nodes] == ["node-1", "node-2"]
    for node in nodes:
        kinds = [each["type"] for each in node["status"]["addresses"]]
        assert kinds.count("InternalIP") == 2
        assert len(node["spec"]["podCIDRs"]) == 2
    assert not cluster.get("-n", "kube-system", "daemonsets")["items"]
