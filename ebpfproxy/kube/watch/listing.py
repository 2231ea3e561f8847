"""Collects a list: nothing is delivered before it is complete."""

from __future__ import annotations

from ebpfproxy.kube.decode import EventType, Unreadable, WatchEvent
from ebpfproxy.kube.objects import Object, ObjectKey, Reduce

#: An enumeration looks for each of its members anew (until Python 3.12), which takes longer than a call.
_BOOKMARK = EventType.BOOKMARK


def reduced_or_why(reduce: Reduce, key: ObjectKey, each: Object) -> object:
    """Returns what ``reduce`` makes of it, or Unreadable: one odd object must not keep all others away."""
    try:
        return reduce(each)
    except Exception as error:
        return Unreadable(key, f"unexpected error: {error!r}")


class Listing:
    """The content of a list, until it is complete."""

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self.objects: dict[ObjectKey, object] = {}
        self.unreadable: dict[ObjectKey, Unreadable] = {}

    def add(self, event: WatchEvent) -> bool:
        """An initial event of a streaming list. True with the one that ends the list."""
        if event.type is _BOOKMARK:
            return event.initial_events_end
        self.objects.pop(event.key, None)
        self.unreadable.pop(event.key, None)
        if event.unreadable is not None:
            self.put_unreadable(event.unreadable)
        elif event.object is not None:
            self.put(event.key, event.object)
        return False

    def put(self, key: ObjectKey, each: Object) -> None:
        reduced = reduced_or_why(self._reduce, key, each)
        if isinstance(reduced, Unreadable):
            self.put_unreadable(reduced)
        else:
            self.objects[key] = reduced

    def put_unreadable(self, unreadable: Unreadable) -> None:
        self.unreadable[unreadable.key] = unreadable
