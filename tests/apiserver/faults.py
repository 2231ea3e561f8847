"""Faults on demand."""

from __future__ import annotations

import threading
from collections.abc import Mapping

#: Kinds that affect a running watch; all others affect a request when it arrives.
IN_STREAMS = ("cut", "silence", "garbage", "expire")


class Fault:
    """A fault of the next ``times`` matching requests.

    ``kind``: an HTTP status as text (with ``retry_after`` seconds); ``hang`` (no answer, connection open),
    ``close`` (no answer, closed), ``html`` (a proxy's error page with status 502), ``half`` (half of a list,
    or of a streaming list's initial events, then closed), ``slow`` (the whole answer, by 512 bytes every
    ``seconds``), ``late`` (the whole answer, after ``seconds``). For watches once they run: ``cut`` (half a line, then closed), ``silence`` (nothing more,
    connection open), ``garbage`` (a line that is no JSON), ``expire`` (410 inside the stream).

    ``resource`` and ``param`` (a query parameter that must be there: ``continue``, ``watch``) narrow it down.
    """

    def __init__(
        self,
        kind: str,
        *,
        times: int = 1,
        resource: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        seconds: float = 0.01,
    ) -> None:
        known = ("hang", "close", "html", "half", "slow", "late", *IN_STREAMS)
        if kind not in known and not kind.isdecimal():
            raise ValueError(f"no fault {kind!r}: an HTTP status or one of {', '.join(known)}")
        self.kind = kind
        self.times = times
        self.resource = resource
        self.param = param
        self.retry_after = retry_after
        self.seconds = seconds

    def matches(self, resource: str, params: Mapping[str, str], *, in_stream: bool) -> bool:
        return (
            (self.kind in IN_STREAMS) == in_stream
            and self.resource in (None, resource)
            and (self.param is None or self.param in params)
        )


class Faults:
    """Pending faults, the oldest first. It is thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, resource: str, params: Mapping[str, str], *, in_stream: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.matches(resource, params, in_stream=in_stream):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None
