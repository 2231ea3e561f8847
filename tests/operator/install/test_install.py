"""Errors of an installation are one line with the object and the server's message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.kube.files import kubeconfig
from tests.kube.test_real_api_server import TOKEN
from tests.operator.install.site import IMAGE, SYSTEM, StandIn, kube_proxy

ADDRESS = ("--api-server", "https://cp.example:6443")
KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
APPLY = "application/apply-patch+yaml"


def changes(site: StandIn) -> list[str]:
    """Returns the paths of changed objects of an installation."""
    return [
        path
        for path, query in site.server.requests
        if path.endswith("/ebpfproxy") and query.get("fieldManager") == "ebpfproxy"
    ]


# -- errors


def test_forbidden_object_is_reported_and_no_pods_are_created(site: StandIn) -> None:
    site.server.denied.add("patch clusterroles")
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "ServiceAccount kube-system/ebpfproxy created",
        "ClusterRoleBinding ebpfproxy created",
        "ConfigMap kube-system/ebpfproxy created",
    ]
    assert done.stderr.splitlines()[-2:] == [
        'Error: ClusterRole ebpfproxy: 403 Forbidden: clusterroles.rbac.authorization.k8s.io "ebpfproxy" is forbidden:'
        ' User "test" cannot patch resource "clusterroles" in API group "rbac.authorization.k8s.io" at the cluster scope',
        "DaemonSet kube-system/ebpfproxy: not sent: its pods need what has failed",
    ]
    site.server.denied.clear()
    assert site.install(*ADDRESS).exit_code == 0


def test_immutable_field_is_reported_with_the_servers_422(site: StandIn) -> None:
    site.create(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "ebpfproxy", "namespace": SYSTEM},
            "spec": {
                "selector": {"matchLabels": {"app": "e"}},
                "template": {"metadata": {"labels": {"app": "e"}}, "spec": {"containers": []}},
            },
        }
    )
    done = site.install(*ADDRESS, "--force-conflicts")
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: DaemonSet kube-system/ebpfproxy: 422 Unprocessable Entity: DaemonSet.apps")
    assert last.endswith("field is immutable")


def test_nodes_switched_off_by_a_rollback_are_reported(site: StandIn) -> None:
    site.add_node("node-x", **{"ebpfproxy.io/agent": "off"})
    assert "warning: no agent will run on node-x: label ebpfproxy.io/agent=off" in site.install().stderr
    site.server.denied.add("nodes")
    assert "whether nodes have the label ebpfproxy.io/agent=off is not known" in site.install().stderr


def test_second_installation_in_another_namespace_is_refused(site: StandIn) -> None:
    """The binding names one namespace: agents in another would lose their permissions."""
    assert site.install(*ADDRESS).exit_code == 0
    done = site.install(*ADDRESS, "-n", "other")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == (
        "Error: ebpfproxy is in namespace kube-system, and a cluster has one: -n kube-system, or uninstall it there"
    )


def test_two_conflicts_are_a_one_line_error(site: StandIn) -> None:
    assert site.install(*ADDRESS).exit_code == 0
    path = "/api/v1/namespaces/kube-system/configmaps/ebpfproxy"
    site.request("PATCH", path, {"data": {"config.yaml": "x", "KUBERNETES_SERVICE_HOST": "y"}})
    done = site.install(*ADDRESS)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (
        1,
        "Error: ConfigMap kube-system/ebpfproxy: config.yaml: is not a mapping",
    )
    done = site.install(*ADDRESS, "--no-inherit")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert (
        '2 conflicts: conflicts with "somebody" using v1: .data.KUBERNETES_SERVICE_HOST, .data.config.yaml'
        in lines[-2]
    )


def test_missing_namespace_is_an_error(site: StandIn) -> None:
    done = site.install(*ADDRESS, "-n", "proxies")
    assert done.exit_code == 1
    assert 'ServiceAccount proxies/ebpfproxy: 404 Not Found: namespaces "proxies" not found' in done.stderr
    site.server.cluster.namespaces.add("proxies")
    assert site.install(*ADDRESS, "-n", "proxies", "--no-wait").exit_code == 0


def test_invalid_credentials_and_unreachable_server(site: StandIn, tmp_path: Path) -> None:
    authority = str(tmp_path / "ca.crt")
    path = kubeconfig(tmp_path / "bad.conf", site.url, {"token": "x"}, **{"certificate-authority": authority})
    site.kubeconfig = path
    done = site.install(*ADDRESS)
    assert (done.exit_code, done.stderr) == (1, "Error: /version: 401 Unauthorized: Unauthorized\n")
    site.kubeconfig = kubeconfig(tmp_path / "gone.conf", "https://127.0.0.1:1", {"token": "x"})
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: https://127.0.0.1:1: ")
    assert "Connection refused" in done.stderr
    assert done.stderr.count("\n") == 1
    assert " object at " not in done.stderr


def test_certificate_of_another_ca_is_a_one_line_error(site: StandIn, tmp_path: Path) -> None:
    site.kubeconfig = kubeconfig(tmp_path / "other.conf", site.url, {"token": TOKEN})
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert "certificate verify failed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_server_that_becomes_unreachable_ends_the_installation(site: StandIn) -> None:
    site.server.fail("close", resource="clusterroles", times=9)
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert done.stdout == "ServiceAccount kube-system/ebpfproxy created\n"
    assert len(done.stderr.splitlines()) == 2


def test_too_old_server_is_not_changed(site: StandIn) -> None:
    site.server.cluster.version = {"major": "1", "minor": "21+", "gitVersion": "v1.21.5-eks-1"}
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert "is Kubernetes 1.21: 1.22 is the oldest" in done.stderr
    assert changes(site) == []


@pytest.mark.parametrize(("minor", "annotated"), [("29", True), ("30", False)], ids=["before", "since"])
def test_server_version_determines_the_app_armor_setting(site: StandIn, minor: str, annotated: bool) -> None:
    site.server.cluster.version["minor"] = minor
    done = site.install(*ADDRESS, "--dry-run")
    assert ("container.apparmor.security.beta" in done.stdout) == annotated
    assert ("appArmorProfile" in done.stdout) != annotated


def test_invalid_configuration_changes_nothing(site: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{KUBE_PROXY}mode: fast\nclusterCidr: x\n")
    done = site.install(*ADDRESS, "--config", str(path))
    assert done.exit_code == 1
    assert f"{path}: clusterCidr: unknown field" in done.stderr
    assert f"{path}: mode: 'fast'" in done.stderr
    assert changes(site) == []
    for item in kube_proxy(f"{KUBE_PROXY}mode: fast\n"):
        site.create(item)
    done = site.install(*ADDRESS)
    assert done.exit_code == 1
    assert "ConfigMap kube-system/kube-proxy: config.conf: mode: 'fast'" in done.stderr
    assert changes(site) == []
    assert site.install(*ADDRESS, "--no-inherit").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--api-server", "cp.example"), "is not https://HOST:PORT"),
        (("--master", "cp.example"), "--master: 'cp.example' does not begin with http"),
        (("--context", "none"), "none"),
        (("--config", "/nonexistent.yaml"), "/nonexistent.yaml: No such file"),
    ],
)
def test_invalid_options_are_one_line_errors(site: StandIn, arguments: tuple[str, ...], message: str) -> None:
    done = site.install(*arguments)
    assert done.exit_code == 1
    assert message in done.stderr
    assert changes(site) == []


def test_missing_kubeconfig_is_a_one_line_error(site: StandIn) -> None:
    site.kubeconfig = Path("/nonexistent/config")
    done = site.install()
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: /nonexistent/config: no such kubeconfig, and this is no pod: name a --kubeconfig\n"
    )


def test_context_option_selects_one_of_several(site: StandIn, tmp_path: Path) -> None:
    document = yaml.safe_load(site.kubeconfig.read_text())
    document["clusters"].append({"name": "away", "cluster": {"server": "https://127.0.0.1:1"}})
    document["contexts"].append({"name": "away", "context": {"cluster": "away", "user": "u"}})
    document["current-context"] = "away"
    site.kubeconfig.write_text(yaml.safe_dump(document))
    assert site.install(*ADDRESS).exit_code == 1
    assert site.install(*ADDRESS, "--context", "x").exit_code == 0


# -- messages and other effects


def test_warnings_of_the_server_are_printed(site: StandIn) -> None:
    site.server.cluster.warnings["daemonsets"] = (
        'would violate PodSecurity \\"restricted:latest\\": host namespaces'
    )
    done = site.install(*ADDRESS)
    assert done.exit_code == 0
    assert (
        'warning: DaemonSet kube-system/ebpfproxy: would violate PodSecurity "restricted:latest": host namespaces'
        in done.stderr
    )


def test_cidrs_of_kubeadm_are_used_without_a_kube_proxy(site: StandIn) -> None:
    site.config_map(
        "kubeadm-config",
        ClusterConfiguration="networking:\n  podSubnet: 10.244.0.0/16\n  serviceSubnet: 10.96.0.0/12,fd01::/108\n",
    )
    done = site.install(*ADDRESS)
    assert "clusterCIDR: 10.244.0.0/16, from kubeadm's podSubnet" in done.stderr
    assert "serviceCIDRs: 10.96.0.0/12,fd01::/108, from kubeadm's serviceSubnet" in done.stderr
    again = site.install(*ADDRESS)
    assert "DaemonSet kube-system/ebpfproxy unchanged" in again.stdout
    assert "ConfigMap kube-system/ebpfproxy unchanged" in again.stdout


def test_changed_configuration_file_alone_causes_no_rollout(site: StandIn, tmp_path: Path) -> None:
    assert site.install(*ADDRESS).exit_code == 0
    path = tmp_path / "mine.yaml"
    path.write_text(f"{KUBE_PROXY}clusterCIDR: 10.1.0.0/16\n")
    done = site.install(*ADDRESS, "--config", str(path))
    assert "DaemonSet kube-system/ebpfproxy unchanged" in done.stdout
    assert "agents restart once the kubelet has updated" in done.stderr


@pytest.mark.parametrize(
    ("minor", "line", "message"),
    [
        ("36", "", "kube-proxy answers the kubelet's probes at port 10256"),
        ("27", "", "warning: kube-proxy before 1.28 answers the kubelet's probes at port 10256 with 404"),
        ("27", "healthzBindAddress: 0.0.0.0:20256\n", ""),
    ],
)
def test_message_names_whose_healthz_is_probed_while_both_run(
    site: StandIn, tmp_path: Path, minor: str, line: str, message: str
) -> None:
    for item in kube_proxy(KUBE_PROXY):
        site.create(item)
    site.server.cluster.version["minor"] = minor
    path = tmp_path / "mine.yaml"
    path.write_text(KUBE_PROXY + line)
    arguments = ("--config", str(path)) if line else ()
    done = site.install(*ADDRESS, *arguments)
    assert done.exit_code == 0, done.output
    assert (message in done.stderr) if message else ("probes" not in done.stderr)


def test_value_of_dry_run_is_optional_before_other_options(site: StandIn) -> None:
    assert site.install("--dry-run", *ADDRESS, "--no-inherit").exit_code == 0
    assert site.install("--dry-run", "all", *ADDRESS).exit_code == 2


def test_insecure_kubeconfig_is_not_warned_of_at_each_request(site: StandIn) -> None:
    path = site.kubeconfig.with_name("insecure.conf")
    kubeconfig(path, site.url, {"token": TOKEN}, **{"insecure-skip-tls-verify": True})
    command = [
        sys.executable,
        "-m",
        "ebpfproxy",
        "install",
        "--image",
        IMAGE,
        "--kubeconfig",
        str(path),
        *ADDRESS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Warning" not in done.stderr
    assert "ebpfproxy runs on 2 nodes" in done.stdout


def test_kube_proxy_without_a_configuration_file_is_reported(site: StandIn) -> None:
    _, item = kube_proxy()
    item["spec"]["template"]["spec"]["containers"][0]["command"] = ["kube-proxy", "--cluster-cidr=10.0.0.0/8"]
    site.create(item)
    done = site.install(*ADDRESS)
    assert done.exit_code == 0
    assert "warning: kube-proxy's DaemonSet has no --config from a ConfigMap" in done.stderr


def test_dry_run_with_address_and_without_inheritance_needs_no_server(site: StandIn) -> None:
    done = site.install(*ADDRESS, "--no-inherit", "--dry-run")
    assert done.exit_code == 0
    assert site.server.requests == [] or changes(site) == []
    assert done.stderr == ""
    names = [each["metadata"]["name"] for each in yaml.safe_load_all(done.stdout)]
    assert names == ["ebpfproxy"] * 5
    site.server.stop()
    assert site.install(*ADDRESS, "--no-inherit", "--dry-run").stdout == done.stdout


# -- waiting


def test_timeout_of_a_rollout_names_node_and_reason(site: StandIn) -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}}
    ended = {
        "terminated": {"exitCode": 1, "message": "loading\nError: Linux 5.4 is too old\n", "reason": "Error"}
    }
    site.controller.status["ebpfproxy", "node-b"] = {
        "phase": "Pending",
        "initContainerStatuses": [
            {
                "name": "load",
                "image": IMAGE,
                "imageID": "",
                "ready": False,
                "restartCount": 4,
                "state": waiting,
                "lastState": ended,
            }
        ],
    }
    done = site.install(*ADDRESS, "--timeout", "1s")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-2:] == [
        "Error: DaemonSet kube-system/ebpfproxy: nothing more became ready in 1 s",
        "  node node-b: container load: CrashLoopBackOff, ended with 1: Error: Linux 5.4 is too old",
    ]
    site.controller.status.clear()
    assert site.install(*ADDRESS).exit_code == 0


def test_pods_that_cannot_be_created_are_explained_by_the_last_event(site: StandIn) -> None:
    site.controller.stop()
    for name, time, text in (
        ("a", "2026-11-21T10:00:00Z", "old"),
        ("b", "2026-11-21T10:01:00Z", 'pods "ebpfproxy-" is\nforbidden'),
    ):
        site.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": SYSTEM},
                "involvedObject": {"kind": "DaemonSet", "name": "ebpfproxy"},
                "type": "Warning",
                "reason": "FailedCreate",
                "message": text,
                "lastTimestamp": time,
            }
        )
    done = site.install(*ADDRESS, "--timeout", "0.2s")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == '  FailedCreate: pods "ebpfproxy-" is forbidden'


def test_short_outage_of_the_server_does_not_end_the_wait(site: StandIn) -> None:
    site.controller.status["ebpfproxy", "node-b"] = {"phase": "Pending"}

    def later() -> None:
        site.server.fail("503", resource="daemonsets", times=5)
        site.controller.status.pop(("ebpfproxy", "node-b"))

    timer = threading.Timer(0.5, later)
    timer.start()
    done = site.install(*ADDRESS, "--timeout", "3s")
    timer.join()
    assert done.exit_code == 0, done.output


def test_install_without_waiting_returns_at_once(site: StandIn) -> None:
    site.controller.down |= site.controller.nodes
    done = site.install(*ADDRESS, "--no-wait")
    assert done.exit_code == 0
    assert "runs on" not in done.stdout


# -- with kubectl


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kubectl_applies_printed_manifests_and_install_takes_them_over(site: StandIn) -> None:
    printed = site.install(*ADDRESS, "--dry-run").stdout
    kubectl = ["kubectl", "--kubeconfig", str(site.kubeconfig), "--cache-dir", str(site.kubeconfig.parent)]
    dry = [*kubectl, "create", "--dry-run=client", "--validate=false", "-f", "-"]
    done = subprocess.run(dry, input=printed, capture_output=True, text=True, check=False)
    assert done.stdout.count("created (dry run)") == 5, done.stderr
    apply = [*kubectl, "apply", "--server-side", "--validate=false", "-f", "-"]
    done = subprocess.run(apply, input=printed, capture_output=True, text=True, check=False)
    assert done.stdout.count("serverside-applied") == 5, done.stderr
    same = site.install(*ADDRESS)
    assert same.exit_code == 0, same.output
    assert same.stdout.count("unchanged") == 5, "equal values do not conflict"
    other = site.cli("install", "--image", "other:1", *ADDRESS)
    assert other.exit_code == 1
    assert 'conflict with "kubectl"' in other.stderr or 'conflicts with "kubectl"' in other.stderr
    get = [*kubectl, "get", "daemonset", "-n", SYSTEM, "ebpfproxy", "-o", "json", "--show-managed-fields"]
    found = json.loads(subprocess.run(get, capture_output=True, text=True, check=True).stdout)
    managers = {(each["manager"], each["operation"]) for each in found["metadata"]["managedFields"]}
    assert {("kubectl", "Apply"), ("ebpfproxy", "Apply")} <= managers
