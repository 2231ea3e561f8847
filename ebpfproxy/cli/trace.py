"""``ebpfproxy trace``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebpfproxy.agent import state
from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import echo, json_of, plain
from ebpfproxy.config.urls import url_problem
from ebpfproxy.datapath.abi.decision_layout import DEFAULT_RATE, SUCCESSES, DecisionKind
from ebpfproxy.datapath.decisions import TracingInUseError
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.datapath.kernel.roots import pin_folder
from ebpfproxy.inspection.tracing import said, traced
from ebpfproxy.otlp.libraries import OtlpError, require_libraries
from ebpfproxy.services.values import parse_address
from ebpfproxy.trace.rotation import RotatingFile
from ebpfproxy.trace.rows import DecisionRow, text
from ebpfproxy.trace.session import Filter, Session, TraceError

if TYPE_CHECKING:
    from ebpfproxy.trace.decision_sender import DecisionSender

_LOST_SECONDS = 1.0


@click.command("trace")
@options.bpf_root
@options.namespace
@options.service
@click.option(
    "--pod",
    metavar="[NAMESPACE/]NAME|ADDRESS",
    help="Only this client: a pod that is an endpoint, a network namespace, by its name, or an address. The"
    " default namespace is that of --namespace.",
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([str(kind) for kind in DecisionKind]),
    multiple=True,
    help="Only this kind; can be given more than once.",
)
@click.option("--errors", is_flag=True, help="Everything but chosen and affinity-hit.")
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Of chosen and affinity-hit only one in N, at random.",
)
@click.option(
    "--rate",
    type=click.IntRange(1, 1_000_000),
    default=DEFAULT_RATE,
    show_default=True,
    help="Decisions a second, of each CPU. Those above are counted, not shown.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Exit after N decisions.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Output format; JSON is one object a line.",
)
@click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="Write JSON lines to this file instead, for log shippers.",
)
@click.option(
    "--file-size",
    type=click.IntRange(1, 100_000),
    default=100,
    show_default=True,
    metavar="MB",
    help="Rename the file to PATH.1 when it is so large, PATH.1 to PATH.2, and so on.",
)
@click.option(
    "--files",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    metavar="N",
    help="Keep so many files.",
)
@click.option(
    "--otlp-endpoint",
    metavar="URL",
    help="Send decisions as log records to this OpenTelemetry collector instead (OTLP over HTTP), such as "
    "http://127.0.0.1:4318, to /v1/logs below it.",
)
def command(
    *,
    bpf_root: Path,
    namespace: str | None,
    service: str | None,
    pod: str | None,
    kinds: tuple[str, ...],
    errors: bool,
    sample: int,
    rate: int,
    count: int | None,
    output: str,
    path: Path | None,
    file_size: int,
    files: int,
    otlp_endpoint: str | None,
) -> None:
    """Show each decision as it is made: which backend a connection gets, or why it gets none.

    It is one line for a connection, for a flow of packets and for a socket's datagrams to a Service, not for
    each packet. The agent replaces its programs for as long as this runs; connections do not notice. What is
    lost is said on standard error.
    """
    if path is not None and otlp_endpoint is not None:
        raise click.UsageError("--file excludes --otlp-endpoint")
    if otlp_endpoint is not None and (problem := url_problem(otlp_endpoint)):
        raise click.UsageError(f"--otlp-endpoint: {problem}")
    namespace, service, pod = _names(namespace, service, pod)
    with one_line():
        maps = open_maps(bpf_root)
        wanted = Filter(
            namespace=namespace,
            service=service,
            pod=pod,
            kinds=_kinds(kinds, errors=errors),
            one_in=sample,
            rate=rate,
        )
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            file = _File(path, file_size * 1_000_000, files) if path is not None else None
            with _collector(bpf_root, otlp_endpoint) as collector, traced(bpf_root, maps, wanted) as running:
                if running.doubt:
                    echo(running.doubt, err=True)
                write = collector.write if collector is not None else _writer(output, file)
                _print(running, write, count)
        except (OtlpError, TraceError, TracingInUseError) as error:
            raise click.ClickException(str(error)) from error
        except (KeyboardInterrupt, BrokenPipeError):
            # It ends this way, or at the end of a pipe, as of tail -f.
            sys.stderr.close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _kinds(names: tuple[str, ...], *, errors: bool) -> frozenset[DecisionKind]:
    found = frozenset(kind for kind in DecisionKind if not names or str(kind) in names)
    if errors:
        found -= SUCCESSES
    if not found:
        raise click.UsageError("--errors leaves none of the kinds")
    return found


def _names(
    namespace: str | None, service: str | None, pod: str | None
) -> tuple[str | None, str | None, str | None]:
    """Namespace and name of the Service, and the pod with its namespace."""
    found = options.one_service(namespace, service)
    # An address has no namespace: `kubectl ebpfproxy` names pods so.
    is_bare = pod is not None and not options.has_namespace("--pod", pod)
    if is_bare and namespace is not None and parse_address(pod or "") is None:
        pod = f"{namespace}/{pod}"
    return *found, pod


Write = Callable[[list[DecisionRow]], None]


def _print(running: Session, write: Write, count: int | None) -> None:
    ends = _ending()
    shown, next_lost, was_reported = 0, 0.0, False
    for rows in running.rows():
        some = rows if count is None else rows[: count - shown]
        write(some)
        shown += len(some)
        now = time.monotonic()
        if now >= next_lost or shown == count:
            next_lost = now + _LOST_SECONDS
            _say_lost(running)
            if (is_reported := running.is_reported) is not was_reported:
                was_reported = is_reported
                echo(said(is_reported=is_reported), err=True)
        if shown == count:
            return
        if ends.is_set():
            # What programs have reported until now is shown, or counted as lost.
            if count is None:
                write(running.rest())
            _say_lost(running)
            return


def _ending() -> threading.Event:
    """An event that the first SIGINT or SIGTERM sets; the second interrupts, also where a pipe is full."""
    ends = threading.Event()

    def end(*_: object) -> None:
        if ends.is_set():
            raise KeyboardInterrupt
        ends.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return ends


@contextmanager
def _collector(bpf_root: Path, endpoint: str | None) -> Iterator[DecisionSender | None]:
    """Raises OtlpError."""
    if endpoint is None:
        yield None
        return
    require_libraries("--otlp-endpoint")
    from ebpfproxy.trace.decision_sender import DecisionSender  # noqa: PLC0415 - of an extra

    agent = state.load_latest(pin_folder(bpf_root))
    node = agent.node if agent is not None else ""
    sender = DecisionSender(endpoint, node, lambda said: echo(said, err=True))
    try:
        yield sender
    finally:
        sender.close()


class _File:
    """A file of lines, whose errors are said in one line.

    They are told apart here from those of BPF and of a pipe, which are OSErrors, too.
    """

    def __init__(self, path: Path, size: int, files: int) -> None:
        self._path = path
        with self._errors():
            self._file = RotatingFile(path, size, files)

    def write(self, lines: Iterable[str]) -> None:
        with self._errors():
            self._file.write(lines)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise click.ClickException(f"{self._path}: {error.strerror or error}") from error


def _writer(output: str, file: _File | None) -> Write:
    """Writes rows to the file, which has JSON, or to standard output."""
    form = "json" if file is not None else output

    def show(lines: Iterable[str]) -> None:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()

    write = file.write if file is not None else show

    def written(rows: list[DecisionRow]) -> None:
        if rows:
            write(_line(row, form) for row in rows)

    return written


def _line(row: DecisionRow, output: str) -> str:
    return json_of(row) if output == "json" else plain(text(row))


def _say_lost(running: Session) -> None:
    limited, full = running.newly_lost()
    if limited:
        echo(f"lost {limited} decisions above --rate", err=True)
    if full:
        echo(f"lost {full} decisions: they were not read in time", err=True)
