"""Tables of docs/configuration.md: every field of both documents, its flag, its default."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from ebpfproxy.config import kube_proxy
from ebpfproxy.config.flags import KUBE_PROXY_FLAGS, OWN_FLAGS
from ebpfproxy.config.load import _is_without_effect
from ebpfproxy.config.own import DEFAULTS, EbpfProxyConfiguration
from tools.docs.tables import table

_KINDS = ("kind", "apiVersion")


def _flags(flags: typing.Mapping[str, str], path: str) -> str:
    names = [name for name, field in flags.items() if field == path and name != "verbosity"]
    return ", ".join(f"`-{name}`" if len(name) == 1 else f"`--{name}`" for name in names)


def _value(value: Any) -> str:
    return f"`{msgspec.json.encode(value, enc_hook=str).decode()}`"


def own_settings() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        hints = typing.get_type_hints(EbpfProxyConfiguration, include_extras=True)
        for field in msgspec.structs.fields(EbpfProxyConfiguration):
            if field.encode_name in _KINDS:
                continue
            metas = getattr(hints[field.name], "__metadata__", ())
            (text,) = (meta.description for meta in metas if getattr(meta, "description", None))
            value = getattr(DEFAULTS, field.name)
            yield f"`{field.encode_name}`", _flags(OWN_FLAGS, field.encode_name), _value(value), text

    return table(("field", "flag", "default", "what"), rows())


def kube_proxy_settings() -> str:
    def rows() -> Iterator[tuple[str, ...]]:
        for path in _paths(type(kube_proxy.DEFAULTS), ""):
            effect = "none" if _is_without_effect(path) else "yes"
            yield f"`{path}`", _flags(KUBE_PROXY_FLAGS, path), _value(_at(kube_proxy.DEFAULTS, path)), effect

    return table(("field", "flag", "default", "effect"), rows())


def _paths(struct: Any, prefix: str) -> Iterator[str]:
    for field in msgspec.structs.fields(struct):
        path = f"{prefix}{field.encode_name}"
        if path in _KINDS:
            continue
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _paths(field.type, f"{path}.")
        else:
            yield path


def _at(struct: Any, path: str) -> Any:
    name, dot, rest = path.partition(".")
    (field,) = (each for each in msgspec.structs.fields(struct) if each.encode_name == name)
    found = getattr(struct, field.name)
    return _at(found, rest) if dot else found
