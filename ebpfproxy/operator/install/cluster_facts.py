"""What this cluster is, as far as it decides what is rendered: read from its API, nothing guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from ebpfproxy.operator.install.api import Api, ApiError, Object, shown
from ebpfproxy.operator.install.base import NAME
from ebpfproxy.services.values import parse_prefix

SYSTEM = "kube-system"
KUBE_PROXY = "kube-proxy"
_KUBEADM = "kubeadm-config"
_FLAG = re.compile(r"--config[= ](\S+)")


class Version(NamedTuple):
    """Of the API server; compares as numbers."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class File(NamedTuple):
    """A text of a ConfigMap; ``where`` names object and key."""

    text: str
    where: str


class Networking(NamedTuple):
    """CIDRs as kubeadm was told them; empty where it was not."""

    pods: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


def version(api: Api) -> Version:
    """Raises ApiError."""
    found = api.version()
    numbers = [re.match(r"\d+", str(found.get(name, ""))) for name in ("major", "minor")]
    if None in numbers:
        raise ApiError(f"{api.host}/version: {found.get('gitVersion', found)!r} is no version")
    return Version(*(int(each[0]) for each in numbers if each is not None))


def namespace_of_agents(api: Api) -> str:
    """Where they are, as the one binding of the cluster says; empty where there is none. Raises ApiError."""
    binding = api.get("ClusterRoleBinding", "", NAME)
    subjects = (binding or {}).get("subjects") or [{}]
    return str(subjects[0].get("namespace", ""))


def kube_proxy(api: Api) -> Object | None:
    """Its DaemonSet. Raises ApiError."""
    return api.get("DaemonSet", SYSTEM, KUBE_PROXY)


def kube_proxy_file(api: Api, daemon_set: Object) -> File | None:
    """What its ``--config`` names; None where no ConfigMap has it. Raises ApiError."""
    place = config_map_of(daemon_set)
    if place is None:
        return None
    name, key = place
    found = api.get("ConfigMap", SYSTEM, name) or {}
    text = (found.get("data") or {}).get(key)
    return File(str(text), f"{shown('ConfigMap', SYSTEM, name)}: {key}") if text else None


def config_map_of(daemon_set: Object) -> tuple[str, str] | None:
    """Name and key of what is mounted where ``--config`` points to: kubeadm's are ``kube-proxy`` and
    ``config.conf``, others' are not. None where it is no ConfigMap's."""
    pod = daemon_set["spec"]["template"]["spec"]
    for container in pod.get("containers") or ():
        said = _FLAG.search(" ".join([*(container.get("command") or ()), *(container.get("args") or ())]))
        if said is None:
            continue
        path = PurePosixPath(said[1].strip("'\""))
        for mount in container.get("volumeMounts") or ():
            if not path.is_relative_to(mount["mountPath"]):
                continue
            inside = PurePosixPath(mount.get("subPath") or "") / path.relative_to(mount["mountPath"])
            for volume in pod.get("volumes") or ():
                found = (
                    _key(volume.get("configMap"), str(inside)) if volume["name"] == mount["name"] else None
                )
                if found is not None:
                    return found
    return None


def _key(config_map: Any, path: str) -> tuple[str, str] | None:
    if not config_map:
        return None
    items = config_map.get("items")
    keys = {each["path"]: each["key"] for each in items} if items else {path: path}
    return (config_map["name"], keys[path]) if path in keys else None


def networking(api: Api) -> Networking:
    """From kubeadm's own ConfigMap. Raises ApiError."""
    found = api.get("ConfigMap", SYSTEM, _KUBEADM) or {}
    try:
        document: Any = yaml.safe_load(str((found.get("data") or {}).get("ClusterConfiguration", "")))
        section = document["networking"]
        return Networking(*(tuple(_cidrs(section.get(name))) for name in ("podSubnet", "serviceSubnet")))
    except (yaml.YAMLError, LookupError, TypeError, AttributeError):
        return Networking()


def _cidrs(text: object) -> Iterator[str]:
    for part in str(text or "").split(","):
        if parse_prefix(part.strip()) is not None:
            yield part.strip()
