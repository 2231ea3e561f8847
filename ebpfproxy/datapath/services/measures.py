"""What programs have measured of connections, by the ids of services and backends.

Without ``measureConnections`` and ``measureTraffic`` nothing is measured: what is read then was measured
before, or is empty. A service has an entry once there was something to count. Those that do not fit are
counted together, as NOBODY.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import PAIR, U32
from ebpfproxy.datapath.abi.measure_layout import (
    CONNECT_BOUNDS,
    CONNECT_FAILURES,
    CONNECTS,
    NOBODY,
    TRAFFIC,
    ConnectFailure,
)
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet


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
        """The seconds that this share of connections did not exceed, estimated as PromQL does.

        None if there was no connection; the highest bound where it is above all of them.
        """
        rank, below, low = share * self.established, 0, 0
        if not self.established:
            return None
        for count, bound in zip(self.times, CONNECT_BOUNDS, strict=False):
            if count and below + count >= rank:
                return (low + (bound - low) * (rank - below) / count) / 1e6
            below, low = below + count, bound
        return CONNECT_BOUNDS[-1] / 1e6


NO_CONNECTS = Connects(0, (0,) * (len(CONNECT_BOUNDS) + 1), (0,) * len(ConnectFailure))


class ServiceBackend(NamedTuple):
    """A service and one of its backends, by their ids."""

    service_id: int
    backend_id: int


def connects(maps: MapSet) -> dict[int, Connects]:
    """By service id, of those that have had any."""
    found = {}
    for key, value in maps["connects"].items():
        microseconds, *counts = CONNECTS.unpack(value)
        if any(counts):
            times, failures = counts[: len(CONNECT_BOUNDS) + 1], counts[len(CONNECT_BOUNDS) + 1 :]
            found[U32.unpack(key)[0]] = Connects(microseconds, tuple(times), tuple(failures))
    return found


def failures(maps: MapSet) -> dict[ServiceBackend, tuple[int, ...]]:
    """How many connections to each backend failed, by ``ConnectFailure``."""
    return {
        ServiceBackend(*PAIR.unpack(key)): CONNECT_FAILURES.unpack(value)
        for key, value in maps["connect_failures"].items()
        if any(CONNECT_FAILURES.unpack(value))
    }


class Traffic(NamedTuple):
    """What went from clients to a service port's backends (requests), and back.

    Bytes of TCP connections of sockets are those of data, of packets those of IP.
    """

    request_bytes: int
    response_bytes: int
    request_packets: int
    response_packets: int


NO_TRAFFIC = Traffic(0, 0, 0, 0)


def traffic(maps: MapSet) -> dict[int, Traffic]:
    """By service id, of those that have had any."""
    return {
        U32.unpack(key)[0]: found
        for key, value in maps["service_traffic"].items()
        if any(found := Traffic(*map(sum, zip(*TRAFFIC.iter_unpack(value), strict=True))))
    }


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
