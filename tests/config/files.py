"""Configuration files for tests."""

from __future__ import annotations

from typing import Any

import yaml

from ebpfproxy.config.documents import ConfigurationError
from ebpfproxy.config.load import Configuration, effective, parse

KUBE_PROXY = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration"}
OWN = {"apiVersion": "ebpfproxy.io/v1alpha1", "kind": "EbpfProxyConfiguration"}


def nested(path: str, value: Any) -> dict[str, Any]:
    """Returns ``{"a": {"b": value}}`` for ``a.b``."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(made.get(key), dict)
            made[key] = merged(made[key], value) if both else value
    return made


def text_of(*documents: dict[str, Any]) -> str:
    return str(yaml.safe_dump_all(documents, sort_keys=False))


def kube_proxy(*parts: dict[str, Any]) -> Configuration:
    return parse(text_of(merged(KUBE_PROXY, *parts)), "f")


def own(*parts: dict[str, Any]) -> Configuration:
    return parse(text_of(merged(OWN, *parts)), "f")


def used(*parts: dict[str, Any], flags: dict[str, Any] | None = None) -> Configuration:
    return effective(kube_proxy(*parts), flags)


def errors(text: str | bytes, name: str = "f") -> list[str]:
    """Returns the errors of a file; empty if it is valid."""
    try:
        parse(text, name)
    except ConfigurationError as error:
        return str(error).split("\n")
    return []


def flag_errors(flags: dict[str, Any], configuration: Configuration | None = None) -> list[str]:
    try:
        effective(configuration or Configuration(), flags)
    except ConfigurationError as error:
        return str(error).split("\n")
    return []
