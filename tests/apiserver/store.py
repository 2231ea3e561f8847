"""Objects with resourceVersions, and the log of changes for watches."""

from __future__ import annotations

import bisect
import json
import threading
from typing import Any, NamedTuple

from tests.apiserver.selectors import Key, Selector

Item = dict[str, Any]

#: apiVersion, kind, and the list's kind.
KINDS = {
    "services": ("v1", "Service", "ServiceList"),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice", "EndpointSliceList"),
    "nodes": ("v1", "Node", "NodeList"),
    "servicecidrs": ("networking.k8s.io/v1", "ServiceCIDR", "ServiceCIDRList"),
}


class Version(NamedTuple):
    """An object as it was at one resourceVersion; ``body`` is its JSON."""

    number: int
    key: Key
    labels: dict[str, str]
    body: bytes

    def line(self, kind: str) -> bytes:
        """Returns what a watch sends for it."""
        return b'{"type":"%s","object":%s}\n' % (kind.encode(), self.body)

    def at(self, number: int) -> Version:
        """Returns the content with another resourceVersion, as in deletions."""
        item = json.loads(self.body)
        item["metadata"]["resourceVersion"] = str(number)
        return self._replace(number=number, body=encode(item))


class Change(NamedTuple):
    """A change. ``before`` is None for a creation, ``after`` for a deletion."""

    number: int
    before: Version | None
    after: Version | None

    def line(self, selector: Selector) -> bytes:
        """Returns what a watch with this selector gets: an object that no longer matches is deleted for it."""
        before, after = self.before, self.after
        matched = before is not None and selector(before.key, before.labels)
        if after is not None and selector(after.key, after.labels):
            return after.line("MODIFIED" if matched else "ADDED")
        return before.at(self.number).line("DELETED") if before is not None and matched else b""


class ExpiredError(Exception):
    """The version has been compacted."""


class Store:
    """All resources share one sequence of versions, as in etcd. It is thread-safe."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 100
        self.compacted = 0
        self._items: dict[str, dict[Key, Version]] = {r: {} for r in KINDS}
        self._log: dict[str, list[Change]] = {r: [] for r in KINDS}

    def put(self, resource: str, item: Item) -> int:
        """Adds or replaces an object; returns the version."""
        api_version, kind, _ = KINDS[resource]
        meta = item["metadata"]
        key = (meta.get("namespace", ""), meta["name"])
        with self.changed:
            self.version += 1
            meta = {**meta, "resourceVersion": str(self.version)}
            body = encode({"kind": kind, "apiVersion": api_version, **item, "metadata": meta})
            made = Version(self.version, key, meta.get("labels") or {}, body)
            self._log[resource].append(Change(self.version, self._items[resource].get(key), made))
            self._items[resource][key] = made
            self.changed.notify_all()
            return self.version

    def delete(self, resource: str, namespace: str, name: str) -> None:
        with self.changed:
            gone = self._items[resource].pop((namespace, name))
            self.version += 1
            self._log[resource].append(Change(self.version, gone, None))
            self.changed.notify_all()

    def compact(self, keep: int = 0) -> None:
        """Forgets the history but for the last ``keep`` versions: older watches and continue tokens get 410."""
        with self.changed:
            self.compacted = max(self.compacted, self.version - keep)
            for log in self._log.values():
                del log[: bisect.bisect_right(log, self.compacted, key=lambda change: change.number)]

    def rewind(self, number: int) -> None:
        """Goes back to a version, as an etcd that is restored from a backup; what follows has numbers that were given."""
        with self.changed:
            for resource in KINDS:
                _, found = self.items(resource, at=number)
                self._items[resource] = {each.key: each for each in found}
                self._log[resource] = [each for each in self._log[resource] if each.number <= number]
            self.version = number

    def items(
        self, resource: str, selector: Selector | None = None, *, at: int | None = None
    ) -> tuple[int, list[Version]]:
        """Returns the objects by key, current or ``at`` a version. Raises ExpiredError."""
        with self.changed:
            found = dict(self._items[resource])
            number = self.version if at is None else at
            for change in reversed(self._since(resource, number)):
                if change.before is not None:
                    found[change.before.key] = change.before
                elif change.after is not None:
                    del found[change.after.key]
        matching = (v for v in found.values() if selector is None or selector(v.key, v.labels))
        return number, sorted(matching, key=lambda v: v.key)

    def after(self, resource: str, number: int) -> list[Change] | None:
        """Returns changes after a version; None where it has been compacted. The condition must be held."""
        try:
            return self._since(resource, number)
        except ExpiredError:
            return None

    def _since(self, resource: str, number: int) -> list[Change]:
        if number < self.compacted:
            raise ExpiredError
        log = self._log[resource]
        return log[bisect.bisect_right(log, number, key=lambda change: change.number) :]


def encode(item: Item) -> bytes:
    return json.dumps(item, separators=(",", ":")).encode()
