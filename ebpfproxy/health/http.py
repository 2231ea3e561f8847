"""The HTTP server of all health checks and pages: many ports and many slow clients in one thread.

asyncio's sockets do the waiting. What is read of a request is its first line and whether the connection goes
on, so that no parser of HTTP is needed beside these lines. The answer depends on the path alone, as in
kube-proxy, whose handlers ask for no method: HAProxy's health checks are OPTIONS by default.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from http.client import responses
from typing import NamedTuple

import msgspec

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: Seconds until an address that is in use is tried again.
RETRY_SECONDS = 5.0
#: A request and its answer may take so many seconds, each time on a connection that is kept.
CLIENT_SECONDS = 10.0
#: The patience at the end of servers that others than commands ask.
END_SECONDS = 2.0
_MOST_CLIENTS = 1024
_REQUEST_BYTES = 8192
#: A line may end without its CR (RFC 9112, 2.2), as people type it.
_LINE_END = re.compile(rb"\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
#: A token is what a method may be (RFC 9110, 5.6.2).
_METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ABSOLUTE = re.compile(r"https?://[^/]*/?(.*)", re.IGNORECASE)
_BACKLOG = 128
_ACCEPT_PAUSE_SECONDS = 0.05


class Answer(NamedTuple):
    """``headers`` beside those that every answer has."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


#: Answers a path, without its query. It is called in the server's thread: others wait meanwhile, but not for
#: an answer that is to come.
Respond = Callable[[str], Answer | Future[Answer]]
#: Decides about a client that has connected; without it the connection is closed at once.
Admit = Callable[[socket.socket], bool]


def text_answer(text: str, status: int = 200) -> Answer:
    return Answer(status, "text/plain; charset=utf-8", text.encode())


def json_answer(value: object, status: int = 200) -> Answer:
    return Answer(status, "application/json", msgspec.json.encode(value))


def listen(host: str, port: int) -> socket.socket:
    """``host`` ``::`` is every address of both families; empty, too, but IPv4's alone where there is no IPv6.

    Raises OSError.
    """
    # Where the kernel has no IPv6, create_server raises ValueError for dualstack_ipv6.
    if host in ("", "::") and socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
        except OSError as error:
            if host or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host or "0.0.0.0", port), family=family, backlog=_BACKLOG)


class HttpThread:
    """Serves listeners in a thread of its own. All methods may be called by any thread, before :meth:`start`
    too."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[socket.socket, asyncio.Task[None]] = {}
        #: The oldest comes first.
        self._clients: dict[asyncio.Task[None], None] = {}
        #: Those who have an answer to each of their requests.
        self._idle: set[asyncio.Task[None]] = set()
        self._is_ending = False
        self._patience = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 0.0) -> None:
        """Every listener is closed when this returns.

        Who has connected and waits for an answer gets it, if that takes no more than ``patience`` seconds.
        """
        self._patience = patience
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread.ident is None:
            self._run()
        else:
            self._thread.join()

    def add(self, listener: socket.socket, respond: Respond, admit: Admit = lambda _: True) -> None:
        """The listener belongs to the thread from now on."""
        listener.setblocking(False)
        self._loop.call_soon_threadsafe(self._add, listener, respond, admit)

    def remove(self, listener: socket.socket) -> None:
        """Connections are refused when this returns; those that are kept end soon after."""
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        self._loop.call_soon_threadsafe(self._remove, listener)

    def repeat(self, function: Callable[[], bool]) -> None:
        """Calls it in the thread every :data:`RETRY_SECONDS` until it returns True."""

        def call() -> None:
            if not function():
                self._loop.call_later(RETRY_SECONDS, call)

        self._loop.call_soon_threadsafe(self._loop.call_later, RETRY_SECONDS, call)

    # -- the thread

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._end_all())
        self._loop.close()

    async def _end_all(self) -> None:
        self._is_ending = True
        # The next process answers whoever connects from now on, if it has these sockets.
        for listener in self._tasks:
            self._loop.remove_reader(listener)
        for each in self._idle:
            each.cancel()
        if self._clients and self._patience:
            await asyncio.wait(list(self._clients), timeout=self._patience)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _add(self, listener: socket.socket, respond: Respond, admit: Admit) -> None:
        # A task that is cancelled before its first step could not close the listener itself.
        task = self._tasks[listener] = self._loop.create_task(self._serve(listener, respond, admit))
        task.add_done_callback(partial(self._close, listener))

    def _close(self, listener: socket.socket, _: asyncio.Task[None]) -> None:
        del self._tasks[listener]
        listener.close()

    def _remove(self, listener: socket.socket) -> None:
        self._tasks[listener].cancel()

    async def _serve(self, listener: socket.socket, respond: Respond, admit: Admit) -> None:
        """Accepts clients. When it is cancelled they are, too."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    client, _ = await self._loop.sock_accept(listener)
                except OSError:
                    # No descriptors are left: the listener stays readable, and the thread would spin.
                    await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                    continue
                if not admit(client):
                    client.close()
                    continue
                if len(self._clients) >= _MOST_CLIENTS:
                    # Clients that only hold connections must not keep a kubelet's probe out.
                    oldest = next(iter(self._clients))
                    del self._clients[oldest]
                    oldest.cancel()
                client.setblocking(False)
                task = group.create_task(self._exchange(client, respond))
                self._clients[task] = None
                task.add_done_callback(partial(self._end, client))

    def _end(self, client: socket.socket, task: asyncio.Task[None]) -> None:
        self._clients.pop(task, None)
        self._idle.discard(task)
        client.close()

    async def _exchange(self, client: socket.socket, respond: Respond) -> None:
        received, goes_on = b"", True
        task = asyncio.current_task()
        assert task is not None
        with suppress(OSError, TimeoutError):
            while goes_on:
                async with asyncio.timeout(CLIENT_SECONDS):
                    while (end := _HEAD_END.search(received)) is None and len(received) <= _REQUEST_BYTES:
                        chunk = await self._loop.sock_recv(client, _REQUEST_BYTES)
                        if not chunk:
                            return
                        self._idle.discard(task)
                        received += chunk
                if end is None:
                    answer, goes_on = _encoded(text_answer("", 431), closes=True), False
                else:
                    head, received = received[: end.start()], received[end.end() :]
                    answer, goes_on = await _answered(head, respond)
                async with asyncio.timeout(CLIENT_SECONDS):
                    await self._loop.sock_sendall(client, answer)
                if self._is_ending:
                    return
                if not received:
                    self._idle.add(task)


async def _answered(head: bytes, respond: Respond) -> tuple[bytes, bool]:
    """Returns the answer, and whether the connection goes on."""
    line, *headers = _LINE_END.split(head)
    words = line.split()
    if len(words) != 3 or not _METHOD.fullmatch(words[0]) or not words[2].startswith(b"HTTP/1."):
        return _encoded(text_answer("", 400), closes=True), False
    closes = words[2] == b"HTTP/1.0" or any(map(_ends_connection, headers))
    path = _path(words[1].decode("latin-1"))
    try:
        found = respond(path)
        answer = await asyncio.wrap_future(found) if isinstance(found, Future) else found
    except Exception as error:
        log.error("cannot answer an HTTP request", path=path, error=repr(error))
        answer = text_answer("internal error", 500)
    return _encoded(answer, closes=closes, has_body=words[0] != b"HEAD"), not closes


def _path(target: str) -> str:
    """Returns the path of a request's target, which may be a whole URL (RFC 9112, 3.2.2)."""
    before_query = target.partition("?")[0]
    return f"/{url[1]}" if (url := _ABSOLUTE.match(before_query)) else before_query


def _encoded(answer: Answer, *, closes: bool, has_body: bool = True) -> bytes:
    headers = (
        ("Content-Type", answer.content_type),
        ("X-Content-Type-Options", "nosniff"),
        *answer.headers,
        ("Date", formatdate(usegmt=True)),
        ("Content-Length", str(len(answer.body))),
        *((("Connection", "close"),) if closes else ()),
    )
    lines = [
        f"HTTP/1.1 {answer.status} {responses[answer.status]}",
        *(f"{name}: {value}" for name, value in headers),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + (answer.body if has_body else b"")


def _ends_connection(header: bytes) -> bool:
    """True for ``Connection: close``, or a body, which is not read and must not be taken for a request."""
    name, _, value = header.lower().partition(b":")
    name = name.strip()
    return name in (b"content-length", b"transfer-encoding") or (name == b"connection" and b"close" in value)
