"""Replays recordings of a real API server: incremental results equal those from scratch after each event."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from ebpfproxy.kube.objects import Event, Replaced
from ebpfproxy.services.model import ServicePort, ServicePortKey
from ebpfproxy.services.tracker import Update
from tests import recordings
from tests.recordings import RecordTracker

NODES = ("node-a1", "node-b1")


def from_scratch(lists: list[Replaced[object]], node: str) -> list[ServicePort]:
    tracker = RecordTracker(node)
    for each in lists:
        tracker.apply(each)
    tracker.drain()
    return tracker.service_ports()


class Mirror:
    """The state of a consumer that applies updates only, as the datapath does."""

    def __init__(self) -> None:
        self.ports: dict[ServicePortKey, ServicePort] = {}

    def apply(self, update: Update) -> None:
        for port in update.changed:
            assert self.ports.get(port.key) != port, "reported as changed but unchanged"
            self.ports[port.key] = port
        for key in update.removed:
            del self.ports[key]

    def sorted(self) -> list[ServicePort]:
        return sorted(self.ports.values(), key=lambda port: port.key)


@pytest.mark.parametrize("node", NODES)
def test_after_every_event_incremental_equals_from_scratch(node: str) -> None:
    first = recordings.as_events(recordings.lists("initial"))
    stored, tracker, mirror = recordings.StoredObjects(first), RecordTracker(node), Mirror()
    for each in first:
        tracker.apply(each)
    mirror.apply(tracker.drain())
    for event in recordings.watch_events():
        stored.apply(event)
        tracker.apply(event)
        mirror.apply(tracker.drain())
        expected = from_scratch(stored.lists(), node)
        assert tracker.service_ports() == expected
        assert mirror.sorted() == expected


@pytest.mark.parametrize("node", NODES)
def test_final_state_equals_that_of_the_final_lists(node: str) -> None:
    tracker = RecordTracker(node)
    for each in [*recordings.as_events(recordings.lists("initial")), *recordings.watch_events()]:
        tracker.apply(each)
    tracker.drain()
    assert tracker.service_ports() == from_scratch(recordings.as_events(recordings.lists("final")), node)


@pytest.mark.parametrize("seed", range(20))
def test_final_state_does_not_depend_on_the_order_between_objects(seed: int) -> None:
    """The API guarantees an order per object only: watches of different resources interleave freely."""
    order = random.Random(seed)
    queues: dict[object, list[Event]] = defaultdict(list)
    for event in recordings.watch_events():
        queues[recordings.event_key(event)].append(event)
    tracker, mirror = RecordTracker("node-a1"), Mirror()
    initial = recordings.as_events(recordings.lists("initial"))
    for each in order.sample(initial, len(initial)):
        tracker.apply(each)
    waiting = [list(reversed(queue)) for queue in queues.values()]
    while waiting:
        queue = order.choice(waiting)
        tracker.apply(queue.pop())
        if order.random() < 0.3:
            mirror.apply(tracker.drain())
        if not queue:
            waiting.remove(queue)
    mirror.apply(tracker.drain())
    expected = from_scratch(recordings.as_events(recordings.lists("final")), "node-a1")
    assert tracker.service_ports() == expected
    assert mirror.sorted() == expected


def test_new_list_changes_only_objects_that_differ() -> None:
    """After a 410 the list is compared with the known objects, and unchanged ones are not reported."""
    first = recordings.as_events(recordings.lists("initial"))
    stored, tracker = recordings.StoredObjects(first), RecordTracker("node-a1")
    events = recordings.watch_events()
    half = len(events) // 2
    for each in first:
        tracker.apply(each)
    for event in events[:half]:
        stored.apply(event)
        tracker.apply(event)
    tracker.drain()
    for each in stored.lists():
        tracker.apply(each)
    update = tracker.drain()
    assert (update.changed, update.removed) == ((), ())
    for event in events[half:]:
        stored.apply(event)
    for each in stored.lists():
        tracker.apply(each)
    tracker.drain()
    assert tracker.service_ports() == from_scratch(recordings.as_events(recordings.lists("final")), "node-a1")
