"""``ebpfproxy trace``: programs report decisions, and pods have names, while a command holds the lease."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.background import BackgroundRunner
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.datapath.abi.decision_layout import TracingPrograms
from ebpfproxy.datapath.decisions import PodNames, Tracing
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.endpoints import SliceEndpoints
from ebpfproxy.services.tracker import Tracker

#: The least time between two writings of pods' names, in seconds.
_NAMES_SECONDS = 1.0


class TracingFollower:
    """Brings what a command wants to the programs. The reconciler calls it, a few times a second at least."""

    def __init__(
        self,
        options: AgentOptions,
        maps: MapSet,
        programs: ProgramManager,
        tracker: Tracker,
        background: BackgroundRunner,
    ) -> None:
        self._always = options.trace_decisions
        self._tracing = Tracing(maps)
        self._names = PodNames(maps)
        self._programs = programs
        self._tracker = tracker
        self._background = background
        #: The map of pods' names is empty unless somebody traces; an earlier agent may have left some.
        self._has_names = self._is_old = True
        self._is_written = self._is_writing = False
        self._next_names = 0.0

    def changed(self) -> None:
        """Endpoints may have changed."""
        self._is_old = True

    def stop(self) -> None:
        """The agent ends: plain programs are attached, and the command is told."""
        self._programs.stop_reporting()
        self._tracing.programs = TracingPrograms.PLAIN

    def follow(self) -> None:
        wanted = self._tracing.is_wanted
        self._programs.report_decisions(wanted or self._always)
        self._write_names(wanted)
        answer = self._programs.reporting
        if answer is TracingPrograms.REPORTING and not self._is_written:
            answer = TracingPrograms.PLAIN
        self._tracing.programs = answer

    def _write_names(self, wanted: bool) -> None:
        """Writes names of pods where that is due, in a worker: there may be many."""
        if self._is_writing or not (wanted or self._has_names):
            return
        now = time.monotonic()
        if wanted and self._is_written and not (self._is_old and now >= self._next_names):
            return
        self._is_writing, self._is_old, self._next_names = True, False, now + _NAMES_SECONDS
        slices = self._tracker.slices if wanted else []

        def written(_: None) -> None:
            self._is_writing, self._is_written, self._has_names = False, wanted, wanted

        self._background(lambda: self._names.bring(_names(slices)), written)


def _names(slices: Iterable[SliceEndpoints]) -> dict[bytes, str]:
    return {address: name for each in slices for address, name in each.pod_names()}
