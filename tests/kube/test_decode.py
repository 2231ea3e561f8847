"""Decodes recorded responses of a real API server."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from ebpfproxy.kube.decode import Decoder, EventType, decode_status
from ebpfproxy.kube.objects import ObjectKey, Resource
from ebpfproxy.kube.watch.lines import LineSplitter
from tests import recordings
from tests.data import RECORDINGS


def exchange(what: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = json.loads((RECORDINGS / "responses.json").read_text())
    return next(each for each in found if what in each["what"])


def test_a_paged_list() -> None:
    decoder = Decoder(Resource.SERVICES)
    first = decoder.page(exchange("first page")["body"].encode())
    assert len(first.objects) == 5
    assert first.continue_token
    second = decoder.page(exchange("second page")["body"].encode())
    assert second.resource_version == first.resource_version


def test_a_streaming_list_ends_with_its_bookmark() -> None:
    lines = exchange("streaming list")["body"].encode().splitlines()
    events = [Decoder(Resource.ENDPOINTSLICES).line(line) for line in lines]
    assert {event.type for event in events[:-1]} == {EventType.ADDED}
    assert [event.initial_events_end for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].resource_version == "262"


def test_410_inside_a_stream() -> None:
    line = exchange("too old")["body"].encode().strip()
    event = Decoder(Resource.SERVICES).line(line)
    assert event.type is EventType.ERROR
    assert event.status is not None
    assert (event.status.code, event.status.reason) == (410, "Expired")


@pytest.mark.parametrize(
    ("what", "code"), [("no credentials", 403), ("wrong credentials", 401), ("unknown", 404)]
)
def test_error_bodies(what: str, code: int) -> None:
    status = decode_status(exchange(what)["body"].encode(), code)
    assert status.code == code
    assert status.reason


def test_every_line_of_the_watches_decodes() -> None:
    decoders = {resource: Decoder(resource) for resource in Resource}
    for resource, line in recordings.watch_lines():
        event = decoders[resource].line(line)
        assert event.unreadable is None
        assert event.resource_version


def test_events_applied_to_the_initial_lists_give_the_final_lists() -> None:
    decoders = {resource: Decoder(resource) for resource in Resource}
    stored: dict[Resource, dict[ObjectKey, object]] = {}
    for resource, items in recordings.lists("initial").items():
        page = decoders[resource].page(
            json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode()
        )
        stored[resource] = {
            ObjectKey(getattr(each.metadata, "namespace", ""), each.metadata.name): each
            for each in page.objects
        }
    for resource, line in recordings.watch_lines():
        event = decoders[resource].line(line)
        if event.type is EventType.DELETED:
            del stored[resource][event.key]
        elif event.object is not None:
            stored[resource][event.key] = event.object
    for resource, items in recordings.lists("final").items():
        page = decoders[resource].page(json.dumps({"metadata": {}, "items": items}).encode())
        assert sorted(map(repr, stored[resource].values())) == sorted(map(repr, page.objects))


def test_html_page_of_a_proxy_becomes_a_status() -> None:
    status = decode_status(b"<html>Bad Gateway</html>", 502)
    assert status.code == 502
    assert "Bad Gateway" in status.message


@pytest.mark.parametrize("body", [b'{"message":"\xff"}', b'{"x":' + b"[" * 100_000, b'{"code":200}', b""])
def test_any_error_body_becomes_a_status_with_the_http_code(body: bytes) -> None:
    assert decode_status(body, 403).code == 403


def test_invalid_json_is_a_stream_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        Decoder(Resource.SERVICES).line(b"nonsense")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_from_chunks_of_any_size(size: int) -> None:
    data = b'{"a":1}\n\r\n{"b":2}\r\n' + b"x" * 5000 + b"\nrest"
    splitter = LineSplitter()
    found = [line for i in range(0, len(data), size) for line in splitter.feed(data[i : i + size])]
    assert found == [b'{"a":1}', b'{"b":2}', b"x" * 5000]
    assert splitter.pending


@pytest.mark.parametrize(
    "item",
    [{"spec": {}}, {"metadata": None, "spec": {}}, {"metadata": {"name": 5}, "spec": {}}, 5, None, []],
    ids=repr,
)
def test_object_without_valid_metadata_is_reported_without_a_name(item: object) -> None:
    decoder = Decoder(Resource.SERVICES)
    for kind in ("ADDED", "MODIFIED", "DELETED"):
        event = decoder.line(json.dumps({"type": kind, "object": item}).encode())
        assert event.unreadable is not None
        assert event.key == ObjectKey("", "")
    good = {"metadata": {"name": "good", "namespace": "n"}, "spec": {}}
    page = decoder.page(json.dumps({"metadata": {"resourceVersion": "7"}, "items": [item, good]}).encode())
    assert [each.metadata.name for each in page.objects] == ["good"]
    assert [each.key for each in page.unreadable] == [ObjectKey("", "")]
    assert page.resource_version == "7"


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        ({"annotations": []}, "metadata.annotations"),
        ({"labels": {"service.kubernetes.io/service-proxy-name": 5}}, "metadata.labels"),
        ({"creationTimestamp": 5}, "metadata.creationTimestamp"),
    ],
)
def test_object_with_other_invalid_metadata_is_reported_by_name(metadata: dict[str, Any], field: str) -> None:
    item = {"metadata": {"name": "a", "namespace": "n", "resourceVersion": "5", **metadata}, "spec": {}}
    event = Decoder(Resource.SERVICES).line(json.dumps({"type": "ADDED", "object": item}).encode())
    assert (event.key, event.resource_version) == (ObjectKey("n", "a"), "5")
    assert event.unreadable is not None
    assert event.unreadable.why.startswith(field)


def test_every_recorded_response_is_decoded() -> None:
    """Lists are decoded as pages, streams by line, and errors as a Status with the response's code."""
    for each in json.loads((RECORDINGS / "responses.json").read_text()):
        body: bytes = each["body"].encode()
        path, _, query = each["request"].removeprefix("GET ").partition("?")
        if each["status"] != 200:
            assert decode_status(body, 0).code == each["status"]
            continue
        decoder = Decoder(Resource(path.rpartition("/")[2]))
        if "watch=true" not in query:
            assert decoder.page(body).unreadable == ()
            continue
        splitter = LineSplitter()
        events = [decoder.line(line) for line in splitter.feed(body)]
        assert not splitter.pending
        assert all(event.unreadable is None for event in events)
