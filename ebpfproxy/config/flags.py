"""Applies flags to the fields of both documents: kube-proxy's flags, under its names, and our own."""

from __future__ import annotations

import enum
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import msgspec

from ebpfproxy.config.declarations import Option, options_of
from ebpfproxy.config.documents import Problem, Quantity, bare, convert, fields_of
from ebpfproxy.config.durations import Duration, seconds
from ebpfproxy.config.kube_proxy import (
    DEFAULTS,
    HEALTHZ_PORT,
    METRICS_PORT,
    KubeProxyConfiguration,
    VModuleItem,
    with_port,
)
from ebpfproxy.config.own import DEFAULTS as OWN_DEFAULTS
from ebpfproxy.config.own import EbpfProxyConfiguration

S = TypeVar("S", bound=msgspec.Struct)

KUBE_PROXY_OPTIONS = tuple(options_of(DEFAULTS))
OWN_OPTIONS = tuple(options_of(OWN_DEFAULTS))


def _fields(options: tuple[Option, ...]) -> Mapping[str, str]:
    return {name.lstrip("-"): each.path for each in options if each.flag for name in each.flag.names}


#: Flags without their dashes, and the field that each sets.
KUBE_PROXY_FLAGS = _fields(KUBE_PROXY_OPTIONS)
OWN_FLAGS = _fields(OWN_OPTIONS)

#: Flags that kube-proxy takes for mode nftables, too, where they set fields of its section
#: (processV1Alpha1Flags). The masquerade bit of iptables is not that of nftables.
_OF_NFTABLES = {
    "masquerade-all": "masqueradeAll",
    "iptables-sync-period": "syncPeriod",
    "iptables-min-sync-period": "minSyncPeriod",
}
#: Flags that set no field.
NO_FIELD = frozenset(
    (
        "boot-id-file",
        "cleanup",
        "config",
        "help",
        "init-only",
        "standby",
        "machine-id-file",
        "version",
        "write-config-to",
    )
)


class Laid(NamedTuple):
    """Both documents with flags applied. The mappings give the flag (``--min``) that set a path."""

    kube_proxy: KubeProxyConfiguration
    own: EbpfProxyConfiguration
    problems: list[Problem]
    kube_proxy_flags: dict[str, str]
    own_flags: dict[str, str]


def lay(kube_proxy: KubeProxyConfiguration, own: EbpfProxyConfiguration, flags: Mapping[str, Any]) -> Laid:
    """Applies ``flags``, by name (``oom-score-adj``; ``oom_score_adj`` and ``--oom-score-adj`` are the same).

    A value is the text of a command line, or click's conversion of it: numbers, seconds for a duration,
    paths, tuples. None is a flag that was not given. Raises KeyError for an unknown flag.
    """
    given = {
        name.removeprefix("--").replace("_", "-"): value for name, value in flags.items() if value is not None
    }
    own = _overridden(own, given)
    if "manifests" in given and "kubeconfig" not in given:
        kube_proxy = _set(kube_proxy, "clientConnection.kubeconfig", "")
    problems: list[Problem] = []
    by_path: tuple[dict[str, str], dict[str, str]] = ({}, {})
    # The section of some flags depends on the mode.
    for name, value in sorted(given.items(), key=lambda item: item[0] != "proxy-mode"):
        if name in NO_FIELD:
            continue
        path, is_own = _path_of(name, value, kube_proxy)
        document = own if is_own else kube_proxy
        field = _type_at(type(document), path)
        found: list[Problem] = []
        converted = convert(_plain(_adapt(name, value), field), field, "", found)
        problems += [Problem(f"--{name}", problem.path, problem.text) for problem in found]
        by_path[is_own][path] = f"--{name}"
        if found:
            continue
        if is_own:
            own = _set(own, path, converted)
        else:
            kube_proxy = _set(kube_proxy, path, converted)
    return Laid(kube_proxy, own, problems, *by_path)


def _overridden(own: EbpfProxyConfiguration, given: Mapping[str, Any]) -> EbpfProxyConfiguration:
    """Clears fields of our document that a given flag of kube-proxy's overrides."""
    cleared: dict[str, Any] = {}
    for flag, ours, field, value in (
        ("ipvs-scheduler", "lb-algorithm", "lb_algorithm", None),
        ("iptables-localhost-nodeports", "localhost-nodeports", "localhost_node_ports", None),
        ("detect-local-mode", "", "detect_local_mode", None),
        ("manifests", "master", "master", ""),
        ("kubeconfig", "manifests", "manifests", ""),
        ("master", "manifests", "manifests", ""),
    ):
        if flag in given and ours not in given:
            cleared[field] = value
    return msgspec.structs.replace(own, **cleared)


def _path_of(name: str, value: object, kube_proxy: KubeProxyConfiguration) -> tuple[str, bool]:
    """The path that a flag sets, and whether it is in our document. Raises KeyError."""
    if name in OWN_FLAGS:
        return OWN_FLAGS[name], True
    if name == "detect-local-mode" and str(value) == "Devices":
        return "detectLocalMode", True
    if kube_proxy.mode == "nftables" and name in _OF_NFTABLES:
        return f"nftables.{_OF_NFTABLES[name]}", False
    return KUBE_PROXY_FLAGS[name], False


def _adapt(name: str, value: object) -> object:
    """Converts values that flags accept and fields do not."""
    text = str(value).strip()
    if name == "healthz-bind-address":
        return with_port(text, HEALTHZ_PORT)
    if name == "metrics-bind-address":
        return with_port(text, METRICS_PORT)
    if name == "cluster-cidr":
        return ",".join(_split(text))
    if name == "lb-algorithm" and not text:
        return None
    return value


def _plain(value: object, field: Any) -> object:
    """A flag's value as YAML would contain it, for a field of this type. A misfit is returned unchanged."""
    kind = bare(field)
    origin = typing.get_origin(kind)
    if isinstance(value, enum.Enum):
        value = value.value
    if origin is tuple and isinstance(value, str):
        parts = _split(value)
        is_vmodule = bare(typing.get_args(kind)[0]) is VModuleItem
        return [_vmodule_item(part) for part in parts] if is_vmodule else parts
    if origin is tuple and isinstance(value, tuple | list):
        return [str(each) for each in value]
    if origin is dict and isinstance(value, str):
        return {
            name.strip(): {"true": True, "false": False}.get(word.strip().lower(), word)
            for name, _, word in (part.partition("=") for part in _split(value))
        }
    if isinstance(kind, type) and issubclass(kind, Duration):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(seconds(typing.cast(float, value))) if is_number else str(value)
    if kind is str or kind is Quantity:
        return str(value)
    if isinstance(value, str) and kind is not bool and not isinstance(kind, enum.EnumMeta):
        return _number(value)
    if isinstance(value, str) and kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    return value


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _vmodule_item(text: str) -> dict[str, object]:
    """``pattern=N``"""
    pattern, _, level = text.rpartition("=")
    return {"filePattern": pattern, "verbosity": _number(level)}


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _type_at(struct: type[msgspec.Struct], path: str) -> Any:
    name, dot, rest = path.partition(".")
    found = fields_of(struct)[name]
    return _type_at(bare(found.type), rest) if dot else found.type


def _set(struct: S, path: str, value: object) -> S:
    name, dot, rest = path.partition(".")
    field = fields_of(type(struct))[name]
    if dot:
        value = _set(getattr(struct, field.name), rest, value)
    return msgspec.structs.replace(struct, **{field.name: value})
