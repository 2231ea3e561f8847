"""Installation in the order of docs/install.md: control plane, agent, CNI, then the other nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import agents, audit, images
from tests.cluster.cluster import Cluster, until
from tests.cluster.web import Web

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def young(folder: Path) -> Iterator[Cluster]:
    """Yields a control plane on one node that never had a kube-proxy and has no CNI."""
    with Cluster(folder / "order") as made:
        made.boot()
        made.init(proxy=False)
        yield made


@pytest.fixture(scope="module")
def web(young: Cluster) -> Web:
    """Yields pods of the first node, which wait for its CNI."""
    return Web(young, ["node-1"])


def ready(cluster: Cluster) -> dict[str, bool]:
    """Returns the nodes with their Ready conditions."""
    return {
        node["metadata"]["name"]: any(
            each["type"] == "Ready" and each["status"] == "True" for each in node["status"]["conditions"]
        )
        for node in cluster.get("nodes")["items"]
    }


def test_agent_is_installed_before_the_cni(young: Cluster) -> None:
    """``install`` ends well on a node that is NotReady for want of a CNI, and the agent there is healthy."""
    output = young.ebpfproxy("install", "--image", images.AGENT)
    assert output.splitlines()[-1] == "ebpfproxy runs on 1 nodes"
    assert ready(young) == {"node-1": False}
    assert list(agents.assert_healthy(young)) == ["node-1"]


def test_agent_uses_the_address_of_cluster_info(young: Cluster) -> None:
    """The agent asks the address that ``install`` found in cluster-info, not the ``kubernetes`` Service's."""
    (status,) = agents.statuses(young).values()
    assert status["agent"]["source"] == "API server https://192.168.77.1:6443"


def test_kubernetes_service_is_served_before_the_cni(young: Cluster) -> None:
    """What a CNI's agent asks first, the cluster IP of ``kubernetes``, works from the node's network at once."""
    output = young.nodes[0].run(["curl", "-skm5", "https://10.96.0.1/version"])
    assert json.loads(output)["gitVersion"].startswith("v1.")


def test_node_is_ready_with_the_cni(young: Cluster, web: Web) -> None:
    """Once the CNI is there the Node is Ready, and a Service with pods answers pods, nodes and hosts outside."""
    pods = young.agent_pods()
    young.network.route_pods()
    young.configure_cni(young.nodes[0])
    young.wait_for_nodes()
    web.wait()
    web.assert_answers()
    assert young.agent_pods() == pods, "the agent has not been replaced"


def test_joining_node_gets_its_agent_before_its_cni(young: Cluster) -> None:
    """A node that joins later is served while it is NotReady, and nobody has to install anything."""
    young.join()
    until(lambda: "node-2" in young.agent_pods(), "an agent's pod on node-2")
    young.kubectl("-n", "kube-system", "rollout", "status", "daemonset/ebpfproxy", "--timeout=240s")
    assert ready(young) == {"node-1": True, "node-2": False}
    agents.assert_healthy(young)
    output = young.nodes[1].run(["curl", "-skm5", "https://10.96.0.1/version"])
    assert json.loads(output)["gitVersion"].startswith("v1.")


def test_pods_of_both_nodes_reply(young: Cluster, web: Web) -> None:
    """With its CNI the second node is Ready; its pods are endpoints, and ask as those of the first do."""
    young.configure_cni(young.nodes[1])
    young.wait_for_nodes()
    web.add("node-2")
    web.wait()
    web.assert_answers()


def test_kubeconfig_of_kubelet_is_sufficient(young: Cluster, web: Web) -> None:
    """Without the address in the ConfigMap, agents on cleaned nodes find the API server in kubelet.conf."""
    young.ebpfproxy("uninstall", "--cleanup", "--force")
    gone = young.nodes[0].run(["curl", "-skm1", "https://10.96.0.1/version"], check=False)
    assert gone == ""
    helm = ["--namespace", "kube-system", "install", "ebpfproxy", str(images.TOP / "deploy/chart")]
    young.tool("helm", *helm, "--wait", "--timeout=4m")
    for node, status in agents.assert_healthy(young).items():
        assert status["agent"]["source"] == "API server https://192.168.77.1:6443", node
    web.assert_answers()


def test_no_request_of_an_agent_was_refused(young: Cluster) -> None:
    """The API server refused no request of an agent, in all of this order."""
    found = audit.requests(young)
    assert found
    assert audit.refused(found) == []
