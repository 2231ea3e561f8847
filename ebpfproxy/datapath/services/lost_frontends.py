"""Services that have lost UDP frontends: sockets that use these have to end."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ebpfproxy.datapath.abi.layout import ServiceKey
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.services.model import Protocol


class LostFrontends:
    """Those since they were last taken. Flows are told to look for their service again."""

    def __init__(self, removed: RemovedBackends, services: Iterable[int], places: int) -> None:
        """``services``: the ids that were there before, of so many ``places`` for them.

        An agent that was killed may have taken a frontend from any of them, and may have told nobody: flows
        are told once more, and all are losers until they are taken first. Even one that has no name any more
        may still have sockets, or have some in maps of another size.
        """
        self._removed = removed
        for service_id in services:
            removed.look_again(service_id)
        self._losers: set[int] = set()
        self._places = places
        self._is_first = True

    def note(self, service_id: int, key: ServiceKey) -> None:
        self._removed.look_again(service_id)
        if key.protocol is Protocol.UDP:
            self._losers.add(service_id)

    def take(self) -> Container[int] | None:
        """Their ids; None without any."""
        taken, self._losers = self._losers, set()
        if self._is_first:
            self._is_first = False
            return range(self._places)
        return taken or None
