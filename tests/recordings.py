"""What a real API server sent (../shared/recordings), decoded for tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ebpfproxy.objects import (
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

FOLDER = Path(__file__).parents[2] / "shared" / "recordings"

needs_recordings = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not there")


def lists(name: str) -> dict[Resource, list[dict[str, Any]]]:
    """``initial`` or ``final``: the three lists as JSON objects."""
    content = json.loads(gzip.decompress((FOLDER / f"{name}-lists.json.gz").read_bytes()))
    return {resource: content[resource.value]["items"] for resource in Resource}


def wanted(resource: Resource, item: dict[str, Any]) -> bool:
    """What the watches' selectors leave."""
    labels = item["metadata"].get("labels") or {}
    return resource is Resource.NODES or not labels.keys() & {
        "service.kubernetes.io/service-proxy-name",
        "service.kubernetes.io/headless",
    }


def as_events(content: dict[Resource, list[dict[str, Any]]]) -> list[Replaced]:
    return [
        Replaced(
            resource,
            tuple(msgspec.convert(item, RECORD_TYPES[resource]) for item in items if wanted(resource, item)),
        )
        for resource, items in content.items()
    ]


def watch_lines() -> list[tuple[Resource, bytes]]:
    """Every line of the three watches, in the order received."""
    found = []
    for line in gzip.decompress((FOLDER / "watch-events.jsonl.gz").read_bytes()).splitlines():
        entry = json.loads(line)
        found.append((Resource(entry["resource"]), entry["line"].encode()))
    return found


def watch_events() -> list[Event]:
    """The lines as events, those that the selectors would keep out left out."""
    found: list[Event] = []
    for resource, line in watch_lines():
        event = json.loads(line)
        if event["type"] == "BOOKMARK" or not wanted(resource, event["object"]):
            continue
        if event["type"] == "DELETED":
            meta = event["object"]["metadata"]
            found.append(Deleted(resource, ObjectKey(meta.get("namespace", ""), meta["name"])))
        else:
            found.append(Changed(resource, msgspec.convert(event["object"], RECORD_TYPES[resource])))
    return found


def event_key(event: Event) -> tuple[Resource, ObjectKey]:
    assert not isinstance(event, Replaced)
    return event.resource, event.key if isinstance(event, Deleted) else key_of(event.object)


class World:
    """The objects after some events, to compute from scratch what a tracker computed step by step."""

    def __init__(self, first: list[Replaced]) -> None:
        self.objects: dict[Resource, dict[ObjectKey, Object]] = {
            event.resource: {key_of(each): each for each in event.objects} for event in first
        }

    def apply(self, event: Event) -> None:
        resource, key = event_key(event)
        if isinstance(event, Changed):
            self.objects[resource][key] = event.object
        else:
            self.objects[resource].pop(key, None)

    def lists(self) -> list[Replaced]:
        return [Replaced(resource, tuple(objects.values())) for resource, objects in self.objects.items()]
