"""The rows of ``ebpfproxy top``: its JSON, whose names stay, and the order of rows."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

import msgspec

from ebpfproxy.top.measured import ConnectRow, MeasuringRow, TrafficRow


class PortKey(NamedTuple):
    namespace: str
    service: str
    name: str


class BackendRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one backend gets, of all Services that have it; more than one is ``shared``."""

    address: str
    protocol: str
    state: str
    connections_per_second: float
    #: Connected sockets and flows of this node.
    open: int
    #: Since the backend has its id.
    connections: int
    shared: bool
    #: Connections of this Service to it; None where they are not measured.
    failed_per_second: float | None = None
    #: The number for each reason, since ``top`` began.
    recently_failed: dict[str, int] = {}

    @property
    def failures(self) -> int:
        return sum(self.recently_failed.values())


class ServiceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A Service's port, both families. Datagrams count as connections.

    ``recently_refused`` and ``recently_dropped``: since ``top`` began. ``refused`` and ``dropped``: since the
    Service is programmed.
    """

    namespace: str
    service: str
    port: str
    connections_per_second: float
    refused_per_second: float
    dropped_per_second: float
    #: To its backends, also through other Services that have them.
    open: int
    connections: int
    refused: int
    dropped: int
    recently_refused: int
    recently_dropped: int
    #: How many backends new connections get.
    endpoints: int
    #: None where it is not measured.
    connects: ConnectRow | None = None
    traffic: TrafficRow | None = None
    #: The busiest, and those to which connections have failed since ``top`` began.
    backends: tuple[BackendRow, ...] = ()

    @property
    def key(self) -> PortKey:
        return PortKey(self.namespace, self.service, self.port)

    @property
    def name(self) -> str:
        service = f"{self.namespace}/{self.service}"
        return f"{service}:{self.port}" if self.port else service

    @property
    def failures(self) -> int:
        """Connections that have failed since ``top`` began, as far as it is known."""
        return self.connects.failures if self.connects is not None else 0

    @property
    def failed_per_second(self) -> float:
        return self.connects.failed_per_second if self.connects is not None else 0.0

    @property
    def p99(self) -> float:
        return (self.connects.p99 or 0.0) if self.connects is not None else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.traffic.bytes_per_second if self.traffic is not None else 0.0

    @property
    def is_active(self) -> bool:
        """True if anything happens, or has been refused or dropped, or has failed, since ``top`` began."""
        return bool(
            self.open
            or self.connections_per_second
            or self.recently_refused
            or self.recently_dropped
            or self.failures
            or self.bytes_per_second
        )


class PacketRow(msgspec.Struct, frozen=True, kw_only=True):
    """Packets that were rejected or dropped, or sockets that were refused: no Service has the address.

    ``recently``: since ``top`` began.
    """

    action: str
    reason: str
    per_second: float
    recently: int


class Top(msgspec.Struct, frozen=True, kw_only=True):
    """One refresh. ``time`` in Unix seconds; rates are of the ``seconds`` before it."""

    time: float
    seconds: float
    #: Service ports, and how many of them are active; both after the filter.
    services: int
    active: int
    connections_per_second: float
    refused_per_second: float
    dropped_per_second: float
    failed_per_second: float = 0.0
    bytes_per_second: float = 0.0
    measuring: MeasuringRow = MeasuringRow()
    #: These are of all Services, whatever the filter.
    packets: tuple[PacketRow, ...]
    #: Those that have refused and dropped most, or failed, since ``top`` began.
    trouble: tuple[ServiceRow, ...]
    #: The first by each sort key that was asked for.
    rows: tuple[ServiceRow, ...]


class Sort(enum.StrEnum):
    CONNECTIONS = "connections"
    OPEN = "open"
    REFUSED = "refused"
    DROPPED = "dropped"
    FAILED = "failed"
    CONNECT_TIME = "connect-time"
    BYTES = "bytes"
    NAME = "name"


#: The first attribute is what each sorts by; the others decide among equals.
SORT_KEYS = {
    Sort.CONNECTIONS: attrgetter("connections_per_second", "open", "recently_refused", "recently_dropped"),
    Sort.OPEN: attrgetter("open", "connections_per_second", "recently_refused", "recently_dropped"),
    Sort.REFUSED: attrgetter("refused_per_second", "recently_refused", "connections_per_second", "open"),
    Sort.DROPPED: attrgetter("dropped_per_second", "recently_dropped", "connections_per_second", "open"),
    Sort.FAILED: attrgetter("failed_per_second", "failures", "connections_per_second", "open"),
    Sort.CONNECT_TIME: attrgetter("p99", "connections_per_second", "open"),
    Sort.BYTES: attrgetter("bytes_per_second", "connections_per_second", "open"),
}


def ordered(rows: Iterable[ServiceRow], sort: Sort) -> list[ServiceRow]:
    by_name = sorted(rows, key=attrgetter("key"))
    return sorted(by_name, key=SORT_KEYS[sort], reverse=True) if sort in SORT_KEYS else by_name
