"""Requests to the page's application, in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from starlette.types import Message

from ebpfproxy.ui.app import make
from ebpfproxy.ui.live import Live

KEY = "key"
WITH_KEY = {"host": "127.0.0.1:8090", "authorization": f"Bearer {KEY}"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)


def ask(
    bpf_root: Path,
    cni_results: Path,
    path: str,
    headers: dict[str, str] | None = None,
    method: str = "GET",
) -> Answer:
    """Sends one request; ``path`` with its query, as in a URL."""
    return asyncio.run(_ask(bpf_root, cni_results, path, WITH_KEY if headers is None else headers, method))


async def _ask(bpf_root: Path, cni_results: Path, path: str, headers: dict[str, str], method: str) -> Answer:
    app = make(bpf_root, cni_results, KEY, Live(bpf_root))
    bare, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(bare),
        "raw_path": bare.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8090),
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *parts = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(part["body"] for part in parts))
