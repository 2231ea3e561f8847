"""Label and field selectors of query parameters."""

from __future__ import annotations

from collections.abc import Mapping

Key = tuple[str, str]
"""Namespace and name."""


class Selector:
    """``!label``, ``label``, ``label=value``, ``label!=value``, joined by commas; ``metadata.name=…``."""

    def __init__(self, labels: str = "", fields: str = "") -> None:
        self._labels = [part.strip() for part in labels.split(",") if part.strip()]
        self._fields = dict(part.split("=", 1) for part in fields.split(",") if part)
        unknown = self._fields.keys() - {"metadata.name", "metadata.namespace"}
        if unknown:
            raise ValueError(f"field label not supported: {unknown.pop()}")

    def __call__(self, key: Key, labels: Mapping[str, str]) -> bool:
        namespace, name = self._fields.get("metadata.namespace"), self._fields.get("metadata.name")
        if namespace not in (None, key[0]) or name not in (None, key[1]):
            return False
        return all(_matches(part, labels) for part in self._labels)


def _matches(part: str, labels: Mapping[str, str]) -> bool:
    if part.startswith("!"):
        return part[1:] not in labels
    name, different, value = part.partition("!=")
    if different:
        return labels.get(name) != value
    name, equal, value = part.partition("=")
    return labels.get(name) == value.removeprefix("=") if equal else name in labels
