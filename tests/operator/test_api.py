"""Servers that answer in place of an API server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpfproxy.health.http import text_answer
from ebpfproxy.health.server import HttpServer
from ebpfproxy.operator.api import Api, ApiError

#: The text that the server answers with.
ANSWER = [""]


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    paths = ("/api/v1/nodes", "/api/v1/nodes/a")
    server = HttpServer("other", "127.0.0.1:0", {path: lambda: text_answer(ANSWER[0]) for path in paths})
    server.start()
    yield Api.from_options(None, f"http://127.0.0.1:{server.port}")
    server.stop()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "null",
        "[]",
        '{"items": [null]}',
        '{"items": [{"metadata": null}]}',
        '{"items": {"a": 1}}',
    ],
)
def test_a_list_of_what_are_no_objects_is_one_line(api: Api, text: str) -> None:
    """A proxy may answer anything with 200; commands rely on metadata alone."""
    ANSWER[0] = text
    with pytest.raises(ApiError, match="/api/v1/nodes: not an API server's answer: "):
        api.list("Node", "")


@pytest.mark.parametrize("text", ["{}", '{"metadata": []}', '{"kind": "Status"}'])
def test_what_is_no_object_is_one_line(api: Api, text: str) -> None:
    ANSWER[0] = text
    with pytest.raises(
        ApiError, match="/api/v1/nodes/a: not an API server's answer: no objects with metadata"
    ):
        api.get("Node", "", "a")


def test_objects_are_returned_as_they_are(api: Api) -> None:
    ANSWER[0] = '{"items": [{"metadata": {"name": "a"}, "new": 1}]}'
    assert api.list("Node", "") == [{"metadata": {"name": "a"}, "new": 1}]
    ANSWER[0] = '{"items": null}'
    assert api.list("Node", "") == []
