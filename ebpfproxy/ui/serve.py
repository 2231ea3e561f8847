"""Serves the page until a signal ends it."""

from __future__ import annotations

import asyncio
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

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_REQUEST_SECONDS, self._end_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The transport has more than it can send."""
        super().pause_writing()
        self._cancel()
        self._deadline = self.loop.call_later(_TAKEN_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel()
        super().resume_writing()

    def _end_without_request(self) -> None:
        if self.cycle is None:
            self.transport.abort()

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, closing: Callable[[], None]) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Streams would be waited for.
        self._closing()
        super().handle_exit(sig, frame)


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
