"""List and watch of one resource: the sink is kept up to date through everything that fails.

A *list* gives all objects and the resourceVersion at which that was true; a *watch*
from there gives every change after it. A stream that ends, for whatever reason, is taken up again at the
last resourceVersion seen. Only when the server has forgotten that (410) everything is listed again, and
delivered as one ``Replaced`` when it is complete: nobody sees a half-listed cluster.

The list is a streaming one where the server has it (KEP-3157), else paged. Failures back off exponentially
with jitter, and the waits become short again only after a change or a bookmark came, not because a server
accepts requests and then fails them; while they last, what was delivered stays in force. One log line says
that it fails, and one that it works again.

Three things that a server may do for ever without ever being asked in a hot loop: answer 410 to each list or
watch, accept watches and end them at once, accept watches and say nothing. The last is also what a watch
from a resourceVersion of the future looks like, after etcd was restored from a backup: two streams in a row
without a byte, not even a bookmark, and everything is listed again.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable

import msgspec
import urllib3

from ebpfproxy.kube.backoff import Backoff
from ebpfproxy.kube.client import ApiConnection, read, refusal
from ebpfproxy.kube.decode import Decoder
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.failures import Expired, Failure
from ebpfproxy.kube.objects import OPTIONAL, Event, Reduce, Resource, key_of
from ebpfproxy.kube.source_status import SourceStatus, State
from ebpfproxy.kube.watch.delivery import Delivery
from ebpfproxy.kube.watch.listing import Listing
from ebpfproxy.kube.watch.stream import EventStream
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: The best path comes first: an API server that does not have it may have the next.
_PATHS: dict[Resource, tuple[str, ...]] = {
    Resource.SERVICES: ("/api/v1/services",),
    Resource.ENDPOINTSLICES: ("/apis/discovery.k8s.io/v1/endpointslices",),
    Resource.NODES: ("/api/v1/nodes",),
    Resource.SERVICECIDRS: (
        "/apis/networking.k8s.io/v1/servicecidrs",
        "/apis/networking.k8s.io/v1beta1/servicecidrs",
    ),
}

_PAGE_LIMIT = 500
_SHORT_WATCH_SECONDS = 1.0
#: A request that lasted this long has worked.
_HEALTHY_SECONDS = 60.0


class Timing(msgspec.Struct, frozen=True):
    """Seconds, the same as client-go's where its reflector has them."""

    backoff_first: float = 0.8
    backoff_most: float = 30.0
    #: A watch ends after a random time between this and its double.
    watch: float = 300.0
    #: Bookmarks come every minute: a stream without a byte for longer is dead, whatever TCP says.
    idle: float = 150.0
    #: The first bytes of a list, or the next of its initial events.
    list_wait: float = 30.0
    #: The time between two looks for a resource that need not be there.
    absent: float = 300.0


class Reflector:
    """One resource. :meth:`run` is a thread's main function; ``status`` may be read by any thread.

    ``sink`` is called in that thread. Where ``reduce`` fails for an object, that object counts as unreadable.
    """

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
        self._delivery = Delivery(resource, sink, reduce)
        self._timing = timing or Timing()
        self._selectors = {
            name: value
            for name, value in (("labelSelector", label_selector), ("fieldSelector", field_selector))
            if value
        }
        self._decoder = Decoder(resource)
        self._backoff = Backoff(self._timing.backoff_first, self._timing.backoff_most)
        self._stop = threading.Event()
        self._stream: EventStream | None = None
        self._version = ""
        self._has_streaming_list = True
        self._next_list_by_pages = False
        #: The last stream was accepted and broke at once: being accepted says nothing.
        self._doubtful = False
        self._expired = False
        self._silent_streams = 0
        self._paths = _PATHS[resource]
        #: The number of paths in a row that the server does not have.
        self._missed = 0
        self.status = SourceStatus(resource=resource, since=time.time())

    def start(self) -> None:
        threading.Thread(target=self.run, name=f"watch-{self._resource}", daemon=True).start()

    def stop(self) -> None:
        """Ends :meth:`run` soon, also while it waits for bytes."""
        self._stop.set()
        stream = self._stream
        if stream is not None:
            stream.abort()

    def run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._once()
            except Expired as expired:
                self._after(began)
                self._list_again(str(expired))
            except Failure as failure:
                self._after(began)
                if self._resource in OPTIONAL and failure.reason in ("403", "404"):
                    self._absent(failure)
                else:
                    self._failed(failure)
            except Exception as error:
                # A mistake of ours must not end the watch for ever.
                log.error(
                    "unexpected error in a watch, trying again",
                    resource=str(self._resource),
                    error=repr(error),
                )
                log.debug("traceback of the unexpected error", traceback=traceback.format_exc())
                self._failed(Failure("internal", repr(error)))
            else:
                self._after(began)
                if time.monotonic() - began < _SHORT_WATCH_SECONDS:
                    # A server that ends watches at once would be asked without end.
                    self._pause()

    def _once(self) -> None:
        if self._version:
            self._watch()
        elif self._has_streaming_list and not self._next_list_by_pages:
            self._stream_list()
        else:
            self._page_list()

    # -- state

    def _update(self, **changes: object) -> None:
        self.status = msgspec.structs.replace(self.status, **changes)

    def _count(self, reason: str) -> None:
        counts = dict(self.status.failures)
        counts[reason] = counts.get(reason, 0) + 1
        self._update(failures=counts)

    def _failed(self, failure: Failure) -> None:
        if self._stop.is_set():
            return
        self._count(failure.reason)
        if self.status.state is not State.FAILING:
            log.warning(
                "watch is failing, keeping the last known state",
                resource=str(self._resource),
                reason=failure.reason,
                error=str(failure),
            )
            self._update(state=State.FAILING, since=time.time())
        self._update(error=str(failure))
        self._pause(failure.retry_after)

    def _absent(self, failure: Failure) -> None:
        """Looks for it again, but seldom. The known state is kept only while it is merely not shown."""
        if self._stop.is_set():
            return
        self._count(failure.reason)
        if failure.reason == "404":
            self._version = ""
            self._missed += 1
            self._paths = (*self._paths[1:], self._paths[0])
            if self._missed < len(self._paths):
                return
            self._missed = 0
        if self.status.state is not State.ABSENT:
            log.info(
                "API server has no such resource for us, using configured values",
                resource=str(self._resource),
                why=str(failure),
            )
            if failure.reason == "404" or not self.status.synced:
                self._delivery.nothing()
            self._update(state=State.ABSENT, since=time.time())
        self._update(error=str(failure))
        self._stop.wait(self._timing.absent)

    def _connected(self) -> None:
        self._missed = 0
        if self.status.state is not State.CONNECTED:
            log.info("watch is connected", resource=str(self._resource), server=self._connection.host)
            self._update(state=State.CONNECTED, since=time.time(), error=None)

    def _list_again(self, why: str) -> None:
        """Lists again, at once for the first 410; a server that answers nothing else is failing."""
        self._version = ""
        if self._expired:
            self._failed(Failure("expired", why))
            return
        self._expired = True
        self._count("expired")
        log.info("watch expired, listing again", resource=str(self._resource), why=why)

    def _works(self) -> None:
        """The server did more than accept requests: after the next failure it is tried again soon."""
        self._backoff.reset()
        self._expired = False

    def _after(self, began: float) -> None:
        if time.monotonic() - began >= _HEALTHY_SECONDS:
            self._works()

    def _pause(self, retry_after: float | None = None) -> None:
        self._stop.wait(max(retry_after or 0.0, self._backoff.next()))

    # -- requests

    def _request(self, params: dict[str, str], read_seconds: float) -> urllib3.BaseHTTPResponse:
        """Returns a response with status 200. Raises Failure and Expired."""
        try:
            response = self._connection.get(
                self._paths[0], {**params, **self._selectors}, read_seconds=read_seconds
            )
        except Failure as failure:
            if failure.reason == "tls":
                # The server may have a certificate of an authority that the file has had since it was read.
                self._reload()
            raise
        if response.status == 200:
            return response
        error = refusal(response)
        if response.status in (401, 403):
            # So does 403: without credentials, since a plugin failed, the request was an anonymous one.
            self._reload()
        raise error

    def _reload(self) -> None:
        try:
            self._connection.reload()
        except ConfigError as error:
            raise Failure("credentials", str(error)) from error

    def _page_list(self) -> None:
        """Reads all pages, delivers one Replaced, then watches."""
        listing = self._delivery.listing()
        token = ""
        while True:
            params = {"limit": str(_PAGE_LIMIT), **({"continue": token} if token else {})}
            response = self._request(params, self._timing.list_wait)
            try:
                page = self._decoder.page(read(response))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise Failure("garbled", f"a page cannot be decoded: {error}") from error
            if self._stop.is_set():
                return
            for each in page.objects:
                listing.put(key_of(each), each)
            for unreadable in page.unreadable:
                listing.put_unreadable(unreadable)
            token = page.continue_token
            if not token:
                break
        self._next_list_by_pages = False
        self._connected()
        self._update(last_event=time.time())
        self._deliver_list(listing, page.resource_version)
        self._watch()

    def _stream_list(self) -> None:
        """Reads initial events up to the bookmark that ends them; the same stream goes on as the watch."""
        try:
            self._watch({"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"})
        except Failure as failure:
            if failure.reason in ("400", "422"):
                log.info("no streaming list, using pages", resource=str(self._resource), why=str(failure))
                self._has_streaming_list = False
                return
            # Where initial events do not come, or do not end, pages may work.
            self._next_list_by_pages = failure.reason == "idle" and not self._version
            raise

    def _watch(self, list_params: dict[str, str] | None = None) -> None:
        """Returns where the server ended the stream in order."""
        timing = self._timing
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(timing.watch * random.uniform(1, 2))),  # noqa: S311 - not a secret
            **(list_params or {"resourceVersion": self._version}),
        }
        listing = self._delivery.listing() if list_params else None
        response = self._request(params, timing.list_wait if listing else timing.idle)
        stream = self._stream = EventStream(response, self._decoder)
        if not self._doubtful:
            # A quiet cluster may have nothing to say for a while.
            self._connected()
        try:
            for event, received in stream.events():
                if self._stop.is_set():
                    return
                self._heard(stream)
                if listing is None:
                    self._works()
                    self._version = event.resource_version or self._version
                    self._delivery.event(event, received)
                elif listing.add(event):
                    self._deliver_list(listing, event.resource_version)
                    listing = None
                    stream.set_read_timeout(timing.idle)
        except Expired:
            raise
        except Failure as failure:
            self._doubtful = not stream.heard and stream.age < _SHORT_WATCH_SECONDS
            if failure.reason != "idle" or listing is not None:
                raise
            self._idle(stream)
        finally:
            self._stream = None
        if listing is not None and not self._stop.is_set():
            raise Failure("truncated", "the stream ended within the list")

    def _heard(self, stream: EventStream) -> None:
        if stream.last_bytes != self.status.last_event:
            self._update(last_event=stream.last_bytes)
            self._silent_streams = 0
            self._doubtful = False
            self._connected()

    def _idle(self, stream: EventStream) -> None:
        """Asks for a new stream: the cluster is quiet, and no bookmarks come, which is no failure."""
        self._count("idle")
        if not stream.heard:
            self._silent_streams += 1
        if self._silent_streams >= 2:
            self._silent_streams = 0
            self._version = ""

    def _deliver_list(self, listing: Listing, version: str) -> None:
        self._version = version
        self._delivery.list(listing)
        self._update(synced=True, resource_version=version, lists=self.status.lists + 1)


def reflectors(
    connection: ApiConnection,
    node_name: str,
    sink: Callable[[Event], None],
    reduce: Reduce,
    timing: Timing | None = None,
) -> list[Reflector]:
    """Returns an agent's watches, with the selectors of kube-proxy 1.36 (cmd/kube-proxy/app/server.go).

    Those of Services differ: Services that another proxy serves are watched, too, since sockets that connect
    to their cluster IPs are left to it; and API servers before 1.31 cannot leave out headless ones.
    """
    return [
        Reflector(connection, resource, sink, reduce=reduce, timing=timing, **selector)
        for resource, selector in (
            (Resource.SERVICES, {}),
            (Resource.ENDPOINTSLICES, {"label_selector": "!service.kubernetes.io/headless"}),
            (Resource.NODES, {"field_selector": f"metadata.name={node_name}"}),
            (Resource.SERVICECIDRS, {}),
        )
    ]
