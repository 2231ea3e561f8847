"""``ebpfproxy backend drain``: carried out until it is undone or the endpoint goes."""

from __future__ import annotations

import time

from ebpfproxy.datapath.services.drained import Drained
from ebpfproxy.services.tracker import Tracker

#: How often the map of drain requests is read, in seconds.
SECONDS = 0.5


class DrainRequests:
    """Brings what commands have asked for to the tracker."""

    def __init__(self, drained: Drained, tracker: Tracker) -> None:
        self._drained = drained
        self._tracker = tracker
        self._next = 0.0

    def follow(self, *, complete: bool) -> None:
        """Reads the requests from time to time.

        ``complete``: all endpoints are known; requests for any other are deleted.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + SECONDS
        requests = self._drained.read()
        if complete:
            for request in requests:
                if not self._tracker.has_endpoint(*request):
                    self._drained.remove(*request)
                    requests -= {request}
        self._tracker.set_drained(requests)
