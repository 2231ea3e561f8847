"""Objects with resourceVersions, and the log of their changes that watches read."""

from __future__ import annotations

import bisect
import json
import threading
from typing import Any, NamedTuple

Item = dict[str, Any]

KINDS = {
    "services": ("v1", "Service", "ServiceList"),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice", "EndpointSliceList"),
    "nodes": ("v1", "Node", "NodeList"),
}


class Entry(NamedTuple):
    """One change: ``line`` is what a watch sends for it."""

    version: int
    kind: str
    key: tuple[str, str]
    labels: frozenset[str]
    body: bytes

    @property
    def line(self) -> bytes:
        return b'{"type":"%s","object":%s}\n' % (self.kind.encode(), self.body)


class Selector:
    """``!label,!label`` and ``metadata.name=NAME``: what the watches of an agent use."""

    def __init__(self, labels: str = "", fields: str = "") -> None:
        self._absent = {part.removeprefix("!") for part in labels.split(",") if part}
        self._name = fields.removeprefix("metadata.name=")

    def __call__(self, entry: Entry) -> bool:
        return not (entry.labels & self._absent) and self._name in ("", entry.key[1])


class Store:
    """All resources share one sequence of versions, as in etcd. Any thread may use it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 100
        self._items: dict[str, dict[tuple[str, str], Entry]] = {r: {} for r in KINDS}
        self._log: dict[str, list[Entry]] = {r: [] for r in KINDS}
        self._compacted = 0

    def put(self, resource: str, item: Item) -> int:
        """Adds or replaces; returns the version."""
        version, kind, _ = KINDS[resource]
        meta = item["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        with self.changed:
            self.version += 1
            body = {
                "kind": kind,
                "apiVersion": version,
                **item,
                "metadata": {**meta, "resourceVersion": str(self.version)},
            }
            entry = Entry(
                self.version,
                "MODIFIED" if key in self._items[resource] else "ADDED",
                key,
                frozenset(meta.get("labels") or {}),
                json.dumps(body, separators=(",", ":")).encode(),
            )
            self._items[resource][key] = entry
            self._log[resource].append(entry)
            self.changed.notify_all()
            return self.version

    def delete(self, resource: str, namespace: str, name: str) -> None:
        with self.changed:
            self.version += 1
            gone = self._items[resource].pop((namespace, name))
            body = json.loads(gone.body)
            body["metadata"]["resourceVersion"] = str(self.version)
            encoded = json.dumps(body, separators=(",", ":")).encode()
            self._log[resource].append(gone._replace(version=self.version, kind="DELETED", body=encoded))
            self.changed.notify_all()

    def compact(self) -> None:
        """Forgets all history: a watch from before now is 410."""
        with self.changed:
            self._compacted = self.version
            for log in self._log.values():
                log.clear()

    def items(self, resource: str, selector: Selector) -> tuple[int, list[Entry]]:
        with self.changed:
            found = sorted(self._items[resource].values(), key=lambda e: e.key)
            return self.version, [e._replace(kind="ADDED") for e in found if selector(e)]

    def after(self, resource: str, version: int) -> list[Entry] | None:
        """Changes after ``version``; None where that is compacted away. The condition must be held."""
        if version < self._compacted:
            return None
        log = self._log[resource]
        return log[bisect.bisect_right(log, version, key=lambda e: e.version) :]
