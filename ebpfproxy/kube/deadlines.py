"""Answers that are read until a deadline at most, however they come.

A socket's time-out begins anew with each byte, and does not end an answer that comes by drops.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import urllib3


class _Here(threading.local):
    """urllib3 hands nothing on to the objects that read answers; they are made in the thread that asks."""

    deadline = math.inf


_here = _Here()


@contextmanager
def until(deadline: float) -> Iterator[None]:
    """Ends the answers to what is sent within the context, by a pool of :func:`watching`.

    ``deadline`` is of ``time.monotonic()``. Reads raise TimeoutError from then on, also outside the context.
    """
    _here.deadline = deadline
    try:
        yield
    finally:
        _here.deadline = math.inf


def watching(pool: urllib3.PoolManager) -> urllib3.PoolManager:
    """Returns it, with connections that know :func:`until`."""
    kinds = pool.pool_classes_by_scheme.items()
    pool.pool_classes_by_scheme = {scheme: _watching(kind) for scheme, kind in kinds}
    return pool


def _watching(kind: type[urllib3.HTTPConnectionPool]) -> type[urllib3.HTTPConnectionPool]:
    """Proxies of each kind have connections of their own."""
    connection = type(kind.ConnectionCls.__name__, (kind.ConnectionCls,), {"response_class": _Answer})
    return type(kind.__name__, (kind,), {"ConnectionCls": connection})


class _Answer(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: object, **options: object) -> None:
        super().__init__(sock, *args, **options)  # type: ignore[arg-type]
        if _here.deadline < math.inf:
            self.fp = io.BufferedReader(_Reader(sock, self.fp.detach(), _here.deadline))


class _Reader(io.RawIOBase):
    """What a socket receives until the deadline."""

    def __init__(self, sock: socket.socket, received: io.RawIOBase, deadline: float) -> None:
        self._socket, self._received, self._deadline = sock, received, deadline
        self._seconds = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int | None:  # type: ignore[override]
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer was not complete in time")
        self._socket.settimeout(left if self._seconds is None else min(left, self._seconds))
        return self._received.readinto(buffer)

    def close(self) -> None:
        self._received.close()
        super().close()
