"""UDP frontends that services have lost: sockets that use them have to end."""

from __future__ import annotations

from ebpfproxy.datapath.abi.layout import ServiceKey
from ebpfproxy.datapath.flows.origins import LostFrontend
from ebpfproxy.datapath.flows.removed_backends import RemovedBackends
from ebpfproxy.services.model import Protocol


class LostFrontends:
    """Those since they were last taken. Flows are told to look for their service again."""

    def __init__(self, removed: RemovedBackends) -> None:
        self._removed = removed
        self._found: set[LostFrontend] = set()

    def note(self, service_id: int, key: ServiceKey) -> None:
        self._removed.look_again(service_id)
        if key.protocol is Protocol.UDP:
            self._found.add(LostFrontend(service_id, key.address, key.port))

    def take(self) -> set[LostFrontend]:
        taken, self._found = self._found, set()
        return taken
