"""Installation and removal by ``ebpfproxy install``, by the chart with helm, and by kubectl's kustomize."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import agents, images, network, traces
from tests.cluster.cluster import Cluster, until
from tests.cluster.traces import Traces
from tests.cluster.web import Web
from tests.deploy.objects import BASE, DEPLOY, by_name

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(600)]

CHART = str(DEPLOY / "chart")
#: Returns the address of the control plane that nodes reach without Services.
_ADDRESS = network.internal_ips(1)[0]
_REPOSITORY, _, _TAG = images.AGENT.partition(":")


@pytest.fixture(scope="module", autouse=True)
def before(cluster: Cluster) -> list[Traces]:
    """Returns the state of nodes before any installation."""
    until(lambda: traces.in_api(cluster) == [], "no objects of an agent are there", 60, every=1)
    return [traces.of_node(node) for node in cluster.nodes]


@pytest.fixture(scope="module")
def web(cluster: Cluster, before: list[Traces]) -> Iterator[Web]:
    made = Web(cluster, ["node-1", "node-2"])
    made.wait()
    yield made
    made.remove()


def assert_nothing_is_left(cluster: Cluster, before: list[Traces], loaded: list[set[int]]) -> None:
    """Asserts that API and nodes are as before, but for what docs/install.md names; ``loaded``: earlier programs."""
    # The garbage collector deletes a DaemonSet's revisions a moment after it.
    until(
        lambda: traces.in_api(cluster) == [], f"no objects are left of {traces.in_api(cluster)}", 60, every=1
    )
    for node, then, ids in zip(cluster.nodes, before, loaded, strict=True):
        assert ids
        assert traces.living(node, ids) == set()
        now = traces.of_node(node)
        changed = {
            name: (then.settings.get(name), value)
            for name, value in now.settings.items()
            if then.settings.get(name) != value
        }
        assert {name for name in changed if not name.startswith("net.netfilter.nf_conntrack_")} == set()
        # Bytecode for the next agent is kept.
        left = then._replace(settings=now.settings, files=["/var/cache/ebpfproxy"])
        assert now == left


# -- ebpfproxy install


def test_agents_are_healthy_and_services_served_after_install(cluster: Cluster, web: Web) -> None:
    """``install`` returns once agents run on all nodes, and Services then answer pods, nodes and hosts outside."""
    output = cluster.ebpfproxy("install", "--image", images.AGENT)
    assert output.splitlines()[-1] == "ebpfproxy runs on 2 nodes"
    agents.assert_healthy(cluster)
    web.assert_answers()


def test_second_install_changes_nothing(cluster: Cluster) -> None:
    """The second ``install`` finds all objects as they are, and no pod starts again."""
    pods = cluster.agent_pods()
    output = cluster.ebpfproxy("install", "--image", images.AGENT).splitlines()
    assert [line for line in output if not line.endswith(" unchanged")] == ["ebpfproxy runs on 2 nodes"]
    assert len(output) == 6
    assert cluster.agent_pods() == pods


def test_uninstall_is_refused_without_a_kube_proxy(cluster: Cluster) -> None:
    """Without a kube-proxy that follows Services ``uninstall`` deletes nothing, until it is forced."""
    pods = cluster.agent_pods()
    output = cluster.ebpfproxy("uninstall", "--cleanup", check=False)
    assert "there is no DaemonSet kube-system/kube-proxy" in output
    assert cluster.agent_pods() == pods


def test_uninstall_with_cleanup_removes_everything(cluster: Cluster, before: list[Traces]) -> None:
    """``uninstall --cleanup`` leaves no object, program, pin or device, and no setting but those of conntrack."""
    loaded = [traces.program_ids(node) for node in cluster.nodes]
    output = cluster.ebpfproxy("uninstall", "--cleanup", "--force")
    assert "nothing of ebpfproxy is left on 2 nodes" in output
    assert_nothing_is_left(cluster, before, loaded)


# -- helm


def helm(cluster: Cluster, *arguments: str) -> str:
    return cluster.tool("helm", "--namespace", "kube-system", *arguments, timeout=300)


def test_helm_lint_accepts_the_chart(cluster: Cluster) -> None:
    """``helm lint --strict`` has no message about the chart, with default values and with every feature on."""
    for values in ([], ["--set", "master.host=cp.example,kubeconfig=/etc/x.conf,monitoring.enabled=true"]):
        output = helm(cluster, "lint", "--strict", CHART, *values)
        assert "0 chart(s) failed" in output
        assert "[WARNING]" not in output
        assert "[ERROR]" not in output


def test_helm_and_kustomize_render_the_same(cluster: Cluster) -> None:
    """``helm template`` with default values and ``kubectl kustomize`` of the base make equal objects."""
    of_chart = helm(cluster, "template", "ebpfproxy", CHART)
    of_base = cluster.kubectl("kustomize", str(BASE))
    assert _comparable(of_chart) == _comparable(of_base)


def _comparable(text: str) -> Any:
    """Parses the configuration file, since the base's has comments."""
    made = by_name(filter(None, yaml.safe_load_all(text)))
    data = made["ConfigMap", "ebpfproxy"]["data"]
    data["config.yaml"] = list(yaml.safe_load_all(data["config.yaml"]))
    return made


def test_helm_installs(cluster: Cluster, web: Web) -> None:
    """``helm install --wait`` returns once agents are ready, without a value that names the API server."""
    image = f"image.repository={_REPOSITORY},image.tag={_TAG}"
    helm(cluster, "install", "ebpfproxy", CHART, "--set", image, "--wait", "--timeout=4m")
    agents.assert_healthy(cluster)
    web.assert_answers()


def test_helm_upgrades_to_a_changed_value(cluster: Cluster, web: Web) -> None:
    """A changed ``master.host`` comes to all agents by a rolling update that ``helm upgrade --wait`` waits for."""
    values = f"master.host={_ADDRESS},config.kubeProxy.conntrack.tcpEstablishedTimeout=2h"
    helm(cluster, "upgrade", "ebpfproxy", CHART, "--reuse-values", "--set", values, "--wait", "--timeout=4m")
    assert established_timeouts(cluster) == [7200.0, 7200.0]
    assert api_servers(cluster) == {_ADDRESS}
    web.assert_answers()


def test_helm_rolls_back(cluster: Cluster, web: Web) -> None:
    """``helm rollback --wait`` brings agents back that have the first values."""
    helm(cluster, "rollback", "ebpfproxy", "1", "--wait", "--timeout=4m")
    assert established_timeouts(cluster) == [86400.0, 86400.0]
    assert api_servers(cluster) == {"10.96.0.1"}
    web.assert_answers()


def established_timeouts(cluster: Cluster) -> list[float]:
    return [each["agent"]["timeouts"]["tcp_established"] for each in agents.assert_healthy(cluster).values()]


def api_servers(cluster: Cluster) -> set[str]:
    """Returns the API server addresses in the agents' containers."""
    return {
        agents.execute(cluster, pod, "printenv", "KUBERNETES_SERVICE_HOST").strip()
        for pod in cluster.agent_pods().values()
    }


def test_helm_release_is_uninstalled_by_helm(cluster: Cluster, web: Web, before: list[Traces]) -> None:
    """``ebpfproxy uninstall`` leaves a release to helm; after ``helm uninstall`` nodes translate until cleaned."""
    output = cluster.ebpfproxy("uninstall", check=False)
    assert "is of the Helm release ebpfproxy: `helm uninstall ebpfproxy`" in output
    loaded = [traces.program_ids(node) for node in cluster.nodes]
    helm(cluster, "uninstall", "ebpfproxy", "--wait", "--timeout=2m")
    web.assert_answers()
    cluster.ebpfproxy("uninstall", "--cleanup", "--image", images.AGENT, "--force")
    assert_nothing_is_left(cluster, before, loaded)


# -- kustomize


@pytest.fixture
def overlay(folder: Path) -> Path:
    """Returns the overlay of docs/install.md: another image and the API server's address."""
    made = folder / "overlay"
    made.mkdir()
    (made / "kustomization.yaml").write_text(
        json.dumps(
            {
                "resources": [os.path.relpath(BASE, made)],
                "images": [{"name": "ebpfproxy", "newName": _OTHER, "newTag": "7"}],
                "patches": [{"path": "address.yaml"}],
            }
        )
    )
    (made / "address.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ebpfproxy, namespace: kube-system}\n"
        f'data:\n  KUBERNETES_SERVICE_HOST: {_ADDRESS}\n  KUBERNETES_SERVICE_PORT: "6443"\n'
    )
    return made


_OTHER = "registry.example/proxies/agent"


def test_kustomize_overlay_sets_image_and_address(
    cluster: Cluster, web: Web, overlay: Path, before: list[Traces]
) -> None:
    """``kubectl apply -k`` of an overlay makes agents of its image that ask at its address; ``delete -k`` ends them."""
    for node in cluster.nodes:
        node.ctr("images", "tag", f"docker.io/library/{images.AGENT}", f"{_OTHER}:7")
    cluster.kubectl("apply", "-k", str(overlay))
    cluster.kubectl("-n", "kube-system", "rollout", "status", "daemonset/ebpfproxy", "--timeout=240s")
    agents.assert_healthy(cluster)
    assert api_servers(cluster) == {_ADDRESS}
    web.assert_answers()
    loaded = [traces.program_ids(node) for node in cluster.nodes]
    cluster.kubectl("delete", "-k", str(overlay), "--wait")
    cluster.ebpfproxy("uninstall", "--cleanup", "--image", f"{_OTHER}:7", "--force")
    assert_nothing_is_left(cluster, before, loaded)
