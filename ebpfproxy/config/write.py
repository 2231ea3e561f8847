"""Writes a configuration in kube-proxy's format: YAML for ``--write-config-to``, JSON for ``/configz``."""

from __future__ import annotations

from typing import Any

import msgspec
import yaml

from ebpfproxy.config.kube_proxy import KubeProxyConfiguration
from ebpfproxy.config.load import Configuration
from ebpfproxy.config.own import EbpfProxyConfiguration

#: The keys of ``/configz``: the API groups.
KUBE_PROXY_GROUP, OWN_GROUP = "kubeproxy.config.k8s.io", "ebpfproxy.io"

#: Fields that are omitted while they are empty, zero or false (the API's omitempty).
_OMITTED = (
    ("featureGates",),
    ("windowsRunAsService",),
    ("logging", "vmodule"),
    ("logging", "options", "text", "splitStream"),
    ("logging", "options", "json", "splitStream"),
)


class _Dumper(yaml.SafeDumper):
    """Uses the quotes of Go's printer, and no aliases."""

    def choose_scalar_style(self) -> Any:
        style = super().choose_scalar_style()
        return '"' if style == "'" else style

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def dump(value: Any, *, sort: bool = False) -> str:
    """Plain values as a YAML document."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=sort, allow_unicode=True, width=1 << 16)


def _plain(configuration: msgspec.Struct) -> dict[str, Any]:
    """Types of JSON, with durations and quantities as text."""
    text = msgspec.json.encode(configuration, enc_hook=str)
    return msgspec.json.decode(text, type=dict[str, Any])


def kube_proxy_builtins(configuration: KubeProxyConfiguration) -> dict[str, Any]:
    """The content of ``/configz``: the API's order, durations and quantities as text."""
    made = _plain(configuration)
    qps = made["clientConnection"]["qps"]
    if qps == int(qps):
        made["clientConnection"]["qps"] = int(qps)
    for *parents, name in _OMITTED:
        holder = made
        for parent in parents:
            holder = holder[parent]
        if not holder[name]:
            del holder[name]
    return made


def kube_proxy_yaml(configuration: KubeProxyConfiguration) -> str:
    """The output of ``kube-proxy --write-config-to``, with sorted keys."""
    return dump(kube_proxy_builtins(configuration), sort=True)


def own_yaml(configuration: EbpfProxyConfiguration) -> str:
    return dump(_plain(configuration))


def to_yaml(configuration: Configuration) -> str:
    """Both documents, in the format of :func:`ebpfproxy.config.load.parse`."""
    return f"{kube_proxy_yaml(configuration.kube_proxy)}---\n{own_yaml(configuration.own)}"


def configz(configuration: Configuration) -> dict[str, Any]:
    """The content of ``/configz``: kube-proxy's key with its document, and ours."""
    return {
        KUBE_PROXY_GROUP: kube_proxy_builtins(configuration.kube_proxy),
        OWN_GROUP: _plain(configuration.own),
    }
