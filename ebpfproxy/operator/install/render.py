"""The objects for one cluster: those of ``deploy/base``, with what differs between clusters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import yaml

from ebpfproxy.operator.api import RESOURCES, Object
from ebpfproxy.operator.install import base
from ebpfproxy.operator.install.cluster_facts import Version
from ebpfproxy.operator.install.configuration import Rendered
from ebpfproxy.operator.install.server_address import Address
from ebpfproxy.operator.names import AGENT

#: Of the pods: a new address is a new template, and so a rolling update. A container reads it as it starts.
CONTROL_PLANE = "ebpfproxy.io/control-plane"
#: Of the ConfigMap.
CONFIG = "config.yaml"
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
#: Before, it was an annotation (KEP-24).
_APP_ARMOR_FIELD = Version(1, 30)
_APP_ARMOR = "container.apparmor.security.beta.kubernetes.io"
_ANYWHERE = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``version`` None: not known, then a server of today is meant."""

    image: str
    namespace: str
    configuration: Rendered
    pull_secrets: tuple[str, ...] = ()
    address: Address | None = None
    version: Version | None = None


def base_configuration() -> str:
    """The file that the base's ConfigMap has."""
    (found,) = (each["data"][CONFIG] for each in base.objects() if each["kind"] == "ConfigMap")
    return str(found)


def render(settings: Settings) -> list[Object]:
    """In the order in which they are applied."""
    made = base.objects()
    for each in made:
        kind = each["kind"]
        if RESOURCES[kind][2]:
            each["metadata"]["namespace"] = settings.namespace
        for subject in each.get("subjects", ()):
            subject["namespace"] = settings.namespace
        if kind == "ConfigMap":
            each["data"] = {CONFIG: settings.configuration.text, **_control_plane(settings.address)}
        elif kind == "DaemonSet":
            _daemon_set(each["spec"]["template"], settings)
    return made


def _control_plane(address: Address | None) -> dict[str, str]:
    if address is None:
        return {}
    return {HOST: address.host, PORT: str(address.port)}


def _daemon_set(template: Object, settings: Settings) -> None:
    spec = template["spec"]
    annotations: dict[str, str] = {}
    if settings.address is not None:
        annotations[CONTROL_PLANE] = str(settings.address)
    if settings.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    for container in containers(spec):
        container["image"] = settings.image
        if settings.version is not None and settings.version < _APP_ARMOR_FIELD:
            profile = container["securityContext"].pop("appArmorProfile", None)
            if profile is not None:
                annotations[f"{_APP_ARMOR}/{container['name']}"] = profile["type"].lower()
    if annotations:
        template["metadata"]["annotations"] = annotations
    (agent,) = (each for each in spec["containers"] if each["name"] == AGENT)
    places = {"healthz": settings.configuration.health, "metrics": settings.configuration.metrics}
    for port in agent["ports"]:
        port["containerPort"] = places[port["name"]][1]
    host = settings.configuration.health[0]
    if host != _ANYWHERE:
        # The kubelet asks at the node's address otherwise.
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            agent[probe]["httpGet"] = {**agent[probe]["httpGet"], "host": host}


class _Dumper(yaml.SafeDumper):
    """A text of several lines stays one: a configuration file is to be read."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(objects: Iterable[Object]) -> str:
    """What ``kubectl apply -f -`` takes."""
    return "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=1 << 16) for each in objects)


def containers(spec: Object) -> Iterator[Object]:
    """Of a pod, in the order in which they start."""
    yield from spec.get("initContainers") or ()
    yield from spec["containers"]
