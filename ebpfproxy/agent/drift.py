"""Looks from time to time whether maps and programs are still as the agent has left them, and repairs them.

A worker reads, slowly; the reconciler, which alone writes the maps, confirms what it suspects between two
changes of its own (``datapath.drift.checker``). ``ebpfproxy check`` asks for a comparison at once.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator

from ebpfproxy.agent import check_record, kube_events
from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.background import BackgroundRunner
from ebpfproxy.agent.check_record import Repaired, Report, Request
from ebpfproxy.agent.programs import ProgramDrift, ProgramManager
from ebpfproxy.datapath.drift.checker import Checker, Reading
from ebpfproxy.datapath.drift.compare import Difference
from ebpfproxy.datapath.drift.findings import Describer, Finding
from ebpfproxy.datapath.drift.repair import ORDER, repair
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics

log = get_logger(__name__)

#: After each part that is read: a comparison is spread over a second, and other threads come first.
_REST_SECONDS = 0.01
#: Until what the agent itself was writing is read again.
_AGAIN_SECONDS = 0.5
#: The pause after a comparison is so many times its CPU time, but no longer than this, whatever is set.
_PAUSES, _MOST_SECONDS = 100, 8.0
#: How often requests of the command are looked for.
_REQUEST_SECONDS = 0.5
#: So many findings of a comparison are told in words; the others are counted.
_TOLD = 40
_EARLIER = 10


class DriftCheck:
    """One comparison at a time. The reconciler calls it."""

    def __init__(
        self,
        options: AgentOptions,
        maps: MapSet,
        writer: Writer,
        programs: ProgramManager,
        others: Iterable[Owned],
        *,
        metrics: AgentMetrics,
        record: Callable[[KubeEvent], None],
        background: BackgroundRunner,
    ) -> None:
        """``others``: tables that neither the writer nor the programs' manager writes."""
        self._node = options.node_name
        self._every = options.drift_check_seconds
        self._maps = maps
        self._writer = writer
        self._programs = programs
        self._checker = Checker(maps, [*writer.owned(), *programs.owned(), *others])
        self._metrics = metrics
        self._record = record
        self._background = background
        self._runs = False
        self._pause = self._every
        self._next = time.monotonic() + self._every
        self._next_look = 0.0
        # A request that an earlier agent has left is not for this one.
        last = check_record.asked(maps)
        self._answered = last.serial if last is not None else 0
        self._earlier: deque[Repaired] = deque(maxlen=_EARLIER)
        metrics.drift_of(ORDER)

    def start(self) -> None:
        """Starts a comparison if one is due, or is asked for. Programs are attached, and maps complete."""
        if self._runs:
            return
        request = self._request()
        if request is None and (not self._every or time.monotonic() < self._next):
            return
        self._runs = True
        reading, began = self._checker.begin(), time.monotonic()

        def read() -> tuple[Reading, ProgramDrift]:
            rest = (lambda: None) if request is not None else (lambda: time.sleep(_REST_SECONDS))
            began_cpu = time.thread_time()
            found = self._checker.read(reading, rest), self._programs.drifted()
            self._pause = max(self._every, min(_PAUSES * (time.thread_time() - began_cpu), _MOST_SECONDS))
            return found

        self._background(read, lambda found: self._done(*found, request, began))

    def _request(self) -> Request | None:
        now = time.monotonic()
        if now < self._next_look:
            return None
        self._next_look = now + _REQUEST_SECONDS
        found = check_record.asked(self._maps)
        return found if found is not None and found.serial != self._answered else None

    def _done(self, reading: Reading, suspected: ProgramDrift, request: Request | None, began: float) -> None:
        self._runs = False
        differences = self._checker.confirm(reading)
        # A device may have come or gone while it was looked at.
        programs = self._programs.drifted() if suspected else suspected
        again = self._checker.is_unsettled
        self._next = time.monotonic() + (_AGAIN_SECONDS if again else self._pause)
        if again and request is not None and not differences and not programs:
            # It is not answered, and so looked for again.
            return
        repairs = request is None or request.repair
        if repairs:
            # An entry that has no room stays missing: the writer tells of that.
            differences = repair(self._maps, differences)
        findings = self._told(differences, programs)
        if (differences or programs) and repairs:
            self._repaired(differences, programs, findings)
        if request is not None:
            self._answered = request.serial
        if repairs:
            now = time.time()
            self._earlier.extendleft(Repaired(now, each) for each in findings[:_EARLIER])
        total = len(differences) + sum(1 for _ in _of_programs(programs))
        self._answer(request, findings, total, began, repaired=repairs)

    def _told(self, differences: list[Difference], programs: ProgramDrift) -> list[Finding]:
        if not differences and not programs:
            return []
        describer = Describer(self._maps, self._writer.names())
        return [
            *(describer.finding(each) for each in differences[:_TOLD]),
            *list(_of_programs(programs))[:_TOLD],
        ]

    def _repaired(
        self, differences: list[Difference], programs: ProgramDrift, findings: list[Finding]
    ) -> None:
        """Repairs programs, and tells of all that is repaired."""
        if programs:
            self._programs.repair(programs)
        counts = Counter((each.map, str(each.kind)) for each in differences)
        counts.update((each.where, each.kind) for each in _of_programs(programs))
        self._metrics.drifted(counts)
        told = [f"{each.where}: {each.kind} {each.what}{_service(each)}" for each in findings[:3]]
        log.warning(
            "repaired what somebody else has changed",
            entries={f"{where} {kind}": number for (where, kind), number in sorted(counts.items())},
            first=told,
        )
        self._record(kube_events.drift_repaired(self._node, told, sum(counts.values())))

    def _answer(
        self, request: Request | None, findings: list[Finding], total: int, began: float, *, repaired: bool
    ) -> None:
        if request is None and not findings:
            return
        check_record.answer(
            self._maps,
            Report(
                serial=request.serial if request is not None else 0,
                checked=time.time(),
                took=time.monotonic() - began,
                every=self._every,
                repaired=repaired,
                total=total,
                findings=tuple(findings),
                earlier=tuple(self._earlier),
            ),
        )


def _service(finding: Finding) -> str:
    return f" of {finding.service}" if finding.service else ""


def _of_programs(found: ProgramDrift) -> Iterator[Finding]:
    for each in found.hooks:
        yield Finding(
            where="programs",
            kind=each.kind,
            what=each.at,
            consequence="sockets of this node are not translated there",
        )
    for drifts in found.devices.values():
        for each in drifts:
            yield Finding(
                where="devices",
                kind=each.kind,
                what=each.at,
                consequence="packets of clients outside, and replies to them, are not translated there",
            )
    for what in found.unpinned:
        yield Finding(
            where="pins",
            kind="missing",
            what=what,
            consequence="the next start of the agent does not find it",
        )
