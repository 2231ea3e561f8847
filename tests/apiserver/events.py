"""Events of events.k8s.io/v1: only create, validated as in pkg/apis/core/validation/events.go."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from tests.apiserver import bodies
from tests.apiserver.single_objects import Answer
from tests.apiserver.store import encode

PREFIX = "/apis/events.k8s.io/"
_PATH = re.compile(r"/apis/events\.k8s\.io/v1/namespaces/([^/]+)/events")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


class Events:
    """Keeps created Events in order. It is thread-safe. ``terminating`` has the terminating namespaces."""

    def __init__(self, denied: set[str]) -> None:
        self._denied = denied
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], dict[str, Any]] = {}
        self.terminating: set[str] = set()

    @property
    def all(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._found.values())

    def answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: bytes,
        headers: Mapping[str, str],
        user: str,
    ) -> Answer:
        match = _PATH.fullmatch(path)
        if match is None:
            return _refused(404, "NotFound", bodies.NOT_FOUND)
        namespace = match[1]
        forbidden = f'events.events.k8s.io is forbidden: User "{user}" cannot create resource "events"'
        if method != "POST" or "events" in self._denied or user == "system:anonymous":
            where = f'in API group "events.k8s.io" in the namespace "{namespace}"'
            return _refused(403, "Forbidden", f"{forbidden} {where}")
        event = json.loads(body)
        meta = event["metadata"]
        if meta.get("namespace", namespace) != namespace:
            why = "the namespace of the provided object does not match the namespace sent on the request"
            return _refused(400, "BadRequest", why)
        name = meta.get("name", "")
        if problems := list(_problems(event, namespace)):
            return _refused(422, "Invalid", f'Event "{name}" is invalid: {"; ".join(problems)}')
        if namespace in self.terminating:
            why = f'events.events.k8s.io "{name}" is forbidden: unable to create new content in namespace'
            return _refused(403, "Forbidden", f"{why} {namespace} because it is being terminated")
        with self._lock:
            if (namespace, name) in self._found:
                return _refused(409, "AlreadyExists", f'events.events.k8s.io "{name}" already exists')
            self._found[namespace, name] = event
        return Answer(201, encode(event))


def _refused(code: int, reason: str, message: str) -> Answer:
    return Answer(code, bodies.status(code, reason, message, {}))


def _problems(event: Mapping[str, Any], namespace: str) -> Iterator[str]:
    if (event.get("apiVersion"), event.get("kind")) != ("events.k8s.io/v1", "Event"):
        yield "apiVersion, kind"
    if not _SUBDOMAIN.fullmatch(event["metadata"].get("name", "")):
        yield "metadata.name: a lowercase RFC 1123 subdomain"
    if not _is_micro_time(event.get("eventTime")):
        yield "eventTime: Required value"
    if not event.get("regarding", {}).get("namespace") and namespace not in ("default", "kube-system"):
        yield "involvedObject.namespace: does not match event.namespace"
    if event.get("regarding", {}).get("namespace", namespace) != namespace:
        # The strict rules accept it, but kubectl does not find it.
        yield "involvedObject.namespace: is another"
    if not _QUALIFIED.fullmatch(event.get("reportingController", "")):
        yield "reportingController: a qualified name"
    for field in ("reportingInstance", "action", "reason"):
        if not 1 <= len(event.get(field, "").encode()) <= 128:
            yield f"{field}: can have at most 128 characters"
    if len(event.get("note", "").encode()) > 1024:
        yield "message: can have at most 1024 characters"
    if event.get("type") not in ("Normal", "Warning"):
        yield f"type: has invalid value: {event.get('type')}"
    series = event.get("series")
    if series is not None and (series["count"] < 2 or not _is_micro_time(series["lastObservedTime"])):
        yield "series.count: should be at least 2"
    for field in (
        "deprecatedFirstTimestamp",
        "deprecatedLastTimestamp",
        "deprecatedCount",
        "deprecatedSource",
    ):
        if field in event:
            yield f"{field}: needs to be unset"


def _is_micro_time(text: object) -> bool:
    """The fraction has exactly six digits: Go parses a fixed layout."""
    if not isinstance(text, str) or not re.fullmatch(r"[^.]*\.\d{6}(Z|[+-]\d\d:\d\d)", text):
        return False
    return datetime.fromisoformat(text).year > 1
