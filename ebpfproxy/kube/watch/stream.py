"""Decodes the answer of one watch request into events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import msgspec
import urllib3

from ebpfproxy.kube import failures
from ebpfproxy.kube.decode import Decoder, WatchEvent
from ebpfproxy.kube.failures import Failure
from ebpfproxy.kube.watch import chunks
from ebpfproxy.kube.watch.lines import LineSplitter

_CHUNK = 64 * 1024


class EventStream:
    """Read by one thread; :meth:`abort` is for any other."""

    def __init__(self, response: urllib3.BaseHTTPResponse, decoder: Decoder) -> None:
        self._response = response
        self._decoder = decoder
        self._began = time.monotonic()
        #: True once an event came, other than an ERROR of the server.
        self.heard = False
        #: The Unix time of the latest bytes.
        self.last_bytes: float | None = None

    @property
    def age(self) -> float:
        """Seconds since the server accepted the request."""
        return time.monotonic() - self._began

    def set_read_timeout(self, seconds: float) -> None:
        """Holds for later reads. A connection that the server will close afterwards keeps the first one."""
        sock = getattr(self._response.connection, "sock", None)
        if sock is not None:
            sock.settimeout(seconds)

    def abort(self) -> None:
        """Ends a read that waits; the reader sees a failure or the end."""
        # The stream may end by itself, or be closed by its reader, at the same moment.
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            self._response.shutdown()

    def events(self) -> Iterator[tuple[WatchEvent, float]]:
        """Yields each event with the ``time.monotonic()`` at which its bytes were read.

        Ends where the server ends the stream in order. Raises Failure (``truncated`` within a line, ``idle``
        after the read timeout, a Status' code, …) and Expired.
        """
        splitter = LineSplitter()
        try:
            for chunk in self._chunks():
                received = time.monotonic()
                self.last_bytes = time.time()
                for line in splitter.feed(chunk):
                    event = self._decode(line)
                    self.heard = True
                    yield event, received
        finally:
            self._response.close()
        if splitter.pending:
            raise Failure("truncated", "the stream ended within a line")

    def _chunks(self) -> Iterator[bytes]:
        """Bytes as they come. An API server sends each event as a chunk of its own."""
        response = self._response
        try:
            if response.chunked:
                yield from chunks.content(response, _CHUNK)
            else:
                while chunk := response.read1(_CHUNK):
                    yield chunk
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise failures.of_exception(error) from error

    def _decode(self, line: bytes) -> WatchEvent:
        try:
            event = self._decoder.line(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Failure("garbled", f"a line cannot be decoded: {error}") from error
        if event.status is not None:
            raise failures.of_status(event.status)
        return event
