"""The facts about a cluster that decide what is rendered, read from its API; nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from ebpfproxy import yaml_text
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.names import AGENT, KUBEADM_CONFIG, SYSTEM
from ebpfproxy.services.values import parse_prefix


class Version(NamedTuple):
    """The API server's; compares as numbers."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


class Networking(NamedTuple):
    """CIDRs as kubeadm was told them; empty where it was not."""

    pods: tuple[str, ...] = ()
    services: tuple[str, ...] = ()


def version(api: Api) -> Version:
    """Raises ApiError."""
    found = api.version()
    numbers = [re.match("[0-9]{1,9}", str(found.get(name, ""))) for name in ("major", "minor")]
    if None in numbers:
        raise ApiError(f"{api.host}/version: {found.get('gitVersion', found)!r} is no version")
    return Version(*(int(each[0]) for each in numbers if each is not None))


def namespace_of_agents(api: Api) -> str:
    """Returns the one that the cluster's only binding names; empty without a binding. Raises ApiError."""
    binding = api.get("ClusterRoleBinding", "", AGENT)
    subjects = (binding or {}).get("subjects") or [{}]
    return str(subjects[0].get("namespace", ""))


def networking(api: Api) -> Networking:
    """Reads kubeadm's own ConfigMap. Raises ApiError."""
    text = api.config(SYSTEM, KUBEADM_CONFIG, "ClusterConfiguration")
    try:
        document: Any = yaml_text.load(text)
        section = document["networking"]
        return Networking(*(tuple(_cidrs(section.get(name))) for name in ("podSubnet", "serviceSubnet")))
    except (yaml.YAMLError, LookupError, TypeError, AttributeError):
        return Networking()


def _cidrs(text: object) -> Iterator[str]:
    for part in str(text or "").split(","):
        if parse_prefix(part.strip()) is not None:
            yield part.strip()
