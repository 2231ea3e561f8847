"""Looks from time to time whether maps and programs are still as the agent has left them, and repairs them.

A worker reads, slowly; the reconciler, which alone writes the maps, confirms what it suspects between two
changes of its own (``datapath.drift.checker``). ``ebpfproxy check`` asks for a comparison at once.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from ebpfproxy.agent import kube_events
from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.background import BackgroundRunner
from ebpfproxy.agent.programs import ProgramDrift, ProgramManager
from ebpfproxy.datapath.drift.checker import Checker, Reading
from ebpfproxy.datapath.drift.compare import Difference
from ebpfproxy.datapath.drift.findings import Describer, Finding, Repaired, Report, consequence_at
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
#: How many findings of a comparison are told in words; the others are counted.
_TOLD = 40
_EARLIER = 10


class _Asked(NamedTuple):
    answer: Callable[[Report], object]
    repairs: bool


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
        self._checker = Checker(maps, [*writer.owned(), *programs.packets.owned(), *others])
        self._metrics = metrics
        self._record = record
        self._background = background
        self._runs = False
        self._pause = self._every
        self._next = time.monotonic() + self._every
        self._asked: deque[_Asked] = deque()
        self._earlier: deque[Repaired] = deque(maxlen=_EARLIER)
        metrics.drift_of(ORDER)

    def ask(self, answer: Callable[[Report], object], *, repairs: bool) -> None:
        """Asks for a comparison, which begins as soon as it can; its report goes to ``answer``."""
        self._asked.append(_Asked(answer, repairs))

    def start(self) -> None:
        """Starts a comparison if one is due, or is asked for. Programs are attached, and maps complete."""
        if self._runs or self._programs.is_loading:
            return
        asked = self._asked[0] if self._asked else None
        if asked is None and (not self._every or time.monotonic() < self._next):
            return
        self._runs = True
        reading = self._checker.begin()

        def read() -> tuple[Reading, ProgramDrift]:
            rest = (lambda: None) if asked is not None else (lambda: time.sleep(_REST_SECONDS))
            began_cpu = time.thread_time()
            found = self._checker.read(reading, rest), self._programs.drifted()
            self._pause = max(self._every, min(_PAUSES * (time.thread_time() - began_cpu), _MOST_SECONDS))
            return found

        self._background(read, lambda found: self._done(*found, asked))

    def _done(self, reading: Reading, suspected: ProgramDrift, asked: _Asked | None) -> None:
        self._runs = False
        differences = self._checker.confirm(reading)
        # A device may have come or gone while it was looked at.
        programs = self._programs.drifted() if suspected else suspected
        is_unsettled = self._checker.is_unsettled
        self._next = time.monotonic() + (_AGAIN_SECONDS if is_unsettled else self._pause)
        if is_unsettled and asked is not None and not differences and not programs:
            # Nobody gets an answer from it: it is made once more.
            return
        total = len(differences) + sum(1 for _ in _of_programs(programs))
        repaired: list[Finding] = []
        if asked is None or asked.repairs:
            done: list[Difference] = []
            # What is read again soon leaves programs' cache alone.
            if differences or not is_unsettled:
                done = repair(self._maps, differences)
            repaired = self._repair_programs(programs, done)
            # An entry that has no room stays missing.
            differences, programs = _without(differences, done), ProgramDrift()
        if asked is not None:
            self._asked.popleft()
            findings = self._findings(differences, programs)
            untold = total - len(findings) - len(repaired)
            asked.answer(Report(tuple(findings), tuple(repaired), untold, tuple(self._earlier)))

    def _repair_programs(self, programs: ProgramDrift, done: list[Difference]) -> list[Finding]:
        """Repairs programs, and tells of that and of the entries that have been repaired."""
        if not done and not programs:
            return []
        findings = self._findings(done, programs)
        if programs:
            self._programs.repair(programs)
        self._report_repairs(done, programs, findings)
        now = time.time()
        self._earlier.extendleft(Repaired(now, each) for each in findings[:_EARLIER])
        return findings

    def _findings(self, differences: Iterable[Difference], programs: ProgramDrift) -> list[Finding]:
        if not differences and not programs:
            return []
        describer = Describer(self._maps, self._writer.names())
        return [
            *(describer.finding(each) for each in islice(differences, _TOLD)),
            *islice(_of_programs(programs), _TOLD),
        ]

    def _report_repairs(
        self, differences: Iterable[Difference], programs: ProgramDrift, findings: list[Finding]
    ) -> None:
        counts = Counter((each.map, str(each.kind)) for each in differences)
        counts.update((each.where, each.kind) for each in _of_programs(programs))
        self._metrics.drifted(counts)
        first = [f"{each.where}: {each.kind} {each.what}{_service(each)}" for each in findings[:3]]
        log.warning(
            "repaired what somebody else has changed",
            entries={f"{where} {kind}": number for (where, kind), number in sorted(counts.items())},
            first=first,
        )
        self._record(kube_events.drift_repaired(self._node, first, sum(counts.values())))


def _without(differences: Iterable[Difference], done: Iterable[Difference]) -> list[Difference]:
    repaired = frozenset(done)
    return [each for each in differences if each not in repaired]


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
                consequence=consequence_at(each.at),
            )
    for what in found.unpinned:
        yield Finding(
            where="pins",
            kind="missing",
            what=what,
            consequence="the next start of the agent does not find it",
        )
