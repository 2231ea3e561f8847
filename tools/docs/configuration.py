"""Every field of both documents, its flag and its default: docs/configuration.md, and the JSON schemas."""

from __future__ import annotations

from typing import Any

import msgspec

from ebpfproxy.config import own
from ebpfproxy.config.declarations import Option, described
from ebpfproxy.config.flags import KUBE_PROXY_OPTIONS, OWN_OPTIONS
from tools.docs.tables import table


def _flags(option: Option) -> str:
    return ", ".join(f"`{name}`" for name in (option.flag.names if option.flag else ()))


def _value(value: Any) -> str:
    return f"`{msgspec.json.encode(value, enc_hook=str).decode()}`"


def own_settings() -> str:
    return table(
        ("field", "flag", "default", "what"),
        ((f"`{each.path}`", _flags(each), _value(each.value), described(each)) for each in OWN_OPTIONS),
    )


def kube_proxy_settings() -> str:
    return table(
        ("field", "flag", "default", "effect"),
        (
            (f"`{each.path}`", _flags(each), _value(each.value), "none" if each.is_ignored else "yes")
            for each in KUBE_PROXY_OPTIONS
        ),
    )


def schema() -> str:
    """deploy/ebpfproxy.schema.json: an EbpfProxyConfiguration."""
    return _json(own.schema())


def chart_schema() -> str:
    """deploy/chart/values.schema.json: helm checks ``config.own`` before it installs anything."""
    made = own.schema()
    document = made["$defs"].pop(own.KIND)
    for name in ("kind", "apiVersion"):  # The template writes them.
        del document["properties"][name]
    del document["required"]
    config = {"type": "object", "properties": {"kubeProxy": {"type": "object"}, "own": document}}
    return _json(
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"config": config},
            "$defs": made["$defs"],
        }
    )


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
