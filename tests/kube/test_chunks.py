"""Chunked content, as it comes from the socket."""

from __future__ import annotations

from itertools import pairwise

import pytest
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.watch.chunks import ChunkedContent, content
from tests.apiserver import ApiServer

_CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=8)


def coded(chunks: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x%s\r\n%s\r\n" % (len(each), extension, each) for each in chunks)
    return body + b"0\r\n" + trailers + b"\r\n"


def fed(decoder: ChunkedContent, data: bytes, cuts: list[int]) -> bytes:
    """Feeds the data in pieces that end at ``cuts``."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = (data[start:end] for start, end in pairwise(places))
    return b"".join(map(decoder.feed, pieces))


@given(
    _CHUNKS,
    st.sampled_from([b"", b";name=value", b" "]),
    st.sampled_from([b"", b"Name: value\r\n", b"One: 1\r\nTwo: 2\r\n"]),
    st.lists(st.integers(0, 1000), max_size=30),
)
def test_content_is_the_same_however_it_is_cut(
    chunks: list[bytes], extension: bytes, trailers: bytes, cuts: list[int]
) -> None:
    decoder = ChunkedContent()
    assert fed(decoder, coded(chunks, extension, trailers), cuts) == b"".join(chunks)
    assert decoder.is_complete
    assert not decoder.missing


@given(_CHUNKS, st.integers(0, 1000))
def test_content_that_is_cut_off_is_not_complete(chunks: list[bytes], at: int) -> None:
    data = coded(chunks)
    decoder = ChunkedContent()
    assert b"".join(chunks).startswith(decoder.feed(data[: at % len(data)]))
    assert not decoder.is_complete


def test_missing_bytes_of_a_chunk_are_counted() -> None:
    decoder = ChunkedContent()
    assert decoder.feed(b"5\r\nab") == b"ab"
    assert decoder.missing == 3
    assert decoder.feed(b"cde") == b"cde"
    assert not decoder.missing


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"-1\r\n",
        b"many\r\n",
        b"3\r\nabcd\r\n",
        b"1;" + b"x" * 70_000,
        b"0\r\nName: " + b"x" * 70_000,
    ],
)
def test_what_is_no_chunk_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|longer than|below 0|without an end"):
        ChunkedContent().feed(data)


def test_connection_is_used_again_once_a_stream_has_ended(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is read from the socket itself, as far as urllib3 lets us: see ``content``."""
    monkeypatch.setattr(urllib3.HTTPResponse, "read_chunked", None)
    connection = ApiConnection.from_options(None, server.url)
    params = {"watch": "true", "sendInitialEvents": "true", "timeoutSeconds": "0"}
    ports = set()
    for _ in range(3):
        response = connection.get("/api/v1/services", params, read_seconds=10)
        used = response.connection
        assert isinstance(used, urllib3.connection.HTTPConnection)
        assert used.sock is not None
        ports.add(used.sock.getsockname()[1])
        assert b"".join(content(response, 1000)).count(b'"ADDED"') == 2
        response.close()
    assert len(ports) == 1
