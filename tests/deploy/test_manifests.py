"""Base and chart render equal objects, which are valid and grant no more than necessary."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy import yaml_text
from ebpfproxy.config import load
from ebpfproxy.operator.install import configuration
from ebpfproxy.operator.install import render as install_render
from ebpfproxy.operator.install.render import Settings
from tests.deploy import objects
from tests.deploy.chart import TemplateError, chart_values, render, render_chart
from tests.deploy.objects import DEPLOY, Object, Objects, base, container, pod_spec

MODELS = {
    "ServiceAccount": "V1ServiceAccount",
    "ClusterRole": "V1ClusterRole",
    "ClusterRoleBinding": "V1ClusterRoleBinding",
    "ConfigMap": "V1ConfigMap",
    "DaemonSet": "V1DaemonSet",
}

#: The names of the files in deploy/seccomp and deploy/apparmor.
PROFILES = {"seccomp": "ebpfproxy.json", "appArmor": "ebpfproxy"}


def comparable(found: Objects) -> Objects:
    """Returns it with the configuration file parsed: the base has comments in it."""
    made = copy.deepcopy(found)
    data = made["ConfigMap", "ebpfproxy"]["data"]
    data["config.yaml"] = yaml_text.load_all(data["config.yaml"])
    return made


# -- rendering


def test_chart_renders_the_objects_of_the_base() -> None:
    assert comparable(render_chart()) == comparable(base())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (kustomize)")
def test_kustomize_renders_the_objects_that_the_tests_read() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(objects.BASE)], capture_output=True, text=True, check=True
    )
    assert objects.by_name(yaml_text.load_all(done.stdout)) == base()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl (kustomize)")
def test_documented_overlay_moves_ports_and_probes_as_install_does(tmp_path: Path) -> None:
    """The patch in docs/install.md for other bind addresses makes what ``ebpfproxy install`` makes."""
    blocks = re.findall(r"```yaml\n(.*?)```", (DEPLOY.parent / "docs/install.md").read_text(), re.DOTALL)
    (patches,) = (each for each in blocks if "httpGet/host" in each)
    # kustomize takes folders by relative paths only.
    resources = {"resources": [os.path.relpath(objects.BASE, tmp_path)]}
    (tmp_path / "kustomization.yaml").write_text(json.dumps({**resources, **yaml_text.load(patches)}))
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=True)
    found = container(objects.by_name(yaml_text.load_all(done.stdout)), "ebpfproxy")
    text = (
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "healthzBindAddress: 10.0.0.5:10300\nmetricsBindAddress: 0.0.0.0:10301\n"
    )
    rendered = configuration.of_base(text)
    settings = Settings(image="ebpfproxy:0.1.0", namespace="kube-system", configuration=rendered)
    assert found == container(objects.by_name(install_render.render(settings)), "ebpfproxy")


#: A bind address, and the host and the port at which the kubelet asks: no host is the node's address.
BIND_ADDRESSES = [
    ("10.0.0.5:10300", "10.0.0.5", 10300),
    ("[fd00::5]:10300", "fd00::5", 10300),
    ("[2001:db8::5]:10300", "2001:db8::5", 10300),
    ("0.0.0.0:10300", None, 10300),
    ("[::]:10300", None, 10300),
    ("10.0.0.10", "10.0.0.10", 10256),
    ("2001:db8::10", "2001:db8::10", 10256),
    ("::", None, 10256),
]


def _bound_at(address: str) -> Object:
    return {"config": {"kubeProxy": {"healthzBindAddress": address, "metricsBindAddress": address}}}


@pytest.mark.skipif(shutil.which("helm") is None, reason="no helm")
@pytest.mark.parametrize("values", [{}, *(_bound_at(address) for address, _, _ in BIND_ADDRESSES)], ids=str)
def test_helm_renders_the_same_as_the_tests_template_reader(values: Object, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(json.dumps(values))
    command = ["helm", "template", "ebpfproxy", str(DEPLOY / "chart"), "--namespace", "kube-system"]
    done = subprocess.run([*command, "--values", str(file)], capture_output=True, text=True, check=True)
    made = objects.by_name(filter(None, yaml_text.load_all(done.stdout)))
    assert comparable(made) == comparable(render_chart(values))


SPRIG = Path("/usr/share/gocode/src/github.com/Masterminds/sprig")


@pytest.mark.skipif(
    shutil.which("go") is None or not SPRIG.is_dir(),
    reason="no golang-go, golang-github-masterminds-sprig-dev, golang-github-ghodss-yaml-dev",
)
def test_go_templates_render_the_same_as_the_tests_template_reader(tmp_path: Path) -> None:
    """Uses Helm's engine without helm."""
    program = tmp_path / "render"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "GO111MODULE": "off",
        "GOPATH": "/usr/share/gocode",
    }
    source = Path(__file__).with_name("render.go")
    subprocess.run(["go", "build", "-o", str(program), str(source)], env=environment, check=True)
    renderings: list[tuple[Object, str]] = [
        ({}, "kube-system"),
        ({"kubeconfig": "/etc/kubernetes/proxy.conf"}, "kube-system"),
        ({"master": {"host": "cp.example"}}, "kube-system"),
        ({"monitoring": {"enabled": True}}, "proxies"),
        ({"localhostProfiles": PROFILES}, "kube-system"),
        *((_bound_at(address), "kube-system") for address, _, _ in BIND_ADDRESSES),
    ]
    for values, namespace in renderings:
        done = subprocess.run(
            [str(program), str(DEPLOY / "chart")],
            input=json.dumps(chart_values(values, namespace)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        made = objects.by_name(filter(None, yaml_text.load_all(done.stdout)))
        assert made == render_chart(values, namespace)


RENDERINGS: list[tuple[str, Callable[[], Objects]]] = [
    ("base", base),
    ("chart", render_chart),
    ("kubeconfig", lambda: render_chart({"kubeconfig": "/etc/kubernetes/proxy.conf"})),
    ("master", lambda: render_chart({"master": {"host": "cp.example"}})),
    ("profiles", lambda: render_chart({"localhostProfiles": PROFILES})),
    ("other namespace", lambda: render_chart(namespace="proxies")),
]


@pytest.mark.parametrize("made", [each for _, each in RENDERINGS], ids=[name for name, _ in RENDERINGS])
def test_every_field_is_known_to_the_api(made: Callable[[], Objects]) -> None:
    problems = [
        problem
        for (kind, name), each in made().items()
        for problem in unknown(each, MODELS[kind], f"{kind} {name}")
    ]
    assert problems == []


def unknown(value: Any, kind: str, path: str) -> Iterator[str]:
    """Returns fields and types of values that the kubernetes package's models lack."""
    # list[V1Volume] and dict(str, str); newer releases say List[V1Volume] and Dict[str, str].
    of_many = re.fullmatch(r"(list|dict)[\[(](?:str, )?(.+)[\])]", kind, re.IGNORECASE)
    if of_many is not None:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unknown(each, of_many[2], f"{path}[{key}]")
        return
    from kubernetes import client  # noqa: PLC0415 - it takes 0.2 s, in each worker that collects tests

    model = getattr(client, kind, None)
    if model is None:
        types: dict[str, tuple[type, ...]]
        types = {"str": (str,), "bool": (bool,), "int": (int,), "object": (int, str)}
        wanted = types[kind]
        if not isinstance(value, wanted):
            yield f"{path}: {value!r} is no {kind}"
        return
    fields = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
    for key, each in value.items():
        if key in fields:
            yield from unknown(each, fields[key], f"{path}.{key}")
        else:
            yield f"{path}.{key} is unknown"


@pytest.mark.parametrize("made", [each for _, each in RENDERINGS], ids=[name for name, _ in RENDERINGS])
def test_volumes_selectors_and_names_are_consistent(made: Callable[[], Objects]) -> None:
    found = made()
    spec = pod_spec(found)
    volumes = [each["name"] for each in spec["volumes"]]
    containers = spec["initContainers"] + spec["containers"]
    assert len(set(volumes)) == len(volumes)
    assert {mount["name"] for each in containers for mount in each["volumeMounts"]} == set(volumes)
    daemon_set = found["DaemonSet", "ebpfproxy"]["spec"]
    assert daemon_set["selector"]["matchLabels"] == daemon_set["template"]["metadata"]["labels"]
    binding = found["ClusterRoleBinding", "ebpfproxy"]
    assert ("ClusterRole", binding["roleRef"]["name"]) in found
    for subject in binding["subjects"]:
        account = found["ServiceAccount", subject["name"]]
        assert account["metadata"]["namespace"] == subject["namespace"]
        assert spec["serviceAccountName"] == subject["name"]
    assert ("ConfigMap", "ebpfproxy") in found
    assert len({each["image"] for each in containers}) == 1


# -- content


def test_rules_of_the_cluster_role() -> None:
    granted = {
        (group, resource, verb)
        for rule in base()["ClusterRole", "ebpfproxy"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == {
        ("", "services", "list"),
        ("", "services", "watch"),
        ("discovery.k8s.io", "endpointslices", "list"),
        ("discovery.k8s.io", "endpointslices", "watch"),
        ("networking.k8s.io", "servicecidrs", "list"),
        ("networking.k8s.io", "servicecidrs", "watch"),
        ("", "nodes", "list"),
        ("", "nodes", "watch"),
        ("events.k8s.io", "events", "create"),
    }
    assert {kind for kind, _ in base()} == set(MODELS)


def test_configuration_is_valid_and_has_only_fields_with_an_effect(tmp_path: Path) -> None:
    found = load.parse(base()["ConfigMap", "ebpfproxy"]["data"]["config.yaml"], "config.yaml")
    assert load.ignored_fields(load.effective(found)) == []


def test_no_container_is_privileged_and_each_is_restricted() -> None:
    spec = pod_spec(base())
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec.get("hostPID")
    assert not spec.get("hostIPC")
    for each in spec["initContainers"] + spec["containers"]:
        security = each["securityContext"]
        assert "privileged" not in security
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]
        # The API accepts it in privileged containers only.
        assert all(mount.get("mountPropagation") != "Bidirectional" for mount in each["volumeMounts"])
    assert container(base(), "ebpfproxy")["securityContext"] == container(base(), "load")["securityContext"]


def test_daemon_set_runs_on_every_node_and_updates_one_at_a_time() -> None:
    spec = pod_spec(base())
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "system-node-critical"
    assert spec["hostNetwork"]
    update = base()["DaemonSet", "ebpfproxy"]["spec"]["updateStrategy"]
    assert update == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


# -- the chart's values


def daemon_set(values: Object) -> Object:
    return pod_spec(render_chart(values))


def test_kubeconfig_replaces_the_service_account_token() -> None:
    assert daemon_set({})["automountServiceAccountToken"] is True
    found = render_chart({"kubeconfig": "/etc/kubernetes/proxy.conf"})
    assert pod_spec(found)["automountServiceAccountToken"] is False
    assert found["ServiceAccount", "ebpfproxy"]["automountServiceAccountToken"] is False
    for name in ("load", "ebpfproxy"):
        spec = container(found, name)
        (argument,) = (each for each in spec["args"] if each.startswith("--kubeconfig="))
        assert {"name": "kubeconfig", "mountPath": argument.partition("=")[2], "readOnly": True} in spec[
            "volumeMounts"
        ]
    volume = {"name": "kubeconfig", "hostPath": {"path": "/etc/kubernetes/proxy.conf", "type": "File"}}
    assert volume in pod_spec(found)["volumes"]


def test_address_of_the_control_plane_is_set_in_the_pod() -> None:
    found = render_chart({"master": {"host": "cp.example", "port": 8443}})
    data = found["ConfigMap", "ebpfproxy"]["data"]
    for each in container(found, "ebpfproxy")["env"]:
        if each["name"].startswith("KUBERNETES_SERVICE"):
            assert each["valueFrom"]["configMapKeyRef"]["key"] in data
    assert (data["KUBERNETES_SERVICE_HOST"], data["KUBERNETES_SERVICE_PORT"]) == ("cp.example", "8443")


def test_changed_control_plane_address_changes_the_pod_template() -> None:
    """Containers read the address as they start, so that a changed ``master`` has to cause a rolling update."""
    first, second = (
        render_chart({"master": {"host": host, "port": port}})["DaemonSet", "ebpfproxy"]["spec"]["template"]
        for host, port in (("cp.example", 8443), ("cp.example", 6443))
    )
    assert first["metadata"].pop("annotations") != second["metadata"].pop("annotations")
    assert first == second


def test_configuration_is_merged_into_the_defaults() -> None:
    values = {"config": {"kubeProxy": {"clusterCIDR": "10.244.0.0/16"}, "own": {"lbAlgorithm": "maglev"}}}
    text = render_chart(values)["ConfigMap", "ebpfproxy"]["data"]["config.yaml"]
    found = load.parse(text, "config.yaml")
    assert found.kube_proxy.cluster_cidr == "10.244.0.0/16"
    assert found.kube_proxy.oom_score_adj == -997
    assert found.own.lb_algorithm == "maglev"


def test_image_resources_and_tolerations_of_the_values_are_used() -> None:
    found = daemon_set(
        {
            "image": {"repository": "registry.example/ebpfproxy", "tag": "1.2.3", "pullPolicy": "Always"},
            "resources": {"agent": {"requests": {"memory": "1Gi"}, "limits": {"memory": "2Gi"}}},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "maxUnavailable": "10%",
        }
    )
    for each in found["initContainers"] + found["containers"]:
        assert each["image"] == "registry.example/ebpfproxy:1.2.3"
        assert each["imagePullPolicy"] == "Always"
    agent = found["containers"][0]
    assert agent["resources"] == {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}
    assert found["tolerations"] == [{"key": "a", "operator": "Exists"}]


def test_further_variables_and_volumes_are_the_agents() -> None:
    """The init container reads the same configuration."""
    variable = {"name": "OTEL_EXPORTER_OTLP_CERTIFICATE", "value": "/etc/otlp/ca.crt"}
    mount = {"name": "otlp", "mountPath": "/etc/otlp", "readOnly": True}
    volume = {"name": "otlp", "configMap": {"name": "otlp-ca"}}
    found = daemon_set({"extraEnv": [variable], "extraVolumeMounts": [mount], "extraVolumes": [volume]})
    prepare, load = found["initContainers"]
    for each in (load, *found["containers"]):
        assert each["env"][-1] == variable
        assert each["volumeMounts"][-1] == mount
    assert mount not in prepare["volumeMounts"]
    assert found["volumes"][-1] == volume


@pytest.mark.parametrize(("address", "host", "port"), BIND_ADDRESSES)
def test_probes_and_ports_follow_the_addresses_of_the_configuration(
    address: str, host: str | None, port: int
) -> None:
    agent = container(render_chart(_bound_at(address)), "ebpfproxy")
    assert [(each["name"], each["containerPort"]) for each in agent["ports"]] == [
        ("healthz", port),
        ("metrics", port if port != 10256 else 10249),
    ]
    overlapping = container(render_chart({**_bound_at(address), "overlap": True}), "ebpfproxy")
    for each in ("startupProbe", "livenessProbe", "readinessProbe"):
        place = {"path": "/livez", **({"host": host} if host else {})}
        assert agent[each]["httpGet"] == {**place, "port": "healthz"}
        assert overlapping[each]["httpGet"] == {**place, "port": port}


def test_monitoring_adds_the_pod_monitor_of_deploy_monitoring() -> None:
    found = render_chart({"monitoring": {"enabled": True}})
    wanted = yaml_text.load((DEPLOY / "monitoring/podmonitor.yaml").read_text())
    assert found["PodMonitor", "ebpfproxy"] == wanted
    agent = container(found, "ebpfproxy")
    (endpoint,) = wanted["spec"]["podMetricsEndpoints"]
    (port,) = (each["containerPort"] for each in agent["ports"] if each["name"] == endpoint["port"])
    assert f"--metrics-bind-address=0.0.0.0:{port}" in agent["args"]
    assert ("PodMonitor", "ebpfproxy") not in render_chart()


def test_agents_that_overlap_stand_by_and_declare_no_ports() -> None:
    """The scheduler would let only one pod of a node have a port, and one of the two numbers must be 0."""
    found = render_chart({"overlap": True})
    update = found["DaemonSet", "ebpfproxy"]["spec"]["updateStrategy"]
    assert update == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    for name in ("load", "ebpfproxy"):
        assert "--standby" in container(found, name)["args"]
        assert "--standby" not in container(render_chart(), name)["args"]
    agent = container(found, "ebpfproxy")
    assert "ports" not in agent
    for each in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert agent[each]["httpGet"] == {"path": "/livez", "port": 10256}


def test_profiles_of_nodes_are_those_of_the_containers_that_have_the_agents_capabilities() -> None:
    found = render_chart({"localhostProfiles": PROFILES})
    for name in ("load", "ebpfproxy"):
        security = container(found, name)["securityContext"]
        assert security["seccompProfile"] == {"type": "Localhost", "localhostProfile": "ebpfproxy.json"}
        assert security["appArmorProfile"] == {"type": "Localhost", "localhostProfile": "ebpfproxy"}
    assert container(found, "prepare") == container(base(), "prepare")
    for kind, profile in PROFILES.items():
        assert (DEPLOY / kind.lower() / profile).is_file()


# -- the template reader


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("a {{ .x }} b", "a 1 b"),
        ("a \n {{- .x }} b", "a1 b"),
        ("a {{ .x -}} \n b", "a 1b"),
        ("a {{- /* no */ -}} b", "ab"),
        ('{{ .none | default "d" | quote }}', '"d"'),
        ("{{ if .none }}a{{ else }}b{{ end }}", "b"),
        ("{{ with .m }}{{ .k }}{{ $.x }}{{ end }}", "v1"),
        ("m:\n  {{- toYaml .m | nindent 2 }}\n", "m:\n  k: v\n"),
        ("{{ not .none }}", "true"),
        ('{{ index .m "k" }}{{ index .m "l" | default "none" }}', "vnone"),
        ('{{ .a | trimPrefix "[" | regexFind "^[^]]+" }}', "fd00::1"),
        ('{{ .a | regexFind "x+" | default "none" }}', "none"),
        ('{{ with .a | trimAll "[]:01" }}{{ . }}{{ end }}', "fd"),
        ('{{ include "ebpfproxy.healthzPort" . }}', "10256"),
    ],
)
def test_templates_are_rendered_as_by_helm(text: str, rendered: str) -> None:
    values: Object = {"config": {"kubeProxy": {}}}
    top = {"x": 1, "none": "", "m": {"k": "v"}, "a": "[fd00::1]:10", "Values": values}
    assert render(text, top) == rendered


@pytest.mark.parametrize(
    "text",
    [
        "{{ .y }}",
        "{{ range .m }}{{ end }}",
        '{{ include "x" . }}',
        '{{ define "x" }}{{ end }}',
        '{{ index .x "k" }}',
        "{{ .m }}",
        "{{ if .x }}",
        "{{ end }}",
        "{{ else }}",
        "{{ .x | upper }}",
        "{{ .x",
        "{{ $v := .x }}",
        "{{ .x | default (.m) }}",
        "{{ if .none }}a{{ else if .x }}b{{ end }}",
        "{{}}",
    ],
)
def test_unknown_template_syntax_is_an_error(text: str) -> None:
    with pytest.raises(TemplateError):
        render(text, {"x": 1, "none": "", "m": {"k": "v"}})


def test_field_unknown_to_the_api_is_reported() -> None:
    found = copy.deepcopy(base()["DaemonSet", "ebpfproxy"])
    spec = found["spec"]["template"]["spec"]
    spec["initContainers"][0]["securityContext"]["capabilites"] = {}
    spec["volumes"][0]["hostPath"] = {"path": 1}
    assert len(list(unknown(found, "V1DaemonSet", "x"))) == 2
