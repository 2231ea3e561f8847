"""Decisions as they are made, for all who look at them: one trace, while there is anybody."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.decision_layout import SUCCESSES
from ebpfproxy.datapath.decisions import TracingInUseError
from ebpfproxy.datapath.dump import open_maps
from ebpfproxy.inspection.failures import FAILURES, told
from ebpfproxy.inspection.tracing import said, traced
from ebpfproxy.trace.rows import DecisionRow, words
from ebpfproxy.trace.session import EndedError, Filter, Session, TraceError

#: A page that is loaded again, or another of its views, goes on with the same programs.
_LINGER_SECONDS = 1.0
#: What is lost, and whether programs report, is looked at so often.
_STATE_SECONDS = 1.0
#: Until a trace is tried again that could not begin, or ended.
_AGAIN_SECONDS = 2.0
_END_SECONDS = 5.0
#: An event is sent at least so often: a connection that is gone is noticed by that.
_HEARTBEAT_SECONDS = 5.0
#: A stream ends whose viewer was not heard of for so long: one that is stopped takes nothing, and its
#: connection stays. One that cannot say that it looks begins anew after a while.
_SEEN_SECONDS, _UNNAMED_SECONDS = 30.0, 300.0
#: A page shows no more lines.
MOST_LINES = 500
_GOOD = {str(kind) for kind in SUCCESSES}
_NOTHING = Filter(kinds=frozenset())
_log = logging.getLogger(__name__)


class State(msgspec.Struct, frozen=True):
    """Whether decisions are reported now, and a sentence about that."""

    tracing: bool
    text: str


class Line(msgspec.Struct, frozen=True):
    """A decision, as it is shown. ``time`` in Unix seconds."""

    time: float
    good: bool
    client: str
    service: str
    frontend: str
    outcome: str
    details: str


class Lost(msgspec.Struct, frozen=True):
    """Decisions that were not shown: above the rate, not read in time, or more than a page has lines for."""

    limited: int = 0
    full: int = 0
    skipped: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.limited + other.limited, self.full + other.full, self.skipped + other.skipped)


class _Traced(NamedTuple):
    row: DecisionRow
    line: Line


class Viewer:
    """One who looks: a stream of events. The loop that makes it uses it; the trace's thread puts."""

    def __init__(self, wanted: Filter, name: str = "") -> None:
        """``name``: by which it says that it still looks."""
        self.wanted = wanted
        self.name = name
        self._seen = time.monotonic()
        #: What was said last.
        self.told: State | None = None
        self._kinds = frozenset(map(str, wanted.kinds))
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lines: deque[Line] = deque()
        self._states: list[State] = []
        self._lost = Lost()
        self._closed = False

    def put(self, decisions: Sequence[_Traced], others: Sequence[State | Lost] = ()) -> None:
        """Any thread may call this."""
        wanted = self.wanted
        lines = [
            line
            for row, line in decisions
            if row.kind in self._kinds
            and wanted.namespace in (None, row.namespace)
            and wanted.service in (None, row.service)
        ]
        if lines or others:
            # The loop may have ended meanwhile, and the process with it.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._add, lines, others)

    def look(self) -> None:
        """Somebody still looks."""
        self._seen = time.monotonic()

    def close(self) -> None:
        """Ends the stream."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: ``state``, ``lost``, and ``decisions``, several at once."""
        longest = _SEEN_SECONDS if self.name else _UNNAMED_SECONDS
        while not self._closed and time.monotonic() - self._seen < longest:
            try:
                await asyncio.wait_for(self._ready.wait(), _HEARTBEAT_SECONDS)
            except TimeoutError:
                yield b": nothing new\n\n"
                continue
            self._ready.clear()
            states, self._states = self._states, []
            lost, self._lost = self._lost, Lost()
            lines = list(self._lines)
            self._lines.clear()
            for each in states:
                yield _event("state", each)
            if lost != Lost():
                yield _event("lost", lost)
            if lines:
                yield _event("decisions", lines)

    def _add(self, lines: Iterable[Line], others: Iterable[State | Lost]) -> None:
        self._lines.extend(lines)
        skipped = max(0, len(self._lines) - MOST_LINES)
        for _ in range(skipped):
            self._lines.popleft()
        self._lost += Lost(skipped=skipped)
        for each in others:
            if isinstance(each, State):
                self._states.append(each)
            else:
                # One sum, however long a viewer takes nothing.
                self._lost += each
        self._ready.set()

    def _end(self) -> None:
        self._closed = True
        self._ready.set()


def _event(name: str, value: object) -> bytes:
    """JSON has no line breaks of its own."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(value))


class Live:
    """Viewers come and go; a thread traces while there are any."""

    def __init__(self, bpf_root: Path) -> None:
        self._bpf_root = bpf_root
        self._lock = threading.Condition()
        self._viewers: set[Viewer] = set()
        self._changed = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._state: State | None = None
        #: Since when nobody looks; only the thread uses it.
        self._alone: float | None = None

    def join(self, viewer: Viewer) -> None:
        with self._lock:
            if self._closed:
                viewer.close()
                return
            self._viewers.add(viewer)
            self._changed = True
            # It is told of a running trace once programs report what it wants, too.
            if self._state is not None and not self._state.tracing:
                self._tell(self._state)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
                self._thread.start()

    def look(self, name: str) -> None:
        """The viewer of that name still looks, if it is there."""
        with self._lock:
            found = [each for each in self._viewers if each.name == name]
        for each in found:
            each.look()

    def leave(self, viewer: Viewer) -> None:
        with self._lock:
            self._viewers.discard(viewer)
            self._changed = True
            self._lock.notify_all()

    def end_streams(self) -> None:
        """The server ends: streams end, and none begins any more. A signal's handler may call this."""
        self._closed = True
        for each in tuple(self._viewers):
            each.close()

    def wait(self) -> None:
        """Waits for the end of the trace, but not for an agent that hangs: its lease ends by itself."""
        with self._lock:
            self._viewers.clear()
            self._lock.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(_END_SECONDS)

    # -- the thread

    def _run(self) -> None:
        try:
            while self._goes_on():
                try:
                    self._trace()
                except EndedError:
                    pass
                except (TraceError, TracingInUseError, OSError, *FAILURES) as error:
                    self._fail(told(error))
                except Exception as error:
                    # The thread goes on, or the page would say that it traces.
                    _log.exception("the trace has ended")
                    self._fail(f"not tracing, by an error of ebpfproxy ui: {error!r}")
        finally:
            with self._lock:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _goes_on(self) -> bool:
        with self._lock:
            wanted = bool(self._viewers) and not self._closed
            if not wanted:
                self._thread = self._state = None
            return wanted

    def _fail(self, text: str) -> None:
        """Says why nothing is traced, and waits before the next try."""
        self._say(State(tracing=False, text=text))
        with self._lock:
            if self._viewers and not self._closed:
                self._lock.wait(_AGAIN_SECONDS)

    def _is_watched(self) -> bool:
        """False once nobody has looked for a while, or where the server ends."""
        if self._viewers:
            self._alone = None
        elif self._alone is None:
            self._alone = time.monotonic()
        lingers = self._alone is None or time.monotonic() - self._alone < _LINGER_SECONDS
        return lingers and not self._closed

    def _trace(self) -> None:
        if self._state is None:
            self._say(State(tracing=False, text="waiting for programs that report decisions"))
        maps = open_maps(self._bpf_root)
        try:
            with traced(self._bpf_root, maps, self._wanted(), self._is_watched) as session:
                self._follow(session)
        finally:
            maps.close()

    def _follow(self, session: Session) -> None:
        next_state = 0.0
        for rows in session.rows():
            if not self._is_watched():
                return
            now, viewers = time.monotonic(), tuple(self._viewers)
            if self._changed:
                session.change(self._wanted())
                if self._state is not None:
                    self._say(self._state)
            decisions = [_Traced(row, _line(row)) for row in rows]
            for each in viewers:
                each.put(decisions)
            if now >= next_state:
                next_state = now + _STATE_SECONDS
                self._look(session)

    def _look(self, session: Session) -> None:
        is_reported = session.is_reported
        self._say(State(is_reported, said(is_reported=is_reported)))
        limited, full = session.newly_lost()
        if limited or full:
            for each in tuple(self._viewers):
                each.put((), (Lost(limited, full),))

    def _say(self, state: State) -> None:
        with self._lock:
            self._state = state
            self._tell(state)

    def _tell(self, state: State) -> None:
        """Tells those who do not know it."""
        for each in self._viewers:
            if each.told != state:
                each.told = state
                each.put((), (state,))

    def _wanted(self) -> Filter:
        """What all viewers want together: programs report nothing else."""
        with self._lock:
            self._changed = False
            wanted = [each.wanted for each in self._viewers]
        if not wanted:
            return _NOTHING
        namespaces, services = {each.namespace for each in wanted}, {each.service for each in wanted}
        return Filter(
            namespace=namespaces.pop() if len(namespaces) == 1 else None,
            service=services.pop() if len(services) == 1 else None,
            kinds=frozenset().union(*(each.kinds for each in wanted)),
        )


def _line(row: DecisionRow) -> Line:
    found = words(row)
    return Line(
        row.time,
        row.kind in _GOOD,
        found.client,
        found.service,
        found.frontend,
        found.outcome,
        found.details,
    )
