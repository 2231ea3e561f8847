"""Rendered manifests: the base, and differences between clusters."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess

import pytest
import yaml

from ebpfproxy.operator.api import Object
from ebpfproxy.operator.install import base, configuration, node_cleanup
from ebpfproxy.operator.install.cluster_facts import Version
from ebpfproxy.operator.install.configuration import Rendered
from ebpfproxy.operator.install.render import Settings, base_configuration, render, to_yaml
from ebpfproxy.operator.install.server_address import Address
from ebpfproxy.operator.kube_proxy_objects import config_map_of
from tests.deploy import objects
from tests.deploy.objects import Objects, container, pod_spec
from tests.deploy.test_manifests import MODELS, unknown
from tests.operator.install.site import IMAGE, kube_proxy

CONFIGURATION = configuration.of_base(base_configuration())


def made(
    *,
    namespace: str = "kube-system",
    configuration: Rendered = CONFIGURATION,
    pull_secrets: tuple[str, ...] = (),
    address: Address | None = None,
    version: Version | None = None,
) -> Objects:
    return objects.by_name(
        render(
            Settings(
                image=IMAGE,
                namespace=namespace,
                configuration=configuration,
                pull_secrets=pull_secrets,
                address=address,
                version=version,
            )
        )
    )


EVERYTHING = made(
    namespace="proxies",
    configuration=Rendered("x", ("127.0.0.1", 1), ("", 2)),
    pull_secrets=("a", "b"),
    address=Address("fd00::1", 6443),
    version=Version(1, 29),
)


def test_default_rendering_is_the_base_except_the_image() -> None:
    expected = copy.deepcopy(objects.base())
    spec = pod_spec(expected)
    for each in spec["initContainers"] + spec["containers"]:
        each["image"] = IMAGE
    assert made() == expected
    assert list(made()) == list(objects.base()), "the order is that of the kustomization"


def test_renderings_are_independent() -> None:
    first = made()
    pod_spec(first)["containers"].clear()
    assert pod_spec(made())["containers"]


@pytest.mark.parametrize("found", [made(), EVERYTHING], ids=["base", "everything"])
def test_every_field_is_known_to_the_api(found: Objects) -> None:
    for (kind, name), each in found.items():
        assert list(unknown(each, MODELS[kind], f"{kind} {name}")) == []


def test_namespace_is_set_in_all_objects() -> None:
    for (kind, _), each in EVERYTHING.items():
        assert each["metadata"].get("namespace") == (None if kind.startswith("ClusterRole") else "proxies")
    assert EVERYTHING["ClusterRoleBinding", "ebpfproxy"]["subjects"][0]["namespace"] == "proxies"


def test_changed_address_changes_the_pod_template() -> None:
    data = EVERYTHING["ConfigMap", "ebpfproxy"]["data"]
    assert (data["KUBERNETES_SERVICE_HOST"], data["KUBERNETES_SERVICE_PORT"]) == ("fd00::1", "6443")
    template = EVERYTHING["DaemonSet", "ebpfproxy"]["spec"]["template"]
    assert template["metadata"]["annotations"]["ebpfproxy.io/control-plane"] == "[fd00::1]:6443"
    assert set(made()["ConfigMap", "ebpfproxy"]["data"]) == {"config.yaml"}


def test_image_pull_secrets() -> None:
    assert pod_spec(EVERYTHING)["imagePullSecrets"] == [{"name": "a"}, {"name": "b"}]


def test_probes_and_ports_follow_the_configuration() -> None:
    agent = container(EVERYTHING, "ebpfproxy")
    assert {each["name"]: each["containerPort"] for each in agent["ports"]} == {"healthz": 1, "metrics": 2}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert agent[probe]["httpGet"] == {"path": "/livez", "port": "healthz", "host": "127.0.0.1"}
        assert "host" not in container(made(), "ebpfproxy")[probe]["httpGet"]


@pytest.mark.parametrize("version", [Version(1, 29), Version(1, 30), Version(1, 36), None])
def test_app_armor_is_an_annotation_before_1_30(version: Version | None) -> None:
    """An apply with a field that the server's schema lacks is rejected."""
    found = made(version=version)
    old = version is not None and version < Version(1, 30)
    annotations = found["DaemonSet", "ebpfproxy"]["spec"]["template"]["metadata"].get("annotations", {})
    name = "container.apparmor.security.beta.kubernetes.io/prepare"
    assert annotations == ({name: "unconfined"} if old else {})
    assert ("appArmorProfile" in container(found, "prepare")["securityContext"]) != old


def test_printed_yaml_round_trips_and_strings_are_readable() -> None:
    text = to_yaml(EVERYTHING.values())
    assert objects.by_name(yaml.safe_load_all(text)) == EVERYTHING
    assert "&id" not in text
    assert "  config.yaml: |\n    apiVersion:" in to_yaml(made().values())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_kubectl_decodes_the_daemon_set() -> None:
    """Without a cluster it decodes into its own types."""
    for item in (made()["DaemonSet", "ebpfproxy"], EVERYTHING["DaemonSet", "ebpfproxy"], cleanup()):
        name = item["spec"]["template"]["spec"]["containers"][0]["name"]
        done = subprocess.run(
            ["kubectl", "set", "image", "--local", "-f", "-", f"{name}=other:1", "-o", "json"],
            input=to_yaml([item]),
            capture_output=True,
            text=True,
            check=True,
        )
        read = json.loads(done.stdout)
        assert read["spec"]["template"]["spec"]["containers"][0]["image"] == "other:1"
        for each in read["spec"]["template"]["spec"]["containers"]:
            each["image"] = IMAGE
        assert dropped(item, read) == []


def dropped(item: object, read: object, path: str = "") -> list[str]:
    """Returns fields that kubectl's types lack."""
    if isinstance(item, dict) and isinstance(read, dict):
        return [
            found
            for key, each in item.items()
            for found in ([f"{path}.{key}"] if key not in read else dropped(each, read[key], f"{path}.{key}"))
        ]
    if isinstance(item, list) and isinstance(read, list):
        return [
            found
            for i, (one, other) in enumerate(zip(item, read, strict=True))
            for found in dropped(one, other, f"{path}[{i}]")
        ]
    return [] if item == read else [path]


# -- the DaemonSet that cleans nodes


def cleanup() -> Object:
    return node_cleanup.cleanup(EVERYTHING["DaemonSet", "ebpfproxy"], IMAGE)


def test_cleanup_pods_have_the_agents_permissions_and_no_more() -> None:
    item = cleanup()
    assert list(unknown(item, "V1DaemonSet", "x")) == []
    spec, agent = item["spec"]["template"]["spec"], container(EVERYTHING, "ebpfproxy")
    (cleaning,), (waiting,) = spec["initContainers"], spec["containers"]
    assert cleaning["command"] == ["ebpfproxy", "cleanup"]
    assert cleaning["securityContext"] == agent["securityContext"]
    assert cleaning["volumeMounts"] == [{"name": "bpffs", "mountPath": "/host/bpf"}]
    assert cleaning["env"] == [{"name": "EBPFPROXY_BPF_ROOT", "value": "/host/bpf"}]
    assert waiting["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert waiting["securityContext"]["runAsUser"]
    assert spec["automountServiceAccountToken"] is False
    for name in ("hostNetwork", "tolerations", "nodeSelector", "imagePullSecrets", "securityContext"):
        assert spec[name] == pod_spec(EVERYTHING)[name]
    assert [each["name"] for each in spec["volumes"]] == ["bpffs"]
    selected = item["spec"]["selector"]["matchLabels"]
    assert selected == item["spec"]["template"]["metadata"]["labels"] != {"k8s-app": "ebpfproxy"}


# -- sources


def test_manifests_are_those_of_deploy_base() -> None:
    assert objects.by_name(base.objects()) == objects.base()


def test_config_map_of_kube_proxy_is_the_mounted_one() -> None:
    _, item = kube_proxy()
    assert config_map_of(item) == ("kube-proxy", "config.conf")
    pod = item["spec"]["template"]["spec"]
    pod["volumes"][0]["configMap"] = {"name": "other", "items": [{"key": "k", "path": "config.conf"}]}
    assert config_map_of(item) == ("other", "k")
    mount = pod["containers"][0]["volumeMounts"][0]
    mount |= {"mountPath": "/var/lib/kube-proxy/config.conf", "subPath": "config.conf"}
    assert config_map_of(item) == ("other", "k")
    pod["containers"][0]["command"] = ["sh", "-c", "kube-proxy --config /var/lib/kube-proxy/config.conf"]
    assert config_map_of(item) == ("other", "k")
    pod["volumes"][0] = {"name": "kube-proxy", "hostPath": {"path": "/x"}}
    assert config_map_of(item) is None
    pod["containers"][0]["command"] = ["kube-proxy", "--cluster-cidr=10.0.0.0/8"]
    assert config_map_of(item) is None
