"""What two readings differ in, as the rows of ``ebpfproxy top``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import nlargest, nsmallest
from itertools import islice
from typing import NamedTuple

from ebpfproxy.datapath.abi.node_layout import DROPPED, REJECTED, PacketEvent
from ebpfproxy.datapath.services.measures import Measuring, by_reason
from ebpfproxy.services.model import ServicePortKey, format_endpoint
from ebpfproxy.top.measured import SHORTEST, MeasuredChange, Window, moment_of
from ebpfproxy.top.reading import Counts, Names, Reader, Reading
from ebpfproxy.top.rows import SORT_KEYS, BackendRow, PacketRow, PortKey, ServiceRow, Sort, Top

_NOTHING: Counts = 0, 0, 0
_SHOWN_TROUBLE = 5


class Wanted(NamedTuple):
    """Which rows. ``rows``: how many by each key of ``sort``, 0 for all; ``backends``: how many of each."""

    sort: Sequence[Sort] = (Sort.CONNECTIONS,)
    rows: int = 20
    backends: int = 3
    namespace: str | None = None
    service: str | None = None

    def includes(self, key: ServicePortKey) -> bool:
        return self.namespace in (None, key.namespace) and self.service in (None, key.name)


class _Line(NamedTuple):
    """The part of a row that decides its place: there may be many thousands."""

    key: PortKey
    connections_per_second: float = 0.0
    open: int = 0
    refused_per_second: float = 0.0
    dropped_per_second: float = 0.0
    recently_refused: int = 0
    recently_dropped: int = 0
    failed_per_second: float = 0.0
    failures: int = 0
    p99: float = 0.0
    bytes_per_second: float = 0.0


class Comparison:
    """Compares each reading with the one before, and with the first. One thread uses it."""

    def __init__(
        self, reader: Reader, wanted: Wanted, now: float, measuring: Callable[[], Measuring] = Measuring
    ) -> None:
        """``now``: CLOCK_MONOTONIC in seconds. ``measuring``: what programs measure at that moment."""
        self._reader, self._wanted, self._measuring = reader, wanted, measuring
        self._first = self._before = reader.read(now)
        self._window = Window(moment_of(self._first))
        self._names: Names = {}
        #: Service ids of each port, one of each family, in the order of the ports' names; and the reverse.
        self._ids: dict[PortKey, list[int]] = {}
        self._port_of: dict[int, PortKey] = {}

    def next(self, now: float, clock: float) -> Top:
        """Reads again. ``clock``: Unix seconds."""
        after = self._reader.read(now)
        self._group(after.names)
        change = _Change(self._first, self._before, after, self._window, self._measuring())
        self._before = after
        self._window.add(moment_of(after))
        active = self._active(change)
        return Top(
            time=clock,
            seconds=change.seconds,
            services=len(self._ids),
            active=len(active),
            connections_per_second=sum(line.connections_per_second for line in active),
            refused_per_second=sum(line.refused_per_second for line in active),
            dropped_per_second=sum(line.dropped_per_second for line in active),
            failed_per_second=sum(line.failed_per_second for line in active),
            bytes_per_second=sum(line.bytes_per_second for line in active),
            measuring=change.measured.measuring,
            packets=tuple(change.packets()),
            trouble=tuple(self._row(line, change, 0) for line in _most_trouble(active)),
            rows=tuple(self._row(line, change, self._wanted.backends) for line in self._chosen(active)),
        )

    def _group(self, names: Names) -> None:
        if names is self._names:
            return
        found: dict[PortKey, list[int]] = {}
        for number, key in names.items():
            if self._wanted.includes(key):
                found.setdefault(PortKey(key.namespace, key.name, key.port_name), []).append(number)
        self._names, self._ids = names, dict(sorted(found.items()))
        self._port_of = {number: port for port, numbers in found.items() for number in numbers}

    def _active(self, change: _Change) -> list[_Line]:
        """Those of which something is open, or new, or was refused, dropped or failed since the first one."""
        counted = change.new.keys() | change.trouble.keys() | change.after.open_of.keys()
        counted |= change.measured.counted
        ports = {self._port_of[number] for number in counted & self._port_of.keys()}
        return [_line(port, self._ids[port], change) for port in self._ids if port in ports]

    def _chosen(self, active: Sequence[_Line]) -> list[_Line]:
        """The first by each key; those that are not active, by name, where there is room for more."""
        most = self._wanted.rows or len(self._ids)
        lines = active
        if len(active) < most or Sort.NAME in self._wanted.sort:
            known = {line.key: line for line in active}
            ports = islice(self._ids, most + len(active))
            others = [_Line(port) for port in ports if port not in known]
            lines = sorted([*active, *others])
        found: dict[PortKey, _Line] = {}
        for sort in self._wanted.sort:
            best = nlargest(most, lines, SORT_KEYS[sort]) if sort in SORT_KEYS else lines[:most]
            found |= {line.key: line for line in best}
        return list(found.values())

    def _row(self, line: _Line, change: _Change, backends: int) -> ServiceRow:
        ids = self._ids[line.key]
        numbers = [number for each in ids for number in self._reader.ports.backends[each]]
        totals = [change.after.services.get(number, _NOTHING) for number in ids]
        connections, refused, dropped = (sum(counts) for counts in zip(*totals, strict=True))
        return ServiceRow(
            namespace=line.key.namespace,
            service=line.key.service,
            port=line.key.name,
            connections_per_second=line.connections_per_second,
            refused_per_second=line.refused_per_second,
            dropped_per_second=line.dropped_per_second,
            open=line.open,
            connections=connections,
            refused=refused,
            dropped=dropped,
            recently_refused=line.recently_refused,
            recently_dropped=line.recently_dropped,
            endpoints=len(numbers),
            connects=change.measured.connect_row(ids),
            traffic=change.measured.traffic_row(ids),
            backends=tuple(self._backend_rows(ids, numbers, change, backends)),
        )

    def _backend_rows(
        self, ids: Sequence[int], numbers: Sequence[int], change: _Change, most: int
    ) -> Iterator[BackendRow]:
        """The busiest of these, then those that have failed most."""
        opened, measured = change.after.open, change.measured
        failed = measured.failing_backends(ids)
        counted = [(change.chosen(number), opened[number], number) for number in numbers] if most else []
        busiest = nsmallest(most, counted, key=lambda each: (-each[0], -each[1], each[2]))
        failing = (each for each in counted if each[2] in failed and each not in busiest)
        worst = nlargest(most, failing, key=lambda each: sum(failed[each[2]]))
        for new, count, number in [*busiest, *worst]:
            found = self._reader.backend(number)
            if found is None:
                continue
            backend, state = found
            yield BackendRow(
                address=format_endpoint(backend.address, backend.port),
                protocol=backend.protocol.name,
                state=str(state),
                connections_per_second=new / change.seconds,
                open=count,
                connections=change.after.loads[number].chosen,
                shared=self._reader.ports.users[number] > 1,
                failed_per_second=measured.failing_now(ids, number),
                recently_failed=by_reason(failed[number]) if number in failed else {},
            )


def _line(port: PortKey, numbers: Sequence[int], change: _Change) -> _Line:
    chosen = refused = dropped = opened = recently_refused = recently_dropped = 0
    new_of, trouble_of, open_of = change.new, change.trouble, change.after.open_of
    for number in numbers:
        if number in new_of:
            new = new_of[number]
            chosen, refused, dropped = chosen + new[0], refused + new[1], dropped + new[2]
        if number in trouble_of:
            recent = trouble_of[number]
            recently_refused, recently_dropped = recently_refused + recent[0], recently_dropped + recent[1]
        if number in open_of:
            opened += open_of[number]
    rate, measured = 1 / change.seconds, change.measured
    return _Line(
        key=port,
        connections_per_second=chosen * rate,
        open=opened,
        refused_per_second=refused * rate,
        dropped_per_second=dropped * rate,
        recently_refused=recently_refused,
        recently_dropped=recently_dropped,
        failed_per_second=measured.failed_per_second(numbers),
        failures=measured.failures(numbers),
        p99=measured.p99(numbers),
        bytes_per_second=measured.bytes_per_second(numbers),
    )


def _most_trouble(lines: Iterable[_Line]) -> list[_Line]:
    def trouble(line: _Line) -> int:
        return line.recently_refused + line.recently_dropped + line.failures

    return nlargest(_SHOWN_TROUBLE, filter(trouble, lines), trouble)


class _Change:
    """What the last reading has that the one before has not, or the first."""

    def __init__(
        self, first: Reading, before: Reading, after: Reading, window: Window, measuring: Measuring
    ) -> None:
        self.first, self.before, self.after = first, before, after
        moments = moment_of(first), window.begin(after.at), moment_of(before), moment_of(after)
        self.measured = MeasuredChange(*moments, measuring)
        self.seconds = max(after.at - before.at, SHORTEST)
        #: New counts by service id; one without any is missing.
        self.new = dict(_counted(before, after))
        #: What was refused and dropped since the first, of those that have.
        self.trouble = dict(_trouble(first, after))

    def chosen(self, number: int) -> int:
        """How often a backend was."""
        before, after = self.before.loads, self.after.loads
        is_known = number < len(before)
        if is_known and before.is_same(number, after):
            return 0
        # The counts of an id that has got another owner began with 0.
        now, then = after[number].chosen, before[number].chosen if is_known else 0
        return now - then if now >= then else now

    def packets(self) -> Iterator[PacketRow]:
        for action, events in (("rejected", REJECTED), ("dropped", DROPPED)):
            for event in sorted(events):
                counts = [each.packets[event] for each in (self.first, self.before, self.after)]
                yield from self._packets(action, event, *counts)
        counts = [each.unallocated for each in (self.first, self.before, self.after)]
        yield from self._packets("refused", PacketEvent.NO_SUCH_SERVICE, *counts)

    def _packets(
        self, action: str, event: PacketEvent, first: int, before: int, after: int
    ) -> Iterator[PacketRow]:
        if after > first:
            per_second = (after - before) / self.seconds
            yield PacketRow(action=action, reason=str(event), per_second=per_second, recently=after - first)


def _counted(before: Reading, after: Reading) -> Iterator[tuple[int, Counts]]:
    has_other_names = before.names is not after.names
    for number, now in after.services.items():
        then = before.services.get(number, _NOTHING)
        if now == then:
            continue
        if has_other_names and before.names.get(number) != after.names[number]:
            then = _NOTHING
        # An id that got another owner after its name was read counts less than before.
        yield number, (max(0, now[0] - then[0]), max(0, now[1] - then[1]), max(0, now[2] - then[2]))


def _trouble(first: Reading, after: Reading) -> Iterator[tuple[int, tuple[int, int]]]:
    for number, (_, refused, dropped) in after.services.items():
        if not refused and not dropped:
            continue
        _, refused_then, dropped_then = first.services.get(number, _NOTHING)
        if first.names.get(number) != after.names[number]:
            refused_then = dropped_then = 0
        found = max(0, refused - refused_then), max(0, dropped - dropped_then)
        if any(found):
            yield number, found
