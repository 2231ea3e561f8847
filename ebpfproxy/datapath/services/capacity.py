"""Service ports that do not fit into the maps, or not as they should: they are tried again."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from ebpfproxy.services.model import ServicePort, ServicePortKey


class CapacityError(NamedTuple):
    """A service port that does not fit, or not as it should; as text it is one line."""

    key: ServicePortKey
    why: str

    def __str__(self) -> str:
        name = f":{self.key.port_name}" if self.key.port_name else ""
        return f"{self.key.namespace}/{self.key.name}{name} ({self.key.family}): {self.why}"


class CapacityErrors:
    """Those that wait for room, each with what is missing."""

    def __init__(self) -> None:
        self._found: dict[ServicePortKey, tuple[ServicePort, CapacityError]] = {}

    def add(self, port: ServicePort, why: str) -> CapacityError:
        problem = CapacityError(port.key, why)
        self._found[port.key] = port, problem
        return problem

    def discard(self, key: ServicePortKey) -> None:
        self._found.pop(key, None)

    @property
    def keys(self) -> Set[ServicePortKey]:
        return self._found.keys()

    @property
    def ports(self) -> list[ServicePort]:
        return [port for port, _ in self._found.values()]

    @property
    def problems(self) -> list[CapacityError]:
        return [problem for _, problem in self._found.values()]
