"""Recordings of a real API server (tests/data/recordings), decoded for tests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from typing import Any, cast

import msgspec

from ebpfproxy.kube.objects import (
    RECORD_TYPES,
    Changed,
    Deleted,
    Event,
    Object,
    ObjectKey,
    Replaced,
    Resource,
    key_of,
)
from ebpfproxy.services.reduce import reducer
from ebpfproxy.services.tracker import Tracker
from tests.data import RECORDINGS


def lists(name: str) -> dict[Resource, list[dict[str, Any]]]:
    """Returns the three lists ``initial`` or ``final`` as JSON objects."""
    content = json.loads(gzip.decompress((RECORDINGS / f"{name}-lists.json.gz").read_bytes()))
    return {resource: content.get(resource.value, {"items": []})["items"] for resource in Resource}


def replaced(
    resource: Resource, objects: Iterable[Object], unreadable: Iterable[ObjectKey] = ()
) -> Replaced[object]:
    """Returns the event of a list with its objects unchanged."""
    return Replaced(resource, {key_of(each): each for each in objects}, frozenset(unreadable))


def changed(resource: Resource, each: Object, received: float = 0.0) -> Changed[object]:
    return Changed(resource, key_of(each), each, received)


class RecordTracker(Tracker):
    """A tracker of records, which are reduced as by a source."""

    def apply(self, event: Event) -> None:
        reduce = cast(Callable[[object], object], reducer(self._node_name))
        if isinstance(event, Replaced):
            reduced = {key: reduce(each) for key, each in event.objects.items()}
            event = msgspec.structs.replace(event, objects=reduced)
        elif isinstance(event, Changed):
            event = msgspec.structs.replace(event, object=reduce(event.object))
        super().apply(event)


def wanted(resource: Resource, item: dict[str, Any]) -> bool:
    """Returns True for objects that the watches' selectors match."""
    labels = item["metadata"].get("labels") or {}
    return resource is not Resource.ENDPOINTSLICES or "service.kubernetes.io/headless" not in labels


def as_events(content: dict[Resource, list[dict[str, Any]]]) -> list[Replaced[object]]:
    return [
        replaced(
            resource,
            (msgspec.convert(item, RECORD_TYPES[resource]) for item in items if wanted(resource, item)),
        )
        for resource, items in content.items()
    ]


def watch_lines() -> list[tuple[Resource, bytes]]:
    """Yields every line of the three watches in the order received."""
    found = []
    for line in gzip.decompress((RECORDINGS / "watch-events.jsonl.gz").read_bytes()).splitlines():
        entry = json.loads(line)
        found.append((Resource(entry["resource"]), entry["line"].encode()))
    return found


def watch_events() -> list[Event]:
    """Yields the lines as events, without those that the selectors would filter."""
    found: list[Event] = []
    for resource, line in watch_lines():
        event = json.loads(line)
        if event["type"] == "BOOKMARK" or not wanted(resource, event["object"]):
            continue
        if event["type"] == "DELETED":
            meta = event["object"]["metadata"]
            found.append(Deleted(resource, ObjectKey(meta.get("namespace", ""), meta["name"])))
        else:
            found.append(changed(resource, msgspec.convert(event["object"], RECORD_TYPES[resource])))
    return found


def event_key(event: Event) -> tuple[Resource, ObjectKey]:
    assert not isinstance(event, Replaced)
    return event.resource, event.key


class StoredObjects:
    """The objects after some events, from which a tracker's incremental results are computed anew."""

    def __init__(self, first: list[Replaced[object]]) -> None:
        self.objects: dict[Resource, dict[ObjectKey, object]] = {
            event.resource: dict(event.objects) for event in first
        }

    def apply(self, event: Event) -> None:
        resource, key = event_key(event)
        if isinstance(event, Changed):
            self.objects[resource][key] = event.object
        else:
            self.objects[resource].pop(key, None)

    def lists(self) -> list[Replaced[object]]:
        return [Replaced(resource, dict(objects)) for resource, objects in self.objects.items()]
