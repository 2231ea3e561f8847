"""Sends events in a thread of its own, from a bounded queue and at a limited rate: nothing waits for it.

Events that all nodes send are sent after a random time: later nodes are told that the event exists.

``kubectl describe`` finds a Service's events by its uid, which is not kept in memory for ten thousand of
them: it is asked for, with the ``list`` that the role grants anyway.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from ebpfproxy.kube.backoff import Backoff
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.events.correlation import Correlator
from ebpfproxy.kube.events.event import KubeEvent, Reference, Series, namespace_of, to_api
from ebpfproxy.kube.failures import Failure
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_PATHS = {
    "Service": "/api/v1/namespaces/{}/services",
    "EndpointSlice": "/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices",
}
_EVENTS = "/apis/events.k8s.io/v1/namespaces/{}/events"
_SERVICE_NAME = "kubernetes.io/service-name"
_READ_SECONDS = 10.0
_MOST_BYTES = 1 << 20
#: client-go's limit for an event (maxTriesPerEvent).
_TRIES = 12


class Pace(msgspec.Struct, frozen=True):
    """Times in seconds; ``qps`` is events a second."""

    qps: float = 1.0
    burst: int = 10
    queue: int = 256
    #: An event that all nodes send is sent within this time.
    spread: float = 10.0
    backoff_first: float = 2.0
    backoff_most: float = 60.0
    #: After a 403 in a namespace nothing is sent there for so long.
    forbidden: float = 600.0


class _Waiting(NamedTuple):
    """An entry of the queue, sorted by its fields; ``number`` is unique."""

    due: float
    number: int
    event: KubeEvent
    series: Series
    tries: int = 0


class _Meta(msgspec.Struct):
    uid: str = ""
    labels: dict[str, str] | None = None


class _Item(msgspec.Struct):
    metadata: _Meta


class _Items(msgspec.Struct):
    items: tuple[_Item, ...] | None = None


_ITEMS = msgspec.json.Decoder(_Items)


class _Over(Exception):  # noqa: N818 - a result, not an error
    """``result`` is one of ``kube.events.event.RESULTS``; ``why`` is logged once for each ``kind``."""

    def __init__(self, result: str, kind: str = "", why: str = "") -> None:
        super().__init__(why)
        self.result = result
        self.kind = kind


class Recorder:
    """:meth:`record` may be called by any thread, at once and at any time."""

    def __init__(
        self,
        connection: ApiConnection,
        node: str,
        count: Callable[[str], None],
        pace: Pace | None = None,
    ) -> None:
        """``count`` is told of each of ``kube.events.event.RESULTS``."""
        self._connection = connection
        self._node = node
        self._count = count
        self._pace = pace or Pace()
        self._limit = RateLimit(self._pace.qps, self._pace.burst)
        self._backoff = Backoff(self._pace.backoff_first, self._pace.backoff_most)
        self._correlator = Correlator()
        self._changed = threading.Condition()
        self._queue: list[_Waiting] = []
        self._numbers = itertools.count()
        self._not_before = 0.0
        self._forbidden: dict[str, float] = {}
        self._said: set[str] = set()
        self._stopping = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def stop(self) -> None:
        """Does not wait: events in the queue are dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def record(self, event: KubeEvent) -> None:
        now = time.monotonic()
        with self._changed:
            # An event that is dropped must not count as sent.
            is_full = len(self._queue) >= self._pace.queue
            taken = "dropped" if is_full else self._correlator.take(event, monotonic=now, unix=time.time())
            if isinstance(taken, Series):
                spread = 0.0 if event.of_node else random.uniform(0, self._pace.spread)  # noqa: S311
                heapq.heappush(self._queue, _Waiting(now + spread, next(self._numbers), event, taken))
                self._changed.notify()
                return
        self._count(taken)

    # -- the thread

    def _run(self) -> None:
        while (waiting := self._next()) is not None:
            try:
                self._send(waiting.event, waiting.series)
            except _Over as over:
                self._backoff.reset()
                self._end(over.result, over.kind, str(over))
            except Failure as failure:
                self._retry(waiting, failure)
            except Exception as error:
                # A fault in this code must not end the thread.
                self._end("failed", type(error).__name__, repr(error))

    def _next(self) -> _Waiting | None:
        """Waits for the next that is due; None at the end."""
        with self._changed:
            while not self._stopping:
                due = max(self._queue[0].due, self._not_before) if self._queue else None
                now = time.monotonic()
                if due is not None and due <= now:
                    return heapq.heappop(self._queue)
                self._changed.wait(None if due is None else due - now)
        return None

    def _end(self, result: str, kind: str, why: str) -> None:
        self._count(result)
        if why and kind not in self._said:
            self._said.add(kind)
            log.warning("failed to send event; further errors suppressed", result=result, error=why)

    def _retry(self, waiting: _Waiting, failure: Failure) -> None:
        """Puts it back to the end of the queue. Everything waits, since others would fail the same way."""
        if waiting.tries + 1 >= _TRIES:
            self._end("failed", failure.reason, f"{_TRIES} tries: {failure}")
            return
        pause = max(failure.retry_after or 0.0, self._backoff.next())
        with self._changed:
            self._not_before = time.monotonic() + pause
            heapq.heappush(self._queue, waiting._replace(due=self._not_before, tries=waiting.tries + 1))

    def _send(self, event: KubeEvent, series: Series) -> None:
        """Raises _Over with the result, and Failure for what may be tried again."""
        namespace = namespace_of(event.regarding)
        if time.monotonic() < self._forbidden.get(namespace, 0.0):
            raise _Over("forbidden")
        self._limit.wait()
        regarding, related = self._resolve(event.regarding)
        body = to_api(event, series, self._node, regarding=regarding, related=related)
        try:
            self._call("POST", _EVENTS.format(quote(namespace)), body=msgspec.json.encode(body))
        except Failure as failure:
            if failure.status == HTTPStatus.CONFLICT:
                raise _Over("exists") from failure
            raise
        raise _Over("created")

    def _resolve(self, about: Reference) -> tuple[Reference, Reference | None]:
        """Returns the object with its uid; for a slice its Service, and the slice as the related object."""
        if about.kind == "Node":
            return about, None
        meta = self._look_up(about)
        known = msgspec.structs.replace(about, uid=meta.uid)
        service = (meta.labels or {}).get(_SERVICE_NAME) if about.kind == "EndpointSlice" else None
        if service is None:
            return known, None
        owner = Reference("Service", about.namespace, service)
        return msgspec.structs.replace(owner, uid=self._look_up(owner).uid), known

    def _look_up(self, about: Reference) -> _Meta:
        # Version 0 is answered from the server's cache, at next to no cost.
        params = {"fieldSelector": f"metadata.name={about.name}", "resourceVersion": "0"}
        body = self._call("GET", _PATHS[about.kind].format(quote(about.namespace)), params)
        items = _ITEMS.decode(body).items
        if not items:
            raise _Over("gone")
        return items[0].metadata

    def _call(
        self, method: str, path: str, params: dict[str, str] | None = None, body: bytes | None = None
    ) -> bytes:
        """Raises Failure for what may be tried again and for a conflict, _Over for any other answer."""
        try:
            return self._connection.call(
                method, path, params or {}, body=body, read_seconds=_READ_SECONDS, most_bytes=_MOST_BYTES
            ).body
        except Failure as failure:
            status = failure.status
            if status in (0, 401, 409, 429) or status >= 500:
                raise
            why = f"{method} {path}: {failure}"
            if status != HTTPStatus.FORBIDDEN:
                raise _Over("rejected", str(status), why) from failure
            # Other namespaces are not affected: this one may be terminating, or full.
            now = time.monotonic()
            self._forbidden = {name: until for name, until in self._forbidden.items() if until > now}
            self._forbidden[path.split("/")[-2]] = now + self._pace.forbidden
            raise _Over("forbidden", "403", why) from failure
