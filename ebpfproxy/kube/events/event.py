"""An Event of events.k8s.io/v1 (KEP-383), by which users are told about an object.

``ebpfproxy.kube.objects.Event`` is something else: what a watch brings.
"""

from __future__ import annotations

import enum
import hashlib
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

#: The results of sending events. ``created``, and ``exists``: another node or an earlier start sent the same;
#: ``repeated`` and ``limited``: see ``correlation``; ``dropped``: the queue is full; ``gone``: the object is
#: no longer there; ``forbidden``: by a 403 or in the time after it; ``rejected``: by another 4xx; ``failed``:
#: after the last try.
RESULTS = (
    "created", "exists", "repeated", "limited", "dropped", "gone", "forbidden", "rejected", "failed",
)  # fmt: skip

#: The API server's limits (pkg/apis/core/validation/events.go); Go counts text in bytes.
_NOTE_BYTES = 1024
_INSTANCE_BYTES = 128
_NAME_LENGTH = 253

CONTROLLER = "ebpfproxy"
#: The namespace of events about objects without one.
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
    """What happened. ``regarding`` needs no uid: it is looked up when the event is sent.

    ``of_node``: it happened on this node. Otherwise every node of the cluster finds the same and sends an
    equal event, of which the API server keeps one.
    """

    regarding: Reference
    level: Level
    reason: str
    action: str
    note: str
    of_node: bool = True


class Series(NamedTuple):
    """Equal events that are sent as one. Times are Unix seconds."""

    first: float
    last: float
    times: int


def namespace_of(reference: Reference) -> str:
    """Returns the namespace of events about it."""
    return reference.namespace or _NAMESPACE_OF_NODES


def to_api(
    event: KubeEvent,
    series: Series,
    node: str,
    *,
    regarding: Reference | None = None,
    related: Reference | None = None,
) -> dict[str, Any]:
    """Returns the API's object. ``regarding`` and ``related`` are what was looked up."""
    about = regarding or event.regarding
    found = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": _name(event, series, node), "namespace": namespace_of(about)},
        "eventTime": _micro_time(series.first),
        "reportingController": CONTROLLER,
        "reportingInstance": _cut(f"{CONTROLLER}-{node}", _INSTANCE_BYTES),
        "action": event.action,
        "reason": event.reason,
        "regarding": _reference(about),
        "note": _cut(event.note, _NOTE_BYTES),
        "type": str(event.level),
    }
    if series.times > 1:
        found["series"] = {"count": series.times, "lastObservedTime": _micro_time(series.last)}
    if related is not None:
        found["related"] = _reference(related)
    return found


def _name(event: KubeEvent, series: Series, node: str) -> str:
    """Equal events get equal names, so that a second create is refused: one event, not one for each node.

    The name of what happens anew (a start, a series) has its time in it.
    """
    about = event.regarding
    parts = [about.kind, about.namespace, about.name, event.reason, event.note]
    if event.of_node:
        parts.append(node)
    if event.level is Level.NORMAL or (event.of_node and series.times > 1):
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
