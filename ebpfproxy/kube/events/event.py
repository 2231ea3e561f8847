"""What people are told of an object through the API: an Event of events.k8s.io/v1 (KEP-383), as bytes.

Not to be confused with ``ebpfproxy.kube.objects.Event``, what a watch brings.
"""

from __future__ import annotations

import enum
import hashlib
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

#: Limits of the API server (pkg/apis/core/validation/events.go); of text in bytes, as Go counts.
_NOTE_BYTES = 1024
_INSTANCE_BYTES = 128
_NAME_LENGTH = 253

CONTROLLER = "ebpfproxy"
#: Where events about objects without a namespace live.
_NAMESPACE_OF_NODES = "default"
_API_VERSIONS = {"Node": "v1", "Service": "v1", "EndpointSlice": "discovery.k8s.io/v1"}


class Level(enum.StrEnum):
    NORMAL = "Normal"
    WARNING = "Warning"


class Reference(msgspec.Struct, frozen=True):
    """An object. A Node's namespace is empty, and its uid its name, as kube-proxy and kubelet have it."""

    kind: str
    namespace: str
    name: str
    uid: str = ""


class KubeEvent(msgspec.Struct, frozen=True):
    """What happened. ``regarding`` needs no uid: that is asked for when it is sent.

    ``of_node``: on this node. Else every node of the cluster finds the same, in the same words, and of the
    events that all of them send one is kept.
    """

    regarding: Reference
    level: Level
    reason: str
    action: str
    note: str
    of_node: bool = True


class Series(NamedTuple):
    """Equal occurrences that are sent as one event. Times are Unix seconds."""

    first: float
    last: float
    times: int


def namespace_of(reference: Reference) -> str:
    """Where events about it are."""
    return reference.namespace or _NAMESPACE_OF_NODES


def event(
    occurrence: KubeEvent,
    series: Series,
    node: str,
    *,
    regarding: Reference | None = None,
    related: Reference | None = None,
) -> dict[str, Any]:
    """``regarding`` and ``related``: what is known by now of the object, and of another that it is about."""
    about = regarding or occurrence.regarding
    found = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": _name(occurrence, series, node), "namespace": namespace_of(about)},
        "eventTime": _micro_time(series.first),
        "reportingController": CONTROLLER,
        "reportingInstance": _cut(f"{CONTROLLER}-{node}", _INSTANCE_BYTES),
        "action": occurrence.action,
        "reason": occurrence.reason,
        "regarding": _reference(about),
        "note": _cut(occurrence.note, _NOTE_BYTES),
        "type": str(occurrence.level),
    }
    if series.times > 1:
        found["series"] = {"count": series.times, "lastObservedTime": _micro_time(series.last)}
    if related is not None:
        found["related"] = _reference(related)
    return found


def _name(occurrence: KubeEvent, series: Series, node: str) -> str:
    """The same for the same, so that a second create is refused: no event for every node or every restart.

    What happens anew (a start, a series) has its time in it.
    """
    about = occurrence.regarding
    parts = [about.kind, about.namespace, about.name, occurrence.reason, occurrence.note]
    if occurrence.of_node:
        parts.append(node)
    if occurrence.level is Level.NORMAL or (occurrence.of_node and series.times > 1):
        parts.append(_micro_time(series.first))
    suffix = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return f"{about.name[: _NAME_LENGTH - len(suffix) - 1].rstrip('.-')}.{suffix}"


def _reference(reference: Reference) -> dict[str, str]:
    uid = reference.name if reference.kind == "Node" else reference.uid
    found = {
        "kind": reference.kind,
        "apiVersion": _API_VERSIONS[reference.kind],
        "namespace": reference.namespace,
        "name": reference.name,
        "uid": uid,
    }
    return {name: value for name, value in found.items() if value}


def _micro_time(seconds: float) -> str:
    """meta/v1 MicroTime: RFC 3339 with exactly six digits."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _cut(text: str, most: int) -> str:
    raw = text.encode()
    return text if len(raw) <= most else raw[: most - 3].decode(errors="ignore") + "…"
