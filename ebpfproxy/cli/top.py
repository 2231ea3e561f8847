"""``ebpfproxy top``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.option_types import Seconds
from ebpfproxy.cli.output import console, echo, json_of
from ebpfproxy.datapath.dump import CurrentMaps
from ebpfproxy.inspection.measuring import measuring
from ebpfproxy.top.comparison import Comparison, Wanted
from ebpfproxy.top.reading import Reader
from ebpfproxy.top.rows import Sort, Top

_SECONDS = 2.0
#: The first numbers of a screen come sooner.
_FIRST_SECONDS = 0.5
_SHORTEST = 0.1
_ROWS = 20
#: A large terminal has room for so many; the number counts for each sort key.
SCREEN_ROWS = 60


@click.command("top")
@options.bpf_root
@options.namespace
@options.service
@click.option(
    "-s",
    "--sort",
    type=click.Choice([str(each) for each in Sort]),
    multiple=True,
    default=[str(Sort.CONNECTIONS)],
    show_default=True,
    help="What comes first. More than one: the first --rows by each of them, in the order of the first.",
)
@click.option(
    "--rows",
    type=click.IntRange(0),
    metavar="K",
    help=f"How many Services; 0 for all.  [default: {_ROWS}; a terminal's height]",
)
@click.option(
    "--backends",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Of each Service the N busiest backends; in a terminal as far as there is room.",
)
@click.option(
    "-i",
    "--interval",
    type=Seconds(),
    default=f"{_SECONDS:g}s",
    show_default=True,
    help="Time between refreshes.",
)
@click.option("--once", is_flag=True, help="Measure for one interval, print it, and exit.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Output format; JSON is one object a line.",
)
def command(
    *,
    bpf_root: Path,
    namespace: str | None,
    service: str | None,
    sort: tuple[str, ...],
    rows: int | None,
    backends: int,
    interval: float,
    once: bool,
    output: str,
) -> None:
    """Show Services and their backends by new connections, live; what is refused or dropped comes first.

    It reads what programs count on this node, also while no agent runs, and costs connections nothing.
    Datagrams of unconnected sockets count as connections. FAILED/S, P50 and P99 (how long connections of the
    last 30 seconds took to be established) need measureConnections, BYTES/S needs measureTraffic. In a
    terminal the keys are q (quit), s (sort by something else) and b (backends or none).
    """
    if interval < _SHORTEST:
        raise click.BadParameter(f"shorter than {_SHORTEST:g}s", param_hint="--interval")
    namespace, service = options.one_service(namespace, service)
    wanted = Wanted(
        sort=tuple(map(Sort, sort)),
        rows=_ROWS if rows is None else rows,
        backends=backends,
        namespace=namespace,
        service=service,
    )
    with one_line():
        maps = CurrentMaps(bpf_root)
        with _interruptible(once=once):
            if not once and output == "table" and is_live():
                # Another order needs no other numbers.
                every = tuple(dict.fromkeys([*wanted.sort, *Sort]))
                numbers = _Numbers(maps, wanted._replace(sort=every, rows=rows or SCREEN_ROWS))
                _live(numbers, wanted.sort[0], interval, backends=backends > 0)
            else:
                _print(_Numbers(maps, wanted), wanted.sort[0], interval, output, once=once)


class _Numbers:
    """Compares readings of the same maps. One thread uses it."""

    def __init__(self, maps: CurrentMaps, wanted: Wanted) -> None:
        self._maps, self._wanted = maps, wanted
        self._comparison: Comparison | None = None

    def begin(self) -> None:
        maps = self._maps.get()
        self._comparison = Comparison(Reader(maps), self._wanted, time.monotonic(), partial(measuring, maps))

    def next(self) -> Top | None:
        """None where the agent has made other maps since: it begins anew then."""
        if self._comparison is None or self._maps.are_replaced:
            # It reads memory of the former maps, which are closed now.
            self._comparison = None
            self.begin()
            return None
        return self._comparison.next(time.monotonic(), time.time())


def is_live() -> bool:
    """True where standard output is a terminal that can show a screen."""
    from rich.console import Console  # noqa: PLC0415 - JSON needs nothing of it

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


@contextmanager
def _interruptible(*, once: bool) -> Iterator[None]:
    """Ends this way, or at the end of a pipe, as ``tail -f`` does, unless one result is awaited."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        if once:
            raise
        # The interpreter would complain of the pipe at its end.
        sys.stderr.close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _live(numbers: _Numbers, sort: Sort, interval: float, *, backends: bool) -> None:
    from ebpfproxy.cli.top_screen import Screen  # noqa: PLC0415 - only a terminal needs it

    def feed() -> None:
        try:
            numbers.begin()
            pause = min(interval, _FIRST_SECONDS)
            while not ended.wait(pause):
                if (found := numbers.next()) is not None:
                    screen.show(found)
                pause = interval
        except BaseException as error:
            screen.end(error)

    screen, ended = Screen(sort, backends=backends), threading.Event()
    feeding = threading.Thread(target=feed, daemon=True)
    feeding.start()
    try:
        screen.run()
    finally:
        ended.set()


def _print(numbers: _Numbers, sort: Sort, interval: float, output: str, *, once: bool) -> None:
    numbers.begin()
    while True:
        time.sleep(interval)
        if (found := numbers.next()) is None:
            continue
        if output == "json":
            click.echo(json_of(found))
        else:
            print_rows(found, sort)
        if once:
            return
        if output != "json":
            echo()
        sys.stdout.flush()


def print_rows(found: Top, sort: Sort) -> None:
    from ebpfproxy.cli.top_screen import lines  # noqa: PLC0415 - JSON needs nothing of it

    out = console()
    for line in lines(found, sort, out.width if sys.stdout.isatty() else None):
        out.print(line)
