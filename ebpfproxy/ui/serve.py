"""Serves the page until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ebpfproxy.services.model import format_endpoint
from ebpfproxy.services.values import parse_address
from ebpfproxy.ui.app import make
from ebpfproxy.ui.live import Live

#: Requests at once, with streams. A page has two; more are told to come again.
_MOST_REQUESTS = 64
_SHUTDOWN_SECONDS = 5
#: Connections end that send no request for so long, or take nothing of an answer.
_REQUEST_SECONDS, _TAKEN_SECONDS = 10.0, 30.0


class _Connection(H11Protocol):
    """Ends connections that only occupy the page, of whoever can connect."""

    _awaited: asyncio.TimerHandle | None = None
    _taken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for each in (self._awaited, self._taken):
            if each is not None:
                each.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        # First: it may begin the next request, whose answer may be complete at once.
        self._await_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The transport has more than it can send."""
        super().pause_writing()
        self._taken = self.loop.call_later(_TAKEN_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._taken is not None:
            self._taken.cancel()
        super().resume_writing()

    def _await_request(self) -> None:
        """A whole one, which may take long to come in parts; also the body of the last one counts."""
        if self._awaited is not None:
            self._awaited.cancel()
        self._awaited = self.loop.call_later(_REQUEST_SECONDS, self._end_without_request)

    def _end_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Streams would be waited for.
        self._closing()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A check that waits for the agent is cancelled, which is no error that is worth a traceback.
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        await super().shutdown(sockets)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    is_of_request = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_of_request and not record.getMessage().startswith("Cancel ")


def serve(bpf_root: Path, cni_results: Path, address: str, port: int, ready: Callable[[str], None]) -> None:
    """Returns after SIGINT or SIGTERM. ``ready`` is told the page's address. Raises OSError."""
    packed = parse_address(address)
    assert packed is not None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family)
    key, live = secrets.token_urlsafe(24), Live(bpf_root)
    config = uvicorn.Config(
        make(bpf_root, cni_results, key, live),
        loop="asyncio",
        http=_Connection,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_REQUESTS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    with listener:
        ready(f"http://{format_endpoint(packed, listener.getsockname()[1])}/#key={key}")
        # Uvicorn raises the signal again once it has ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            _Server(config, live.end_streams).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            live.end_streams()
            live.wait()
