"""List and watch: keeps whoever listens up to date with one resource, through everything that fails.

Theory of operation. A *list* gives all objects and the resourceVersion at which that was true; a *watch*
from there gives every change after it. A stream that ends, for whatever reason, is taken up again at the
last resourceVersion seen. Only when the server has forgotten that (410) everything is listed again, and
delivered as one ``Replaced`` when it is complete: nobody sees a half-listed cluster.

The list is a streaming one where the server has it (KEP-3157), else paged. Failures back off exponentially
with jitter; while they last, what was delivered stays in force. One log line says that it fails, and one
that it works again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import msgspec
import urllib3

from ebpfproxy.kube.client import ApiConnection, ConfigError
from ebpfproxy.kube.decode import Decoder, EventType, Status, Unreadable, WatchEvent, decode_status
from ebpfproxy.kube.lines import LineSplitter
from ebpfproxy.kube.status import SourceStatus, State
from ebpfproxy.logs import get_logger
from ebpfproxy.objects import Changed, Deleted, Event, ObjectKey, Reduce, Replaced, Resource, key_of

log = get_logger(__name__)

PATHS = {
    Resource.SERVICES: "/api/v1/services",
    Resource.ENDPOINTSLICES: "/apis/discovery.k8s.io/v1/endpointslices",
    Resource.NODES: "/api/v1/nodes",
}

_PAGE_LIMIT = 500
_CHUNK = 256 * 1024
_SHORT_WATCH_SECONDS = 1.0


class Timing(msgspec.Struct, frozen=True):
    """Seconds. As client-go's reflector, where it has the same."""

    backoff_first: float = 0.8
    backoff_most: float = 30.0
    #: A watch ends after a random time between this and its double.
    watch: float = 300.0
    #: Bookmarks come every minute: a stream without a byte for longer is dead, whatever TCP says.
    idle: float = 150.0
    #: The first bytes of a list, or the next of its initial events.
    list_wait: float = 30.0


class _Failure(Exception):  # noqa: N818 - a failure to go on, not an error of ours
    """``reason`` is a metric label."""

    def __init__(self, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class _Expired(Exception):  # noqa: N818
    """The resourceVersion is too old (410): list again."""


class _NoStreamingList(Exception):  # noqa: N818
    """The server does not know sendInitialEvents, or never finishes them."""


class Reflector:
    """One resource. :meth:`run` is a thread's main function; ``status`` may be read by any thread."""

    def __init__(
        self,
        connection: ApiConnection,
        resource: Resource,
        sink: Callable[[Event], None],
        *,
        reduce: Reduce = lambda each: each,
        label_selector: str = "",
        field_selector: str = "",
        timing: Timing | None = None,
    ) -> None:
        self._connection = connection
        self._resource = resource
        self._sink = sink
        self._reduce = reduce
        self._timing = timing or Timing()
        self._selectors = {
            name: value
            for name, value in (("labelSelector", label_selector), ("fieldSelector", field_selector))
            if value
        }
        self._decoder = Decoder(resource)
        self._stop = threading.Event()
        self._response: urllib3.BaseHTTPResponse | None = None
        self._version = ""
        self._streaming_list = True
        self._backoff = 0.0
        self._unreadable: dict[ObjectKey, str] = {}
        self.status = SourceStatus(resource=resource, since=time.time())

    def start(self) -> None:
        threading.Thread(target=self.run, name=f"watch-{self._resource}", daemon=True).start()

    def stop(self) -> None:
        """Ends :meth:`run` soon, also while it waits for bytes."""
        self._stop.set()
        response = self._response
        if response is not None:
            response.shutdown()

    def run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if self._version:
                    self._watch()
                elif self._streaming_list:
                    self._stream_list()
                else:
                    self._page_list()
            except _Expired:
                log.info("watch expired, listing again", resource=str(self._resource))
                self._count("expired")
                self._version = ""
            except _NoStreamingList as error:
                log.info("no streaming list, using pages", resource=str(self._resource), why=str(error))
                self._streaming_list = False
            except _Failure as failure:
                if not self._stop.is_set():
                    self._failed(failure)
                    self._pause(failure.retry_after)
            else:
                if time.monotonic() - began < _SHORT_WATCH_SECONDS:
                    # A server that ends watches at once would be asked without end.
                    self._pause(None)

    # -- state

    def _update(self, **changes: object) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)

    def _count(self, reason: str) -> None:
        failures = dict(self.status.failures)
        failures[reason] = failures.get(reason, 0) + 1
        self._update(failures=failures)

    def _failed(self, failure: _Failure) -> None:
        self._count(failure.reason)
        if self.status.state is not State.FAILING:
            log.warning(
                "watch is failing, what is known stays in force",
                resource=str(self._resource),
                reason=failure.reason,
                error=str(failure),
            )
            self._update(state=State.FAILING, since=time.time())
        self._update(error=str(failure))

    def _connected(self) -> None:
        """The server has accepted; a quiet watch may have nothing to say for a while."""
        if self.status.state is not State.CONNECTED:
            log.info("watch is connected", resource=str(self._resource), server=self._connection.host)
            self._update(state=State.CONNECTED, since=time.time(), error=None)

    def _received(self) -> None:
        """Bytes of a good answer came: it is worth trying again at once when they end."""
        self._backoff = 0.0
        self._update(last_event=time.time())

    def _pause(self, retry_after: float | None) -> None:
        timing = self._timing
        self._backoff = min(timing.backoff_most, max(timing.backoff_first, self._backoff * 2))
        wait = max(retry_after or 0.0, self._backoff * random.uniform(0.5, 1.0))  # noqa: S311
        self._stop.wait(wait)

    # -- requests

    def _request(self, params: dict[str, str], read_seconds: float) -> urllib3.BaseHTTPResponse:
        """A response with status 200. Raises _Failure and _Expired."""
        try:
            response = self._connection.get(
                PATHS[self._resource], {**params, **self._selectors}, read_seconds=read_seconds
            )
            if response.status == 200:
                return response
            body = response.read(64 * 1024)
            response.close()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _Failure(_reason(error), _describe(error)) from error
        except ConfigError as error:
            raise _Failure("credentials", str(error)) from error
        status = decode_status(body, response.status)
        if status.code == 410:
            raise _Expired
        if status.code == 401:
            self._reload()
        raise _failure_of(status, response.headers.get("Retry-After"))

    def _reload(self) -> None:
        try:
            self._connection.reload()
        except ConfigError as error:
            raise _Failure("credentials", str(error)) from error

    def _page_list(self) -> None:
        """All pages, then one Replaced."""
        objects: dict[ObjectKey, object] = {}
        unreadable: list[Unreadable] = []
        token = ""
        while True:
            params = {"limit": str(_PAGE_LIMIT), **({"continue": token} if token else {})}
            response = self._request(params, self._timing.list_wait)
            try:
                page = self._decoder.page(response.read())
                response.release_conn()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                raise _Failure(_reason(error), _describe(error)) from error
            except msgspec.DecodeError as error:
                raise _Failure("garbled", f"a page cannot be decoded: {error}") from error
            if self._stop.is_set():
                return
            objects.update((key_of(each), self._reduce(each)) for each in page.objects)
            unreadable += page.unreadable
            token = page.continue_token
            if not token:
                break
        self._connected()
        self._received()
        self._deliver_list(objects, unreadable, page.resource_version)
        self._watch()

    def _stream_list(self) -> None:
        """Initial events up to the bookmark that ends them; the same stream goes on as the watch."""
        params = {
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
        }
        try:
            self._watch(params)
        except _Failure as failure:
            if failure.reason in ("400", "422"):
                raise _NoStreamingList(str(failure)) from failure
            if failure.reason == "idle" and not self._version:
                raise _NoStreamingList("the initial events do not end") from failure
            raise

    def _watch(self, list_params: dict[str, str] | None = None) -> None:
        """Returns where the server ended the stream in order."""
        timing = self._timing
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(timing.watch * random.uniform(1, 2))),  # noqa: S311
            **(list_params or {"resourceVersion": self._version}),
        }
        listing = _Listing(self._reduce) if list_params else None
        response = self._request(params, timing.list_wait if listing else timing.idle)
        self._response = response
        self._connected()
        splitter = LineSplitter()
        try:
            while not self._stop.is_set():
                chunk = response.read1(_CHUNK)
                received = time.monotonic()
                if not chunk:
                    break
                self._received()
                for line in splitter.feed(chunk):
                    event = self._decode(line)
                    if listing is None:
                        self._deliver(event, received)
                    elif listing.add(event):
                        self._deliver_list(listing.objects, listing.unreadable, event.resource_version)
                        listing = None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if self._stop.is_set():
                return
            reason = _reason(error)
            if reason == "idle" and listing is None:
                # A quiet cluster behind a server without bookmarks: not a failure, but worth a new stream.
                self._count("idle")
                return
            raise _Failure(reason, _describe(error)) from error
        finally:
            self._response = None
            response.close()
        if splitter.pending and not self._stop.is_set():
            raise _Failure("truncated", "the stream ended within a line")
        if listing is not None and not self._stop.is_set():
            raise _Failure("truncated", "the stream ended within the list")

    # -- events

    def _decode(self, line: bytes) -> WatchEvent:
        try:
            event = self._decoder.line(line)
        except msgspec.DecodeError as error:
            raise _Failure("garbled", f"a line cannot be decoded: {error}") from error
        if event.status is not None:
            if event.status.code == 410:
                raise _Expired
            raise _failure_of(event.status, None)
        return event

    def _deliver(self, event: WatchEvent, received: float) -> None:
        if event.resource_version:
            self._version = event.resource_version
        if event.type is EventType.DELETED:
            self._unreadable.pop(event.key, None)
            self._sink(Deleted(self._resource, event.key, received))
        elif event.unreadable is not None:
            self._warn(event.unreadable)
        elif event.object is not None:
            self._unreadable.pop(event.key, None)
            self._sink(Changed(self._resource, event.key, self._reduce(event.object), received))

    def _deliver_list(
        self, objects: dict[ObjectKey, object], unreadable: list[Unreadable], version: str
    ) -> None:
        for each in unreadable:
            self._warn(each)
        self._version = version
        self._sink(Replaced(self._resource, objects, frozenset(u.key for u in unreadable)))
        self._update(synced=True, resource_version=version, lists=self.status.lists + 1)

    def _warn(self, unreadable: Unreadable) -> None:
        """Once for each object and reason."""
        if self._unreadable.get(unreadable.key) != unreadable.why:
            self._unreadable[unreadable.key] = unreadable.why
            log.warning(
                "object cannot be decoded, what was known of it stays in force",
                resource=str(self._resource),
                object=str(unreadable.key),
                error=unreadable.why,
            )


class _Listing:
    """Initial events of a streaming list, until they are complete."""

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self.objects: dict[ObjectKey, object] = {}
        self._unreadable: dict[ObjectKey, Unreadable] = {}

    @property
    def unreadable(self) -> list[Unreadable]:
        return list(self._unreadable.values())

    def add(self, event: WatchEvent) -> bool:
        """True with the event that ends the list."""
        if event.type is EventType.BOOKMARK:
            return event.initial_events_end
        self.objects.pop(event.key, None)
        self._unreadable.pop(event.key, None)
        if event.unreadable is not None:
            self._unreadable[event.key] = event.unreadable
        elif event.object is not None:
            self.objects[event.key] = self._reduce(event.object)
        return False


def _failure_of(status: Status, retry_after: str | None) -> _Failure:
    """Retry-After counts in seconds for the API server (RFC 9110 allows a date, too: ignored)."""
    wait = float(retry_after) if retry_after and retry_after.isdigit() else None
    return _Failure(str(status.code), f"{status.code} {status.reason}: {status.message}".strip(), wait)


def _reason(error: Exception) -> str:
    """A short word for metrics."""
    causes: list[BaseException | None] = [error, *error.args, error.__cause__, error.__context__]
    kinds = [type(cause).__name__ for cause in causes if isinstance(cause, BaseException)]
    for kind, reason in (
        ("ReadTimeoutError", "idle"),
        ("TimeoutError", "idle"),
        ("ConnectTimeoutError", "timeout"),
        ("SSLError", "tls"),
        ("SSLCertVerificationError", "tls"),
        ("ConnectionRefusedError", "refused"),
        ("IncompleteRead", "truncated"),
    ):
        if kind in kinds:
            return reason
    return "connection"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def reflectors(
    connection: ApiConnection,
    node_name: str,
    sink: Callable[[Event], None],
    reduce: Reduce,
    timing: Timing | None = None,
) -> list[Reflector]:
    """The three watches of an agent, with kube-proxy's selectors (cmd/kube-proxy/app/server.go)."""
    labels = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
    return [
        Reflector(connection, resource, sink, reduce=reduce, timing=timing, **selector)
        for resource, selector in (
            (Resource.SERVICES, {"label_selector": labels}),
            (Resource.ENDPOINTSLICES, {"label_selector": labels}),
            (Resource.NODES, {"field_selector": f"metadata.name={node_name}"}),
        )
    ]
