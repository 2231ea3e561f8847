"""Connections that only occupy the page end, whoever made them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import ServerState

from ebpfproxy.ui import serve

_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
_WITH_BODY = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf"


async def _endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with more than any buffer has room for, until nobody is there."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
        await asyncio.sleep(0)


async def _short(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def _connected(state: ServerState, app: ASGIApp = _endless) -> AsyncIterator[socket.socket]:
    config = uvicorn.Config(app, http=serve._Connection, ws="none", lifespan="off", log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: serve._Connection(config, state, {}), "127.0.0.1", 0)
    client = socket.create_connection(server.sockets[0].getsockname())
    client.setblocking(False)
    try:
        async with asyncio.timeout(30):
            while not state.connections:
                await asyncio.sleep(0.01)
            yield client
    finally:
        client.close()
        server.close()
        for task in state.tasks:
            task.cancel()


@pytest.mark.parametrize("sent", [b"", _REQUEST[:-1]])
def test_one_without_a_request_ends(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(serve, "_REQUEST_SECONDS", 0.1)

    async def run() -> bytes:
        async with _connected(ServerState()) as client:
            client.send(sent)
            return await asyncio.get_running_loop().sock_recv(client, 1)

    assert asyncio.run(run()) == b""


@pytest.mark.parametrize("sent", [_REQUEST + _REQUEST[:-1], _WITH_BODY])
def test_one_with_half_of_a_later_request_ends(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Or with half of a body that nobody reads: an answer was given already."""
    monkeypatch.setattr(serve, "_REQUEST_SECONDS", 0.1)

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        async with _connected(ServerState(), _short) as client:
            client.send(sent)
            found = b""
            while data := await loop.sock_recv(client, 4096):
                found += data
            return found

    try:
        found = asyncio.run(run())
    except ConnectionResetError:
        # What it has sent was not read.
        return
    assert found.endswith(b"ok")


def test_one_that_takes_nothing_of_its_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_TAKEN_SECONDS", 0.1)
    state = ServerState()

    async def run() -> None:
        async with _connected(state) as client:
            client.send(_REQUEST)
            while state.connections:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert not state.connections


def test_one_that_takes_its_answer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it waited long with its next request, or takes more than the time that a pause may last."""
    monkeypatch.setattr(serve, "_REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(serve, "_TAKEN_SECONDS", 30)

    async def run() -> None:
        async with _connected(ServerState()) as client:
            client.send(_REQUEST)
            loop = asyncio.get_running_loop()
            end = loop.time() + 0.5
            while loop.time() < end:
                assert await loop.sock_recv(client, 1 << 20)

    asyncio.run(run())


def test_a_busy_server_ends_without_complaints(caplog: pytest.LogCaptureFixture) -> None:
    """A request that waits for the agent is cancelled, and that is no error."""

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        config = uvicorn.Config(slow, http=serve._Connection, ws="none", lifespan="off", log_config=None)
        config.timeout_graceful_shutdown = 0
        server = serve._Server(config, lambda: None)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            running = asyncio.create_task(server.serve([listener]))
            async with asyncio.timeout(30):
                while not server.started:
                    await asyncio.sleep(0.01)
                with socket.create_connection(address) as client:
                    client.send(_REQUEST)
                    while not server.server_state.tasks:
                        await asyncio.sleep(0.01)
                    server.should_exit = True
                    await running

    with caplog.at_level("WARNING"):
        asyncio.run(run())
    assert not [
        record for record in caplog.records if record.name.startswith(("asyncio", "uvicorn", "ebpfproxy.ui"))
    ]
