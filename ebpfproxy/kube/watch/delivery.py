"""Delivers what a list and a watch bring as events to the sink; unreadable objects are reported once."""

from __future__ import annotations

from collections.abc import Callable

from ebpfproxy.kube.decode import EventType, Unreadable, WatchEvent
from ebpfproxy.kube.objects import Changed, Deleted, Event, ObjectKey, Reduce, Replaced, Resource
from ebpfproxy.kube.watch.listing import Listing, reduced_or_why
from ebpfproxy.logs import get_logger

log = get_logger(__name__)


class Delivery:
    """Delivers one resource. Not for more than one thread at a time."""

    def __init__(self, resource: Resource, sink: Callable[[Event], None], reduce: Reduce) -> None:
        self._resource, self._sink, self._reduce = resource, sink, reduce
        #: Reasons that were reported, by object.
        self._unreadable: dict[ObjectKey, str] = {}

    def listing(self) -> Listing:
        return Listing(self._reduce)

    def event(self, event: WatchEvent, received: float) -> None:
        """``received`` is of ``time.monotonic()``."""
        if event.unreadable is not None:
            self._warn(event.unreadable)
        elif event.type is EventType.DELETED:
            self._unreadable.pop(event.key, None)
            self._sink(Deleted(self._resource, event.key, received))
        elif event.object is not None:
            reduced = reduced_or_why(self._reduce, event.key, event.object)
            if isinstance(reduced, Unreadable):
                self._warn(reduced)
                return
            self._unreadable.pop(event.key, None)
            self._sink(Changed(self._resource, event.key, reduced, received))

    def list(self, listing: Listing) -> None:
        unreadable = listing.unreadable
        self._unreadable = {key: why for key, why in self._unreadable.items() if key in unreadable}
        for each in unreadable.values():
            self._warn(each)
        self._sink(Replaced(self._resource, listing.objects, frozenset(unreadable)))

    def nothing(self) -> None:
        """The API server has no such resource."""
        self._sink(Replaced(self._resource, {}))

    def _warn(self, unreadable: Unreadable) -> None:
        if self._unreadable.get(unreadable.key) != unreadable.why:
            self._unreadable[unreadable.key] = unreadable.why
            log.warning(
                "cannot decode object, keeping its last known state",
                resource=str(self._resource),
                object=str(unreadable.key),
                error=unreadable.why,
            )
