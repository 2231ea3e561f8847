"""Who may ask the page, by host, method and key; and what it lets browsers do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ebpfproxy.ui import app
from ebpfproxy.ui.guard import is_own_host
from tests.ui.asgi import KEY, WITH_KEY, Answer, ask

NOWHERE = Path("/nowhere")
STATIC = Path(app.__file__).parent / "static"
DATA = ["status", "services", "services/shop/web", "clients", "explain", "check", "decisions"]


def get(path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Answer:
    return ask(NOWHERE, NOWHERE, path, headers, method)


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("127.0.0.1:8090", True),
        ("127.0.0.1", True),
        ("localhost", True),
        ("LocalHost:9", True),
        ("[::1]:8090", True),
        ("[::1]", True),
        ("10.0.0.7:8090", True),
        ("evil.example", False),
        ("evil.example:8090", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("127.1", False),
        ("0x7f000001", False),
        ("localhost@evil.example", False),
        ("localhost/evil.example", False),
        ("localhost:port", False),
        ("[::1", False),
        ("::1", False),
        ("", False),
        (None, False),
    ],
)
def test_only_localhost_and_addresses_are_hosts_of_the_page(host: str | None, good: bool) -> None:
    """A name that leads here may be anybody's (DNS rebinding)."""
    assert is_own_host(host) is good


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/status"])
def test_another_host_is_refused_even_with_the_key(path: str) -> None:
    answer = get(path, {**WITH_KEY, "host": "evil.example:8090"})
    assert answer.status == 421
    assert b"<html" not in answer.body


@pytest.mark.parametrize("path", DATA)
def test_data_needs_the_key(path: str) -> None:
    for authorization in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer ké"):
        headers = {"host": "localhost", "authorization": authorization}
        assert get(f"/api/{path}", headers).status == 401
    assert get(f"/api/{path}", {"host": "localhost"}).status == 401


@pytest.mark.parametrize("path", ["", "page.js", *(f"api/{each}" for each in DATA)])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT"])
def test_nothing_can_be_written(method: str, path: str) -> None:
    answer = get(f"/{path}", method=method)
    assert answer.status == 405
    # And no other origin may ask at all.
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/icon.svg", "/api/status", "/nothing"])
def test_every_answer_has_the_policy(path: str) -> None:
    headers = get(path).headers
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/page.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
def test_the_page_is_there_without_a_key(path: str, kind: str) -> None:
    answer = get(path, {"host": "localhost:8090"})
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert answer.body == (STATIC / (path[1:] or "index.html")).read_bytes()


def test_a_question_for_the_head_of_the_events_gets_no_events() -> None:
    answer = get("/api/decisions", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    "path", ["/../app.py", "/%2e%2e/app.py", "/static/page.js", "/app.py", "/api/nothing"]
)
def test_nothing_else_is_there(path: str) -> None:
    assert get(path).status == 404


def test_what_cannot_be_read_is_said() -> None:
    answer = get("/api/status")
    assert answer.status == 503
    assert "/nowhere" in answer.value["error"]


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_data_never_becomes_markup(path: Path) -> None:
    text = path.read_text()
    elsewhere = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w./-]*", text))
    assert elsewhere <= {"//www.w3.org/2000/svg"} | {"http://www.w3.org/2000/svg"}
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "srcdoc",
    ):
        assert word not in text
    # Neither handlers nor styles in attributes, which the policy forbids.
    assert not re.search(r"<[^>]+\s(?:on\w+|style)=", text)
