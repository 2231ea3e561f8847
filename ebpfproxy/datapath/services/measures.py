"""What programs have measured of connections, by the ids of services and backends.

Without ``measureConnections`` and ``measureTraffic`` nothing is measured: what is read then was measured
before, or is empty. A service has an entry once there was something to count. Those that do not fit are
counted together, as NOBODY.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from typing import Generic, NamedTuple, TypeVar

from ebpfproxy.datapath.abi.layout import NOBODY, PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import (
    CONNECT_BOUNDS,
    CONNECT_FAILURES,
    CONNECTS,
    TRAFFIC,
    ConnectFailure,
)
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.maps import MapSet

Key = TypeVar("Key")
Value = TypeVar("Value")


class ChangingTable(Generic[Key, Value]):
    """A map that is read again and again. What has not changed is not decoded again."""

    def __init__(
        self, table: Map, key: Callable[[bytes], Key], value: Callable[[bytes], Value | None]
    ) -> None:
        """``value`` returns None for an entry that has nothing to say."""
        self._table, self._key, self._value = table, key, value
        self._packed: dict[bytes, bytes] = {}
        self._decoded: dict[bytes, tuple[Key, Value | None]] = {}
        self._found: Mapping[Key, Value] = {}

    def read(self) -> Mapping[Key, Value]:
        """The same object where nothing has changed."""
        packed = dict(self._table.items())
        if packed == self._packed:
            return self._found
        self._decoded = {
            key: self._decoded[key]
            if self._packed.get(key) == value
            else (self._key(key), self._value(value))
            for key, value in packed.items()
        }
        self._packed = packed
        self._found = {key: value for key, value in self._decoded.values() if value is not None}
        return self._found


def _service_id(key: bytes) -> int:
    return int(U32.unpack(key)[0])


def _pair(key: bytes) -> ServiceBackend:
    return ServiceBackend(*PAIR.unpack(key))


class Connects(NamedTuple):
    """Connections of one service port.

    ``microseconds``: what all that were established took together. ``times``: how many took at most so long
    as each of ``CONNECT_BOUNDS`` says, and above. ``failures``: by ``ConnectFailure``.
    """

    microseconds: int
    times: tuple[int, ...]
    failures: tuple[int, ...]

    @property
    def established(self) -> int:
        return sum(self.times)

    def since(self, before: Connects) -> Connects:
        """What was measured after ``before``."""
        return Connects(
            self.microseconds - before.microseconds,
            tuple(now - then for now, then in zip(self.times, before.times, strict=True)),
            tuple(now - then for now, then in zip(self.failures, before.failures, strict=True)),
        )

    def quantile(self, share: float) -> float | None:
        """The seconds that this share of connections did not exceed; None if there was no connection."""
        return quantile(self.times, share)


def quantile(times: Sequence[int], share: float) -> float | None:
    """The seconds that this share of ``Connects.times`` did not exceed, estimated as PromQL does.

    None if there was none; the highest bound where it is above all of them.
    """
    established = sum(times)
    rank, below, low = share * established, 0, 0
    if not established:
        return None
    for count, bound in zip(times, CONNECT_BOUNDS, strict=False):
        if count and below + count >= rank:
            return (low + (bound - low) * (rank - below) / count) / 1e6
        below, low = below + count, bound
    return CONNECT_BOUNDS[-1] / 1e6


NO_CONNECTS = Connects(0, (0,) * (len(CONNECT_BOUNDS) + 1), (0,) * len(ConnectFailure))


class ServiceBackend(NamedTuple):
    """A service and one of its backends, by their ids."""

    service_id: int
    backend_id: int


def _unpack_connects(value: bytes) -> Connects | None:
    microseconds, *counts = CONNECTS.unpack(value)
    times, failed = counts[: len(CONNECT_BOUNDS) + 1], counts[len(CONNECT_BOUNDS) + 1 :]
    return Connects(microseconds, tuple(times), tuple(failed)) if any(counts) else None


def connects(maps: MapSet) -> Mapping[int, Connects]:
    """By service id, of those that have had any."""
    return ChangingTable(maps["connects"], _service_id, _unpack_connects).read()


#: How many connections failed, by ``ConnectFailure``.
Failures = tuple[int, ...]
NO_FAILURES: Failures = (0,) * len(ConnectFailure)


def by_reason(failed: Sequence[int]) -> dict[str, int]:
    """Without those that there were none of."""
    return {str(reason): failed[reason] for reason in ConnectFailure if failed[reason]}


def _unpack_failures(value: bytes) -> Failures | None:
    counts = CONNECT_FAILURES.unpack(value)
    return counts if any(counts) else None


def failures(maps: MapSet) -> Mapping[ServiceBackend, Failures]:
    """How many connections to each backend failed."""
    return ChangingTable(maps["connect_failures"], _pair, _unpack_failures).read()


class Traffic(NamedTuple):
    """What went from clients to a service port's backends (requests), and back.

    Bytes of TCP connections of sockets are those of data, of packets those of IP.
    """

    request_bytes: int
    response_bytes: int
    request_packets: int
    response_packets: int


NO_TRAFFIC = Traffic(0, 0, 0, 0)


def _unpack_traffic(value: bytes) -> Traffic | None:
    found = Traffic(*map(sum, zip(*TRAFFIC.iter_unpack(value), strict=True)))
    return found if any(found) else None


def traffic(maps: MapSet) -> Mapping[int, Traffic]:
    """By service id, of those that have had any."""
    return ChangingTable(maps["service_traffic"], _service_id, _unpack_traffic).read()


class Measuring(NamedTuple):
    """What programs measure."""

    connections: bool = False
    traffic: bool = False


class Measured(NamedTuple):
    """All that has been measured until one moment."""

    connects: Mapping[int, Connects] = {}
    failures: Mapping[ServiceBackend, Failures] = {}
    traffic: Mapping[int, Traffic] = {}


class MeasureReader:
    """Reads again and again; what has not changed since the last time is the same object."""

    def __init__(self, maps: MapSet) -> None:
        self._connects = ChangingTable(maps["connects"], _service_id, _unpack_connects)
        self._failures = ChangingTable(maps["connect_failures"], _pair, _unpack_failures)
        self._traffic = ChangingTable(maps["service_traffic"], _service_id, _unpack_traffic)

    def read(self) -> Measured:
        return Measured(self._connects.read(), self._failures.read(), self._traffic.read())


class Measures:
    """The agent's part: entries for what does not fit, and none for ids that have a new owner."""

    def __init__(self, maps: MapSet) -> None:
        self._connects, self._failures = maps["connects"], maps["connect_failures"]
        self._traffic = maps["service_traffic"]
        if self._connects.lookup(U32.pack(NOBODY)) is None:
            self._connects.update(U32.pack(NOBODY), bytes(CONNECTS.size))
        if self._failures.lookup(PAIR.pack(NOBODY, NOBODY)) is None:
            self._failures.update(PAIR.pack(NOBODY, NOBODY), bytes(CONNECT_FAILURES.size))

        if self._traffic.lookup(U32.pack(NOBODY)) is None:
            self._traffic.update(U32.pack(NOBODY), bytes(TRAFFIC.size * bpf.possible_cpus()))

    def keep(self, services: Set[int], backends: Set[int]) -> None:
        """Deletes what is there of ids other than these, which are in use.

        A killed agent may have left it, or connections that go on have counted after their Service was gone.
        """
        services, backends = services | {NOBODY}, backends | {NOBODY}
        for table in (self._connects, self._traffic):
            keys = [key for key, _ in table.items()]
            table.delete_many([key for key in keys if U32.unpack(key)[0] not in services])
        self._failures.delete_many(
            [
                key
                for key, of in self._pairs()
                if of.service_id not in services or of.backend_id not in backends
            ]
        )

    def forget(self, services: Collection[int], backends: Collection[int]) -> None:
        """For ids that no program uses any more, or that have a new owner."""
        if not services and not backends:
            return
        for table in (self._connects, self._traffic):
            table.delete_many([U32.pack(number) for number in services])
        self._failures.delete_many(
            [key for key, of in self._pairs() if of.service_id in services or of.backend_id in backends]
        )

    def _pairs(self) -> Iterator[tuple[bytes, ServiceBackend]]:
        return ((key, ServiceBackend(*PAIR.unpack(key))) for key, _ in self._failures.items())
