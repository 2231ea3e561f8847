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
from ebpfproxy.operator.names import AGENT, CONTROL_PLANE

#: The ConfigMap's key of the configuration file.
CONFIG = "config.yaml"
HOST, PORT = "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT"
#: Before this version the profile is an annotation (KEP-24).
_APP_ARMOR_FIELD = Version(1, 30)
_APP_ARMOR = "container.apparmor.security.beta.kubernetes.io"
_ANYWHERE = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """``version`` None is taken for a current server."""

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
    """Returns the objects in the order in which they are applied."""
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
        # A new address starts a rolling update: containers read it as they start.
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
        # Without a host, the kubelet asks at the node's address.
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            agent[probe]["httpGet"] = {**agent[probe]["httpGet"], "host": host}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, so that a configuration file can be read."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(objects: Iterable[Object]) -> str:
    """Returns what ``kubectl apply -f -`` takes."""
    return "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=1 << 16) for each in objects)


def containers(spec: Object) -> Iterator[Object]:
    """Yields a pod's containers in the order in which they start."""
    yield from spec.get("initContainers") or ()
    yield from spec["containers"]
