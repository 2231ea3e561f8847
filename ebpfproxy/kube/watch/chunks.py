"""The content of a chunked response (RFC 9112, 7.1), all that has come at a time.

An API server sends each event as a chunk of its own. urllib3 reads them one by one, which takes as long as to
decode them.
"""

from __future__ import annotations

import http.client
import io
import ssl
from collections.abc import Iterator

import urllib3

_END = b"\r\n"
#: Extensions of a size, or trailers, may be this long; no API server sends any.
_LONGEST = 1 << 16


class ChunkedContent:
    """Takes the coding off bytes as they come."""

    def __init__(self) -> None:
        self._rest = b""
        #: Bytes that the current chunk still has.
        self._left = 0
        #: True where the end of a chunk's line comes next.
        self._is_full = False
        #: True once the last chunk and what follows it have come.
        self.is_complete = False

    @property
    def missing(self) -> int:
        """How many bytes a chunk lacks that has begun."""
        return self._left

    def feed(self, data: bytes) -> bytes:
        """The content in these bytes. Raises ValueError for what is no chunk."""
        data, self._rest = self._rest + data, b""
        parts: list[bytes] = []
        at, end = 0, len(data)
        while at < end and not self.is_complete:
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                self._is_full = not self._left
                continue
            stop = data.find(_END, at)
            if stop < 0:
                self._keep(data[at:])
                break
            line = data[at:stop]
            at = stop + len(_END)
            if self._is_full:
                if line:
                    raise ValueError("a chunk longer than its size")
                self._is_full = False
            else:
                self._left = int(line.partition(b";")[0], 16)
                if self._left < 0:
                    raise ValueError("a size below 0")
                if not self._left:
                    # Trailers, if any, end with an empty line.
                    self.is_complete = data.find(_END + _END, stop) >= 0
                    if not self.is_complete:
                        self._keep(data[stop - len(line) :])
                    break
        return b"".join(parts)

    def _keep(self, rest: bytes) -> None:
        if len(rest) > _LONGEST:
            raise ValueError("a line without an end")
        self._rest = rest


def content(response: urllib3.BaseHTTPResponse, most: int) -> Iterator[bytes]:
    """Yields what has come, up to ``most`` bytes at a time. Raises what urllib3 does."""
    received = getattr(response, "_fp", None)
    stream = getattr(received, "fp", None)
    if not isinstance(stream, io.BufferedReader) or "content-encoding" in response.headers:
        yield from response.read_chunked(most, decode_content=True)
        return
    chunks = ChunkedContent()
    while not chunks.is_complete:
        data = _read(stream, most)
        if not data:
            if chunks.missing:
                cut = http.client.IncompleteRead(b"", chunks.missing)
                raise urllib3.exceptions.ProtocolError(f"Connection broken: {cut!r}", cut)
            raise urllib3.exceptions.ProtocolError("Response ended prematurely")
        if found := chunks.feed(data):
            yield found
    # The connection is used again.
    assert isinstance(received, http.client.HTTPResponse)
    received.close()
    response.release_conn()


def _read(stream: io.BufferedReader, most: int) -> bytes:
    try:
        return stream.read1(most)
    except TimeoutError:
        raise
    except ssl.SSLError as error:
        raise urllib3.exceptions.SSLError(error) from error
    except OSError as error:
        raise urllib3.exceptions.ProtocolError(f"Connection broken: {error!r}", error) from error
