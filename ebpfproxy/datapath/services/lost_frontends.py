"""Services that have lost UDP frontends: sockets that use these have to end."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ebpfproxy.datapath.abi.layout import NOBODY, ServiceKey
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.services.model import Protocol

_ALL = range(NOBODY + 1)


class LostFrontends:
    """Those since they were last taken. Flows are told to look for their service again."""

    def __init__(self, removed: RemovedBackends, services: Iterable[int]) -> None:
        """``services``: the ids that were there before.

        An agent that was killed may have taken a frontend from any of them, and may have told nobody: flows
        are told once more, and all are losers until they are taken first. Even one that has no name any more
        may still have sockets. Those that come from maps of another size have NOBODY's id if their Service
        is not there.
        """
        self._removed = removed
        for service_id in services:
            removed.look_again(service_id)
        self._losers: set[int] = set()
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
            return _ALL
        return taken or None
