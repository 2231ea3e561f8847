"""From bytes to records: list pages and the lines of a watch, straight from JSON.

An object that cannot be decoded is lost alone: it is reported with its name and the field, and what was
known of it stays in force.
"""

from __future__ import annotations

import enum
import re
from typing import Any, TypeVar

import msgspec

from ebpfproxy.kube.objects import RECORD_TYPES, Object, ObjectKey, Resource, key_of

T = TypeVar("T")


class EventType(enum.StrEnum):
    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"
    ERROR = "ERROR"


_WITH_OBJECT = (EventType.ADDED, EventType.MODIFIED)


class Status(msgspec.Struct, frozen=True):
    """The API's answer when something is wrong (meta/v1 Status)."""

    code: int = 0
    reason: str = ""
    message: str = ""


class _Annotations(msgspec.Struct, frozen=True):
    initial_events_end: str | None = msgspec.field(name="k8s.io/initial-events-end", default=None)


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    annotations: _Annotations | None = None


class _Head(msgspec.Struct, frozen=True):
    metadata: _Meta


class _Line(msgspec.Struct, frozen=True):
    type: EventType
    object: msgspec.Raw


class _ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""
    continue_token: str = msgspec.field(name="continue", default="")


class _RawPage(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: tuple[msgspec.Raw, ...] | None = None


class Unreadable(msgspec.Struct, frozen=True):
    """An object that is there but could not be decoded, and why: ``spec.ports[0].port: Expected …``."""

    key: ObjectKey
    why: str


class WatchEvent(msgspec.Struct, frozen=True):
    """One line of a watch. ``object`` of ADDED and MODIFIED, ``status`` of ERROR, else neither."""

    type: EventType
    key: ObjectKey
    resource_version: str = ""
    object: Object | None = None
    status: Status | None = None
    initial_events_end: bool = False
    unreadable: Unreadable | None = None


class Page(msgspec.Struct, frozen=True):
    resource_version: str
    continue_token: str
    objects: tuple[Object, ...]
    unreadable: tuple[Unreadable, ...]


#: Decoders raise these for JSON that is no such object: a wrong type, not UTF-8, nested too deep.
_MALFORMED = (msgspec.ValidationError, UnicodeDecodeError, RecursionError)

_head = msgspec.json.Decoder(_Head)
_line = msgspec.json.Decoder(_Line)
_raw_page = msgspec.json.Decoder(_RawPage)
_status = msgspec.json.Decoder(Status)


def explain(error: Exception) -> str:
    """Returns msgspec's message with the field first, as the API writes it."""
    found = re.fullmatch(r"(.*) - at `\$\.?(.*)`", str(error))
    return f"{found[2]}: {found[1]}" if found else str(error)


def from_plain(value: object, kind: type[T]) -> T:
    """Converts what YAML has been read to. A null stands for an absent field, as in the API.

    Raises msgspec.ValidationError, also for a value that contains itself.
    """
    try:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            # Without nulls, which are rare, nothing is walked through twice.
            return msgspec.convert(_without_nulls(value), kind)
    except RecursionError as error:
        raise msgspec.ValidationError("contains itself") from error


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _meta_of(raw: msgspec.Raw) -> _Meta:
    """Returns name and version of an object that may be malformed; what cannot be read of them is empty."""
    try:
        return _head.decode(raw).metadata
    except _MALFORMED:
        pass
    try:
        found = msgspec.json.decode(raw)
    except _MALFORMED:
        return _Meta()
    meta = found.get("metadata") if isinstance(found, dict) else None
    texts = {k: v for k, v in meta.items() if isinstance(v, str)} if isinstance(meta, dict) else {}
    return _Meta(texts.get("name", ""), texts.get("namespace", ""), texts.get("resourceVersion", ""))


class Decoder:
    """Decodes one resource. Raises msgspec.DecodeError where not even the envelope can be read."""

    def __init__(self, resource: Resource) -> None:
        kind: Any = RECORD_TYPES[resource]
        line = msgspec.defstruct("Line", [("type", EventType), ("object", kind)], frozen=True)
        self._line: msgspec.json.Decoder[Any] = msgspec.json.Decoder(line)
        self._object: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
        page = msgspec.defstruct(
            "Page", [("metadata", _ListMeta), ("items", tuple[kind, ...] | None, None)], frozen=True
        )
        self._page: msgspec.json.Decoder[Any] = msgspec.json.Decoder(page)

    def line(self, line: bytes) -> WatchEvent:
        try:
            # Nearly all lines: those with a whole object.
            whole = self._line.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._unusual_line(line)
        if whole.type in _WITH_OBJECT:
            return self._with_object(whole.type, whole.object)
        return self._unusual_line(line)

    def _unusual_line(self, line: bytes) -> WatchEvent:
        """A line with less than an object, or with one that cannot be decoded."""
        raw = _line.decode(line)
        if raw.type is EventType.ERROR:
            return WatchEvent(raw.type, ObjectKey("", ""), status=_status.decode(raw.object))
        if raw.type in _WITH_OBJECT:
            try:
                return self._with_object(raw.type, self._object.decode(raw.object))
            except _MALFORMED as error:
                meta = _meta_of(raw.object)
                key = ObjectKey(meta.namespace, meta.name)
                return WatchEvent(
                    raw.type, key, meta.resource_version, unreadable=Unreadable(key, explain(error))
                )
        meta = _meta_of(raw.object)
        key = ObjectKey(meta.namespace, meta.name)
        if raw.type is EventType.DELETED and not key.name:
            unreadable = Unreadable(key, "metadata.name: missing from what was deleted")
            return WatchEvent(raw.type, key, meta.resource_version, unreadable=unreadable)
        end = meta.annotations is not None and meta.annotations.initial_events_end == "true"
        return WatchEvent(raw.type, key, meta.resource_version, initial_events_end=end)

    @staticmethod
    def _with_object(kind: EventType, found: Object) -> WatchEvent:
        return WatchEvent(kind, key_of(found), found.metadata.resource_version, object=found)

    def page(self, body: bytes) -> Page:
        try:
            page = self._page.decode(body)
        except _MALFORMED:
            return self._page_by_item(_raw_page.decode(body))
        return Page(page.metadata.resource_version, page.metadata.continue_token, page.items or (), ())

    def _page_by_item(self, page: _RawPage) -> Page:
        objects, unreadable = [], []
        for raw in page.items or ():
            try:
                objects.append(self._object.decode(raw))
            except _MALFORMED as error:
                item = _meta_of(raw)
                unreadable.append(Unreadable(ObjectKey(item.namespace, item.name), explain(error)))
        meta = page.metadata
        return Page(meta.resource_version, meta.continue_token, tuple(objects), tuple(unreadable))


def decode_status(body: bytes, http_status: int) -> Status:
    """Returns the Status in an error's body, or its text where a proxy has answered, with the HTTP status."""
    try:
        found = _status.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        found = Status(message=body[:200].decode(errors="replace"))
    return Status(http_status or found.code, found.reason, found.message)
