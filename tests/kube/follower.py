"""A listener of a reflector, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.objects import Changed, Event, ObjectKey, Replaced, Resource
from ebpfproxy.kube.source_status import State
from ebpfproxy.kube.watch.reflector import Reflector, Timing
from tests.apiserver import ApiServer, objects

QUICK = Timing(backoff_first=0.02, backoff_most=0.1, watch=300, idle=0.5, list_wait=2)
KEY = ObjectKey("load", "a")


class Follower:
    """Listens to a reflector and keeps its events."""

    def __init__(self, server: ApiServer, **options: Any) -> None:
        self.events: list[Event] = []
        self.known: dict[ObjectKey, object] = {}
        options = {
            "connection": ApiConnection.from_options(None, server.url),
            "resource": Resource.SERVICES,
            "timing": QUICK,
            **options,
        }
        self.reflector = Reflector(sink=self._tell, **options)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Replaced):
            self.known = dict(event.objects)
        elif isinstance(event, Changed):
            self.known[event.key] = event.object
        else:
            self.known.pop(event.key, None)
        self.events.append(event)

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.known}

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)

    def failures(self, reason: str) -> int:
        return self.reflector.status.failures.get(reason, 0)

    def until(self, condition: Callable[[], bool], what: str = "it did not happen") -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.reflector.status} {self.names}"
            time.sleep(0.005)


def still_works(server: ApiServer, follower: Follower) -> None:
    name = f"later-{len(follower.events)}"
    server.store.put("services", objects.service(name, "10.96.0.9"))
    follower.until(lambda: name in follower.names, "no further changes are received")
    follower.until(lambda: follower.reflector.status.state is State.CONNECTED)
