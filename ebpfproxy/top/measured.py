"""What has been measured of connections and traffic between readings, where it is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import msgspec

from ebpfproxy.datapath.abi.layout import NOBODY
from ebpfproxy.datapath.services.measures import (
    NO_CONNECTS,
    NO_TRAFFIC,
    Failures,
    Measured,
    Measuring,
    Traffic,
    by_reason,
    quantile,
)
from ebpfproxy.top.reading import Names, Reading

#: Seconds; nothing is divided by less.
SHORTEST = 0.001
#: Connect times are of the last seconds, so many: within one interval there may be few connections.
WINDOW_SECONDS = 30.0
#: How many moments of the window are kept.
_MOMENTS = 10

Counted = TypeVar("Counted", bound=tuple[object, ...])


class ConnectRow(msgspec.Struct, frozen=True, kw_only=True):
    """TCP connections of a Service's port.

    ``times``: how many of the last ``seconds`` took at most 64 µs, 128 µs and so on, and in the last place
    longer than all bounds; ``p50`` and ``p99``: estimated from these, in seconds. ``recently_failed``: by
    reason, since ``top`` began; that of a backend is of this Service alone.
    """

    seconds: float
    times: tuple[int, ...]
    p50: float | None
    p99: float | None
    failed_per_second: float
    recently_failed: dict[str, int]

    @property
    def failures(self) -> int:
        return sum(self.recently_failed.values())


class TrafficRow(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes and packets of a Service's port, from clients (request) and to them."""

    request_bytes_per_second: float
    response_bytes_per_second: float
    request_packets_per_second: float
    response_packets_per_second: float

    @property
    def bytes_per_second(self) -> float:
        return self.request_bytes_per_second + self.response_bytes_per_second


class MeasuringRow(msgspec.Struct, frozen=True, kw_only=True):
    """How many of the ``nodes`` measure connections and traffic. ``full``: on how many some have no entry."""

    nodes: int = 1
    connections: int = 0
    traffic: int = 0
    full: int = 0


def connect_row(
    seconds: float, times: Sequence[int], failed_per_second: float, recently_failed: dict[str, int]
) -> ConnectRow:
    return ConnectRow(
        seconds=seconds,
        times=tuple(times),
        p50=quantile(times, 0.5),
        p99=quantile(times, 0.99),
        failed_per_second=failed_per_second,
        recently_failed=recently_failed,
    )


class Moment(NamedTuple):
    """What was measured until then. The rest of a reading is too large to be kept."""

    at: float
    names: Names
    measured: Measured


def moment_of(reading: Reading) -> Moment:
    return Moment(reading.at, reading.names, reading.measured)


class Window:
    """Moments of the last seconds."""

    def __init__(self, first: Moment) -> None:
        self._moments = deque([first])

    def begin(self, now: float) -> Moment:
        """The latest moment that the whole window is after, or the first one."""
        while len(self._moments) > 1 and self._moments[1].at <= now - WINDOW_SECONDS:
            self._moments.popleft()
        return self._moments[0]

    def add(self, moment: Moment) -> None:
        if moment.at - self._moments[-1].at >= WINDOW_SECONDS / _MOMENTS:
            self._moments.append(moment)


class MeasuredChange:
    """What the last reading has that earlier ones have not, by service id; one without any is missing."""

    def __init__(
        self, first: Moment, window: Moment, before: Moment, after: Moment, measuring: Measuring
    ) -> None:
        self._after, self._measuring = after, measuring
        self._window_seconds = after.at - window.at
        self._seconds = max(after.at - before.at, SHORTEST)
        self._window = window
        self.traffic: Mapping[int, Traffic] = {}
        #: The numbers of the last interval, and those since the first reading.
        self.failed: Mapping[int, int] = {}
        self.recently_failed: Mapping[int, Failures] = {}
        #: The same by backend.
        self._failed: dict[int, dict[int, Failures]] = {}
        self._recently_failed: dict[int, dict[int, Failures]] = {}
        if measuring.traffic:
            self.traffic = _new(before, after, lambda of: of.traffic, _traffic_since)
        if measuring.connections:
            latest = _new(before, after, _failures_of, _since).items()
            self.failed = {number: sum(failed) for number, failed in latest if any(failed)}
            recent = _new(first, after, _failures_of, _since).items()
            self.recently_failed = {number: failed for number, failed in recent if any(failed)}
            self._failed, self._recently_failed = _by_backend(before, after), _by_backend(first, after)

    @property
    def measuring(self) -> MeasuringRow:
        found, measuring = self._after.measured, self._measuring
        tables = (found.connects, measuring.connections), (found.traffic, measuring.traffic)
        return MeasuringRow(
            connections=int(measuring.connections),
            traffic=int(measuring.traffic),
            full=int(any(is_read and NOBODY in table for table, is_read in tables)),
        )

    @property
    def counted(self) -> set[int]:
        """The ids of service ports that have new traffic, or a failure since the first reading."""
        return self.traffic.keys() | self.recently_failed.keys()

    def bytes_per_second(self, numbers: Collection[int]) -> float:
        sizes = (self.traffic[number] for number in numbers if number in self.traffic)
        return sum(each.request_bytes + each.response_bytes for each in sizes) / self._seconds

    def failed_per_second(self, numbers: Collection[int]) -> float:
        return sum(self.failed.get(number, 0) for number in numbers) / self._seconds

    def failures(self, numbers: Collection[int]) -> int:
        """Since the first reading."""
        return sum(sum(self.recently_failed.get(number, ())) for number in numbers)

    def p99(self, numbers: Collection[int]) -> float:
        """0 without connections."""
        if not self._measuring.connections:
            return 0.0
        return quantile(self._times(numbers), 0.99) or 0.0

    def _times(self, numbers: Collection[int]) -> list[int]:
        """Of the window. Only what is shown is looked at: within so long, most of very many have changed."""
        then, now = self._window, self._after
        counted = []
        for number in numbers:
            after = now.measured.connects.get(number, NO_CONNECTS)
            is_same = then.names.get(number) == now.names.get(number)
            before = then.measured.connects.get(number, NO_CONNECTS) if is_same else NO_CONNECTS
            counted.append(_since(after.times, before.times))
        return [sum(each) for each in zip(*counted, strict=True)]

    def connect_row(self, numbers: Collection[int]) -> ConnectRow | None:
        """Of these service ids together; None where it is not known."""
        if not self._measuring.connections or _is_missing(numbers, self._after.measured.connects):
            return None
        failed = [self.recently_failed[number] for number in numbers if number in self.recently_failed]
        return connect_row(
            self._window_seconds,
            self._times(numbers),
            self.failed_per_second(numbers),
            by_reason(_sums(failed)) if failed else {},
        )

    def traffic_row(self, numbers: Collection[int]) -> TrafficRow | None:
        """The same of traffic."""
        if not self._measuring.traffic or _is_missing(numbers, self._after.measured.traffic):
            return None
        found = Traffic(*_sums([self.traffic.get(number, NO_TRAFFIC) for number in numbers]))
        return TrafficRow(
            request_bytes_per_second=found.request_bytes / self._seconds,
            response_bytes_per_second=found.response_bytes / self._seconds,
            request_packets_per_second=found.request_packets / self._seconds,
            response_packets_per_second=found.response_packets / self._seconds,
        )

    def failing_backends(self, numbers: Collection[int]) -> dict[int, Failures]:
        """Backend ids to which connections of these service ids have failed since the first reading."""
        return _of_services(self._recently_failed, numbers)

    def failing_now(self, numbers: Collection[int], backend: int) -> float | None:
        """How many to this backend a second; None where it is not measured."""
        if not self._measuring.connections:
            return None
        return sum(_of_services(self._failed, numbers).get(backend, ())) / self._seconds


def _new(
    then: Moment,
    now: Moment,
    select: Callable[[Measured], Mapping[int, Counted]],
    since: Callable[[Counted, Counted], Counted],
) -> dict[int, Counted]:
    before, after = select(then.measured), select(now.measured)
    if before is after and then.names is now.names:
        return {}
    found = {}
    for number, counted in after.items():
        name = now.names.get(number)
        # The counts of an id that has got another owner began with 0.
        known = before.get(number) if then.names.get(number) == name else None
        if name is not None and counted is not known:
            found[number] = counted if known is None else since(counted, known)
    return found


def _since(now: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    """What is new; all of it if it was counted anew."""
    found = tuple(a - b for a, b in zip(now, then, strict=True))
    return now if min(found) < 0 else found


def _traffic_since(now: Traffic, then: Traffic) -> Traffic:
    return Traffic(*_since(now, then))


def _failures_of(measured: Measured) -> Mapping[int, Failures]:
    """Of those services that have any."""
    return {number: each.failures for number, each in measured.connects.items() if any(each.failures)}


def _by_backend(then: Moment, now: Moment) -> dict[int, dict[int, Failures]]:
    """New failures by service id and backend id."""
    before, after = then.measured.failures, now.measured.failures
    found: dict[int, dict[int, Failures]] = {}
    for key, failed in after.items():
        number, backend = key
        is_same = then.names.get(number) == now.names.get(number)
        known = before.get(key) if is_same else None
        if failed is not known:
            new = failed if known is None else _since(failed, known)
            if any(new):
                found.setdefault(number, {})[backend] = new
    return found


def _of_services(
    found: Mapping[int, Mapping[int, Failures]], numbers: Collection[int]
) -> dict[int, Failures]:
    sums: dict[int, Failures] = {}
    for number in numbers:
        for backend, failed in found.get(number, {}).items():
            sums[backend] = _sums([failed, sums[backend]]) if backend in sums else failed
    return sums


def _sums(counted: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(each) for each in zip(*counted, strict=True))


def _is_missing(numbers: Collection[int], found: Mapping[int, object]) -> bool:
    """True if the map had no room for one of them: it is then counted together with others."""
    return NOBODY in found and any(number not in found for number in numbers)
