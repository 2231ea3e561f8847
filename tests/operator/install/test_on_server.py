"""Installation and removal on the stand-in, and on a real API server where KUBEBUILDER_ASSETS names one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpfproxy.config import load
from tests.kube.test_real_api_server import ASSETS, RealServer
from tests.operator.install.site import IMAGE, INSTALLED, SYSTEM, Object, Real, Site, StandIn, kube_proxy

pytestmark = pytest.mark.apiserver

ADDRESS = ("--api-server", "https://cp.example:6443")
NAMES = [
    "ServiceAccount kube-system/ebpfproxy",
    "ClusterRole ebpfproxy",
    "ClusterRoleBinding ebpfproxy",
    "ConfigMap kube-system/ebpfproxy",
    "DaemonSet kube-system/ebpfproxy",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer | None]:
    if not (ASSETS / "kube-apiserver").exists():
        yield None
        return
    made = RealServer(tmp_path_factory.mktemp("apiserver"))
    yield made
    made.stop()


@pytest.fixture(params=["stand-in", "kube-apiserver"])
def site(request: pytest.FixtureRequest, server: RealServer | None, tmp_path: Path) -> Iterator[Site]:
    """Yields a site with two nodes."""
    if request.param == "stand-in":
        made: StandIn | Real = StandIn(tmp_path)
    elif server is None:
        pytest.skip("KUBEBUILDER_ASSETS names no folder with kube-apiserver and etcd")
    else:
        made = Real(server, tmp_path)
    for name in ("node-a", "node-b"):
        made.add_node(name)
    yield made
    made.stop()


def lines_with(text: str, what: str) -> list[str]:
    """Returns the objects whose lines end with ``what``."""
    return [line.removesuffix(f" {what}") for line in text.splitlines() if line.endswith(f" {what}")]


def test_second_install_changes_nothing(site: Site) -> None:
    first = site.install(*ADDRESS)
    assert first.exit_code == 0, first.output
    assert lines_with(first.stdout, "created") == NAMES
    assert first.stdout.endswith("ebpfproxy runs on 2 nodes\n")
    versions = {place: each for place, each in site.versions().items() if place[0] != "DaemonSet"}
    assert len(versions) == 4
    generation = daemon_set(site)["metadata"]["generation"]

    second = site.install(*ADDRESS)
    assert second.exit_code == 0, second.output
    assert lines_with(second.stdout, "unchanged") == NAMES
    assert {place: each for place, each in site.versions().items() if place[0] != "DaemonSet"} == versions
    assert daemon_set(site)["metadata"]["generation"] == generation
    settled = site.versions()
    assert site.install(*ADDRESS).exit_code == 0
    assert site.versions() == settled


def daemon_set(site: Site) -> Object:
    found = site.get("DaemonSet", SYSTEM, "ebpfproxy")
    assert found is not None
    return found


def test_changed_image_and_changed_address_cause_a_rollout(site: Site) -> None:
    assert site.install(*ADDRESS).exit_code == 0
    site.controller.started.clear()
    done = site.cli("install", "--image", f"{IMAGE}-new", "--timeout", "5s", *ADDRESS)
    assert lines_with(done.stdout, "configured") == ["DaemonSet kube-system/ebpfproxy"], done.output
    assert sorted(site.controller.started) == [("ebpfproxy", "node-a"), ("ebpfproxy", "node-b")]
    done = site.cli(
        "install", "--image", f"{IMAGE}-new", "--timeout", "5s", "--api-server", "https://[fd00::1]:6443"
    )
    assert lines_with(done.stdout, "configured") == NAMES[3:], done.output


def test_fields_of_other_managers_conflict_until_forced(site: Site) -> None:
    assert site.install(*ADDRESS).exit_code == 0
    path = "/apis/apps/v1/namespaces/kube-system/daemonsets/ebpfproxy"
    patch = {"spec": {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 5}}}}
    site.request("PATCH", f"{path}?fieldManager=kubectl-edit", patch)
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert lines_with(done.stdout, "unchanged") == NAMES[:4], "other objects are applied"
    assert done.stderr.splitlines()[-1] == (
        'Error: DaemonSet kube-system/ebpfproxy: 409 Conflict: Apply failed with 1 conflict: conflict with "kubectl-edit"'
        " using apps/v1: .spec.updateStrategy.rollingUpdate.maxUnavailable (--force-conflicts takes the fields over)"
    )
    done = site.install(*ADDRESS, "--force-conflicts")
    assert done.exit_code == 0, done.output
    assert lines_with(done.stdout, "configured") == NAMES[4:]
    assert site.install(*ADDRESS).exit_code == 0, "the fields are managed by ebpfproxy now"


def test_fields_added_by_others_are_kept(site: Site) -> None:
    assert site.install(*ADDRESS).exit_code == 0
    path = "/api/v1/namespaces/kube-system/configmaps/ebpfproxy"
    site.request("PATCH", path, {"metadata": {"labels": {"team": "net"}}, "data": {"theirs": "x"}})
    done = site.install(*ADDRESS)
    assert lines_with(done.stdout, "unchanged") == NAMES, done.output
    found = site.get("ConfigMap", SYSTEM, "ebpfproxy")
    assert found is not None
    assert found["data"]["theirs"] == "x"


def test_fields_that_are_no_longer_applied_are_removed(site: Site) -> None:
    assert site.install(*ADDRESS, "--image-pull-secret", "a").exit_code == 0
    assert site.install(*ADDRESS).exit_code == 0
    assert "imagePullSecrets" not in json.dumps(daemon_set(site)["spec"])


def test_dry_run_changes_nothing(site: Site) -> None:
    done = site.install(*ADDRESS, "--dry-run=server")
    assert done.exit_code == 0, done.output
    assert lines_with(done.stdout, "created (server dry run)") == NAMES
    assert site.versions() == {}
    done = site.install(*ADDRESS, "--dry-run")
    assert done.exit_code == 0
    assert done.stdout.count("\n---\n") == 4
    assert site.versions() == {}


def test_configuration_of_kube_proxy_is_inherited_also_after_its_removal(site: Site) -> None:
    configuration = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n"
    for item in kube_proxy(f"{configuration}clusterCIDR: 10.244.0.0/16\n"):
        site.create(item)
    done = site.install(*ADDRESS)
    assert done.exit_code == 0, done.output
    assert "`ebpfproxy migrate` is the next step" in done.stderr
    assert (
        "configuration: KubeProxyConfiguration is kube-proxy's, from ConfigMap kube-system/kube-proxy: config.conf"
        in done.stderr
    )
    assert "EbpfProxyConfiguration" not in done.stderr, "no earlier install has one"
    text = config(site)
    assert "clusterCIDR: 10.244.0.0/16" in text and "mode: ipvs" in text
    for kind in ("DaemonSet", "ConfigMap"):
        site.delete(kind, SYSTEM, "kube-proxy")
    done = site.install(*ADDRESS)
    assert "configuration: as it is in ConfigMap kube-system/ebpfproxy" in done.stderr
    assert lines_with(done.stdout, "unchanged") == NAMES
    assert config(site) == text
    assert site.install(*ADDRESS, "--no-inherit").exit_code == 0
    assert "mode: ipvs" not in config(site)


def test_own_document_of_an_earlier_install_stays_beside_kube_proxys(site: Site, tmp_path: Path) -> None:
    """kube-proxy's file has KubeProxyConfiguration alone: it says nothing about EbpfProxyConfiguration."""
    configuration = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: "
    for item in kube_proxy(f"{configuration}ipvs\n"):
        site.create(item)
    mine = tmp_path / "mine.yaml"
    own = "apiVersion: ebpfproxy.io/v1alpha1\nkind: EbpfProxyConfiguration\nlbAlgorithm: maglev\n"
    mine.write_text(f"{configuration}nftables\n---\n{own}externalIPs: false\n")
    assert site.install(*ADDRESS, "--config", str(mine)).exit_code == 0
    done = site.install(*ADDRESS)
    assert done.exit_code == 0, done.output
    assert [line for line in done.stderr.splitlines() if line.startswith("configuration: ")] == [
        "configuration: KubeProxyConfiguration is kube-proxy's, from ConfigMap kube-system/kube-proxy: config.conf",
        "configuration: EbpfProxyConfiguration is as it is in ConfigMap kube-system/ebpfproxy",
    ]
    found = load.parse(config(site), "config.yaml")
    assert found.kube_proxy.mode == "ipvs"
    assert (found.own.lb_algorithm, found.own.external_ips) == ("maglev", False)
    assert lines_with(site.install(*ADDRESS).stdout, "unchanged") == NAMES


def config(site: Site) -> str:
    found = site.get("ConfigMap", SYSTEM, "ebpfproxy")
    assert found is not None
    return str(found["data"]["config.yaml"])


def test_uninstall_removes_objects_and_cleans_nodes(site: Site) -> None:
    for item in kube_proxy():
        site.create(item)
    assert site.install(*ADDRESS, "--no-inherit").exit_code == 0
    done = site.uninstall("--cleanup")
    assert done.exit_code == 0, done.output
    assert lines_with(done.stdout, "deleted") == [*reversed(NAMES), "DaemonSet kube-system/ebpfproxy-cleanup"]
    assert "nothing of ebpfproxy is left on 2 nodes" in done.stdout
    assert ("ebpfproxy-cleanup", "node-b") in site.controller.started
    for place in (*INSTALLED, ("DaemonSet", SYSTEM, "ebpfproxy-cleanup")):
        assert site.get(*place) is None
    done = site.uninstall()
    assert (done.exit_code, done.stdout) == (0, "ebpfproxy is not installed in the cluster\n")
