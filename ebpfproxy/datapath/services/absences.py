"""Backends whose endpoint was removed a moment ago: they keep their ids, to be the same if it comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Set

from ebpfproxy.datapath.services.plan import NO_IDS
from ebpfproxy.services.model import ServicePortKey


class Absences:
    """Backend ids by service port, each with the time until which it is waited for."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """``seconds``: how long a wait is, by ``clock``; 0 for no waits."""
        self._seconds = seconds
        self._clock = clock
        self._until: dict[ServicePortKey, dict[int, float]] = {}
        self._next: deque[tuple[float, ServicePortKey]] = deque()

    @property
    def next(self) -> float | None:
        """When the first wait ends, by the clock."""
        return self._next[0][0] if self._next else None

    @property
    def is_due(self) -> bool:
        return self.next is not None and self.next <= self._clock()

    def wait_for(self, key: ServicePortKey, missing: Set[int]) -> frozenset[int]:
        """Waits for these backends of a service port, and no others. Returns those that are waited for."""
        before = self._until.pop(key, None) or {}
        if not missing or not self._seconds:
            return NO_IDS
        until = self._clock() + self._seconds
        if missing - before.keys():
            self._next.append((until, key))
        self._until[key] = {number: before.get(number, until) for number in missing}
        return frozenset(missing)

    def forget(self, key: ServicePortKey) -> Set[int]:
        """Ends all waits of a service port, and returns the backends that they were for."""
        return self._until.pop(key, {}).keys()

    def cut_short(self, may_end: Callable[[int], bool]) -> Iterator[tuple[ServicePortKey, set[int]]]:
        """Ends the waits for some backends before their time; yields them by service port."""
        for key, waiting in list(self._until.items()):
            gone = set(filter(may_end, waiting))
            if gone:
                self._until[key] = {n: until for n, until in waiting.items() if n not in gone}
                yield key, gone

    def over(self) -> Iterator[tuple[ServicePortKey, set[int]]]:
        """Ends the waits whose time is over; yields them by service port."""
        now = self._clock()
        while self._next and self._next[0][0] <= now:
            _, key = self._next.popleft()
            waiting = self._until.pop(key, {})
            gone = {number for number, until in waiting.items() if until <= now}
            if len(gone) < len(waiting):
                self._until[key] = {n: until for n, until in waiting.items() if n not in gone}
            if gone:
                yield key, gone
