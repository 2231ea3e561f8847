"""The rows of ``ebpfproxy top`` as lines, and the screen of a terminal with its keys.

Only what prints such rows imports this module, and with it the libraries of a screen.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ebpfproxy.cli.output import plain
from ebpfproxy.inspection.words import duration, size
from ebpfproxy.top.measured import MeasuringRow
from ebpfproxy.top.rows import BackendRow, ServiceRow, Sort, Top, ordered

_BAD, _WAS_BAD, _HEAD, _QUIET = "bold red", "yellow", "bold", "dim"
_SHOWN_NAMES = 3
#: Cells of names in a narrow terminal, before columns are left out.
_SHORT_NAME = 18
_KEYS = "q quit  s sort  b backends"

Cell = tuple[str, str]


class _Column(NamedTuple):
    """A number of Services and backends, as text with a style. ``sort``: the key that it shows.

    ``rank``: those with the highest are left out first where there is no room.
    """

    head: str
    width: int
    rank: int
    sort: Sort | None
    of_service: Callable[[ServiceRow], Cell]
    of_backend: Callable[[BackendRow], Cell]
    is_measured: Callable[[MeasuringRow], int] = lambda _: 1


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _failures(per_second: float, recently: int) -> Cell:
    """One that was is still seen after it is over."""
    if per_second:
        return _rate(per_second), _BAD
    return ("0.0", _WAS_BAD) if recently else _NONE


def _failed(row: ServiceRow) -> Cell:
    return _failures(row.failed_per_second, row.failures) if row.connects is not None else _NONE


def _failed_backend(row: BackendRow) -> Cell:
    return _failures(row.failed_per_second or 0.0, row.failures) if row.failures else ("", "")


def _bytes(row: ServiceRow) -> Cell:
    return (size(row.traffic.bytes_per_second), "") if row.traffic is not None else _NONE


def _p50(row: ServiceRow) -> Cell:
    return _time(row.connects.p50 if row.connects is not None else None)


def _p99(row: ServiceRow) -> Cell:
    return _time(row.connects.p99 if row.connects is not None else None)


def _time(percentile: float | None) -> Cell:
    return (duration(percentile), "") if percentile is not None else _NONE


_NONE: Cell = "-", _QUIET
_COLUMNS = (
    _Column(
        "new/s",
        9,
        0,
        Sort.CONNECTIONS,
        lambda row: (_rate(row.connections_per_second), ""),
        lambda row: (_rate(row.connections_per_second), ""),
    ),
    _Column(
        "refused/s",
        11,
        1,
        Sort.REFUSED,
        lambda row: _failures(row.refused_per_second, row.recently_refused),
        lambda _: ("", ""),
    ),
    _Column(
        "dropped/s",
        11,
        2,
        Sort.DROPPED,
        lambda row: _failures(row.dropped_per_second, row.recently_dropped),
        lambda _: ("", ""),
    ),
    _Column("failed/s", 10, 4, Sort.FAILED, _failed, _failed_backend, attrgetter("connections")),
    _Column("open", 9, 3, Sort.OPEN, lambda row: (f"{row.open:,}", ""), lambda row: (f"{row.open:,}", "")),
    _Column(
        "p50",
        8,
        6,
        None,
        _p50,
        lambda _: ("", ""),
        attrgetter("connections"),
    ),
    _Column(
        "p99",
        8,
        5,
        Sort.CONNECT_TIME,
        _p99,
        lambda _: ("", ""),
        attrgetter("connections"),
    ),
    _Column("bytes/s", 10, 7, Sort.BYTES, _bytes, lambda _: ("", ""), attrgetter("traffic")),
    _Column(
        "backends",
        10,
        8,
        None,
        lambda row: (f"{row.endpoints:,}", "" if row.endpoints else _WAS_BAD),
        lambda row: ("shared" if row.shared else "", _QUIET),
    ),
)
#: More than any rank: what is not measured is the least important.
_NOT_MEASURED = 100

# -- lines


def lines(
    top: Top,
    sort: Sort,
    width: int | None = None,
    height: int | None = None,
    *,
    backends: bool = True,
    title: str = "",
) -> list[Text]:
    """All of a refresh. Without a ``width`` names are whole; without a ``height`` all rows are there."""
    head = [*_summary(top, title), Text()]
    room = None if height is None else max(height - len(head) - 1, 0)
    rows = _chosen(ordered(top.rows, sort), room, backends=backends)
    names = [_name(row) for row in rows]
    columns, widest = list(_COLUMNS), max((cell_len(name) for name, _ in names), default=0)
    name_width = max(widest, _SHORT_NAME)
    if width is not None:
        while len(columns) > 1 and _SHORT_NAME + sum(each.width for each in columns) > width:
            columns.remove(
                max(columns, key=lambda c: c.rank + _NOT_MEASURED * (not c.is_measured(top.measuring)))
            )
        name_width = max(min(name_width, width - sum(each.width for each in columns)), 1)
    heads = [(each.head.upper() + "↓" * (each.sort is sort), _HEAD) for each in columns]
    table = [_line(("SERVICE", _HEAD), heads, columns, name_width)]
    for name, row in zip(names, rows, strict=True):
        cells = [
            each.of_service(row) if isinstance(row, ServiceRow) else each.of_backend(row) for each in columns
        ]
        table.append(_line(name, cells, columns, name_width))
    found = [*head, *table]
    if height is None and (text := hint(top.measuring)):
        found += [Text(), Text(text, _QUIET)]
    if width is not None:
        for each in found:
            each.truncate(width, overflow="ellipsis")
    return found


def _summary(top: Top, title: str) -> Iterator[Text]:
    now = time.strftime("%H:%M:%S", time.localtime(top.time))
    ports = f"{top.active:,} of {top.services:,} service ports active"
    parts = [f"{_rate(top.connections_per_second)} connections/s", ports, now, plain(title)]
    yield Text("   ".join(filter(None, parts)))
    refused = [(row.recently_refused, row.name) for row in top.trouble]
    dropped = [(row.recently_dropped, row.name) for row in top.trouble]
    yield from _trouble("refused", top.refused_per_second, refused)
    failed = [(row.failures, f"{row.name} ({_reasons(row)})") for row in top.trouble]
    yield from _trouble("dropped", top.dropped_per_second, dropped)
    yield from _trouble("failed to connect", top.failed_per_second, failed)
    if top.packets:
        reasons = ", ".join(f"{row.recently:,} {row.action} ({row.reason})" for row in top.packets)
        is_now = any(row.per_second for row in top.packets)
        yield Text(f"packets and sockets: {plain(reasons)}", _BAD if is_now else _WAS_BAD)
    elif not top.trouble:
        yield Text("nothing is refused or dropped", _QUIET)


def _reasons(row: ServiceRow) -> str:
    found = row.connects.recently_failed if row.connects is not None else {}
    return ", ".join(plain(reason) for reason in found)


def hint(measuring: MeasuringRow) -> str:
    """Why there are dashes, and what has to be switched on; empty without any."""
    measures = (
        ("FAILED/S, P50, P99", measuring.connections, "measureConnections (--measure-connections)"),
        ("BYTES/S", measuring.traffic, "measureTraffic (--measure-traffic)"),
    )
    off = [f"{columns} need {option}" for columns, nodes, option in measures if not nodes]
    some = [
        f"{columns} are of {nodes} of {measuring.nodes} nodes, with {option}"
        for columns, nodes, option in measures
        if 0 < nodes < measuring.nodes
    ]
    full = ["- in them: more Services are measured than there is room for"] * bool(measuring.full)
    return "; ".join([*off, *some, *full])


def _trouble(what: str, per_second: float, counts: list[tuple[int, str]]) -> Iterator[Text]:
    """A line, if any of these Services has refused or dropped anything since the start."""
    found = sorted((each for each in counts if each[0]), reverse=True)
    if found:
        names = [f"{plain(name)} {count:,}" for count, name in found[:_SHOWN_NAMES]]
        names += ["…"] * (len(found) > _SHOWN_NAMES)
        text = f"{what} {_rate(per_second)}/s; in all: {', '.join(names)}"
        yield Text(text, _BAD if per_second else _WAS_BAD)


def _chosen(rows: list[ServiceRow], room: int | None, *, backends: bool) -> list[ServiceRow | BackendRow]:
    """Active Services come first, then their backends, and others where there is still room."""
    spare = sys.maxsize if room is None else max(room - sum(row.is_active for row in rows), 0)
    found: list[ServiceRow | BackendRow] = []
    for row in rows:
        shown = row.backends[:spare] if backends and row.is_active else ()
        found += [row, *shown]
        spare -= len(shown)
    return found[:room]


def _name(row: ServiceRow | BackendRow) -> Cell:
    if isinstance(row, ServiceRow):
        return plain(row.name), ""
    notes = [row.state] * (row.state != "active")
    notes += [f"{count:,} {reason}" for reason, count in row.recently_failed.items()]
    return plain(f"  {row.address}/{row.protocol}" + f" ({', '.join(notes)})" * bool(notes)), _QUIET


def _line(name: Cell, cells: Iterable[Cell], columns: Iterable[_Column], name_width: int) -> Text:
    text, style = name
    fits = cell_len(text) <= name_width
    shown = text if fits else f"{set_cell_size(text, name_width - 1)}…"
    line = Text(set_cell_size(shown, name_width), style)
    for (number, look), column in zip(cells, columns, strict=True):
        line.append(f"{number:>{column.width}}", look)
    line.rstrip()
    return line


# -- a screen


class Screen:
    """Shows the last refresh until it is ended. One thread runs it, others show and end."""

    def __init__(self, sort: Sort, *, backends: bool) -> None:
        self._sort, self._backends = sort, backends
        self._shown: tuple[Top, str] | None = None
        self._error: BaseException | None = None
        self._is_ended = False
        self._wake, self._waker = os.pipe()
        # A signal handler writes there, too, and must not wait.
        os.set_blocking(self._waker, False)

    def show(self, top: Top, title: str = "") -> None:
        self._shown = top, title
        self._awake()

    def end(self, error: BaseException | None = None) -> None:
        """``error``: what :meth:`run` is to raise."""
        self._error, self._is_ended = error, True
        self._awake()

    def _awake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._waker, b".")

    def run(self) -> None:
        """Returns when somebody quits or ends it; the terminal is then as it was."""
        console = Console(highlight=False, markup=False)
        with ExitStack() as stack:
            typed = stack.enter_context(_keys())
            stack.enter_context(_woken_by_resizing(self._waker))
            live = stack.enter_context(
                Live(
                    console=console,
                    screen=True,
                    auto_refresh=False,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
            )
            while not self._is_ended:
                live.update(self._page(console), refresh=True)
                ready, _, _ = select.select([self._wake, *typed], [], [])
                if self._wake in ready:
                    os.read(self._wake, 4096)
                if any(each in ready for each in typed) and not self._obey(os.read(typed[0], 64)):
                    return
        if self._error is not None:
            raise self._error

    def _page(self, console: Console) -> Text:
        width, height = console.size
        if self._shown is None:
            return Text("measuring …", _QUIET)
        top, title = self._shown
        found = lines(top, self._sort, width, height - 2, backends=self._backends, title=title)
        found += [Text()] * (height - 1 - len(found))
        keys = Text("   ".join(filter(None, [_KEYS, hint(top.measuring)])), _QUIET)
        keys.truncate(width)
        return Text("\n", no_wrap=True, overflow="crop", end="").join([*found[: height - 1], keys])

    def _obey(self, keys: bytes) -> bool:
        """False if somebody quits; a terminal that is gone does."""
        for key in keys.decode(errors="replace"):
            if key == "s":
                self._sort = self._next_sort()
            elif key == "b":
                self._backends = not self._backends
            elif key in "qQ":
                return False
        return bool(keys)

    def _next_sort(self) -> Sort:
        """The next one whose column has numbers."""
        measuring = self._shown[0].measuring if self._shown is not None else MeasuringRow()
        empty = {each.sort for each in _COLUMNS if not each.is_measured(measuring)}
        order = [each for each in Sort if each is self._sort or each not in empty]
        return order[(order.index(self._sort) + 1) % len(order)]


@contextmanager
def _keys() -> Iterator[list[int]]:
    """Standard input, where it is a terminal, without waiting for whole lines."""
    if not sys.stdin.isatty():
        yield []
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    changed = termios.tcgetattr(fd)
    changed[3] &= ~(termios.ICANON | termios.ECHO)
    # A shell that gets the terminal back meanwhile would find it with the screen, and without echo.
    changed[6][termios.VSUSP] = b"\0"
    termios.tcsetattr(fd, termios.TCSADRAIN, changed)
    try:
        yield [fd]
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


@contextmanager
def _woken_by_resizing(waker: int) -> Iterator[None]:
    handler, writer = signal.signal(signal.SIGWINCH, lambda *_: None), signal.set_wakeup_fd(waker)
    try:
        yield
    finally:
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGWINCH, handler)
