"""The reconciler's recurring work: grace periods, stale sockets, sweeps.

Each kind runs in a worker, at most once at a time; its result is handled in the reconciler's thread, which
alone owns the writer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.background import BackgroundRunner, ReconcilerCall
from ebpfproxy.agent.forgotten_sockets import ForgottenSockets
from ebpfproxy.agent.stale_sockets import Ended, end_stale_sockets, peers_of
from ebpfproxy.datapath.abi.flow_layout import BackendUse
from ebpfproxy.datapath.affinity_table import forget_expired
from ebpfproxy.datapath.flows.decision_reports import DecisionReports
from ebpfproxy.datapath.flows.peers import recorded_removals
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.flows.sweeper import Sweep, Sweeper, set_timeouts
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.node.client_namespaces import ClientNamespaces
from ebpfproxy.datapath.services import frontend_cache
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.netlink.sock_diag import end_sockets
from ebpfproxy.node.clients import namespace_cookies

log = get_logger(__name__)

#: The time between two rounds, so that many removals in a row make one.
_ENDING_SECONDS = 0.1
#: The time between two sweeps of the conntrack map.
_SWEEP_SECONDS = 10.0
#: The time between two times that all frontends are cached, and the share of a processor that it may take.
_CACHING_SECONDS, _CACHING_SHARE = 1.0, 0.005
#: Until frontends that could not be cached are tried again.
_CACHING_AGAIN_SECONDS = 10.0


class _Turns:
    """When one kind of work has its turn: once at a time, and after pauses, in seconds."""

    def __init__(self) -> None:
        self._runs = False
        self._not_before = 0.0

    @property
    def is_due(self) -> bool:
        return not self._runs and time.monotonic() >= self._not_before

    def begin(self, pause: float = 0.0) -> None:
        """The next turn is no earlier than ``pause`` from now, even if this one ends before."""
        self._runs = True
        self._not_before = time.monotonic() + pause

    def end(self, pause: float = 0.0) -> None:
        self._runs = False
        self._not_before = max(self._not_before, time.monotonic() + pause)


class Housekeeping:
    """Starts the work, and handles its results. The reconciler calls it."""

    def __init__(
        self,
        options: AgentOptions,
        maps: MapSet,
        writer: Writer,
        *,
        grace: Grace,
        metrics: AgentMetrics,
        background: BackgroundRunner,
        call: ReconcilerCall,
    ) -> None:
        self._options = options
        self._maps = maps
        self._writer = writer
        self._grace = grace
        self._metrics = metrics
        self._background = background
        self._call = call
        self.clients = ClientNamespaces(maps)
        self._sweeper: Sweeper | None = None
        set_timeouts(maps, options.timeouts)
        self._forgotten = ForgottenSockets(maps, measures_traffic=options.measure_traffic)
        self._grace_periods, self._endings, self._sweeps = _Turns(), _Turns(), _Turns()
        self._comparisons, self._cachings = _Turns(), _Turns()
        self._has_adopted = False
        #: The generation of frontends that were cached last.
        self._cached: int | None = None
        #: Removed backends whose sockets have been closed.
        self._ended: dict[BackendUse, Removal] = {}
        #: Redirects for which there was no room, in this round.
        self._refused = 0
        #: Conntrack entries after the last sweep, and how many have been evicted so far.
        self.conntrack_entries = 0
        self.conntrack_evicted = 0

    def start(
        self, programs: Path | None, records: RecordPrograms | None, reports: DecisionReports | None
    ) -> None:
        """Starts the work that is due. Until ``programs`` are attached only grace periods are.

        ``reports``: who gets the agent's own decisions, if anybody wants them.
        """
        self._start_grace()
        if programs is not None and records is not None:
            if not self._has_adopted:
                # The redirects of maps of other sizes have been copied by now.
                self._has_adopted = True
                self._writer.redirects.adopt()
            self._start_ending(reports)
            self._start_sweep(programs)
            self._start_comparison(records)
            self._start_caching(records)

    # -- what was replaced

    def _start_grace(self) -> None:
        """Each grace period is for everything that was retired before it begins."""
        retired = self._writer.take_retired() if self._grace_periods.is_due else None
        if not retired:
            return
        self._grace_periods.begin()

        def passed(_: None) -> None:
            self._grace_periods.end()
            self._writer.reclaim(retired)
            self._writer.retry()

        self._background(self._grace.wait, passed)

    # -- sockets of backends that are gone

    def _start_ending(self, reports: DecisionReports | None) -> None:
        """Each round is for all backends that were removed before it begins."""
        if not self._endings.is_due:
            return
        removed, losers = self._writer.take_removed_backends(), self._writer.take_losers()
        if not removed and losers is None:
            return
        self._endings.begin(_ENDING_SECONDS)
        tcp = self._options.stale_tcp
        self._background(
            lambda: end_stale_sockets(
                self._maps,
                self._grace,
                removed,
                tcp,
                is_current=self._writer.is_current,
                has_frontend=self._writer.has_udp_frontend,
                losers=losers,
                redirect=self._redirect,
                reports=reports,
            ),
            self._sockets_ended,
        )

    def _redirect(self, wanted: dict[bytes, bytes]) -> None:
        """Called from a worker. Sockets for whose redirect there is no room are closed."""

        def redirect() -> None:
            refused = self._writer.redirects.add(wanted)
            if refused:
                self._refused += len(refused)
                stale = peers_of({key: wanted[key] for key in refused})
                self._background(
                    lambda: len(end_sockets(stale)), lambda n: self._metrics.ended_sockets("UDP", n)
                )

        # Not a worker's result: that could come after the round's, which says how many are redirected.
        self._call(redirect)

    def _sockets_ended(self, result: Ended) -> None:
        self._endings.end()
        self._ended.update(result.removed)
        for protocol, number in result.ended.items():
            self._metrics.ended_sockets(protocol, number)
        redirected, self._refused = result.redirected - self._refused, 0
        self._metrics.redirected_sockets(redirected)
        self._metrics.sockets_not_found(result.unseen)
        if redirected:
            log.info("redirected stale sockets", UDP=redirected)
        if any(result.ended.values()) or result.unseen:
            log.info("closed stale sockets", **result.ended, not_found=result.unseen)

    # -- flows and affinity that have expired

    def _start_sweep(self, programs: Path) -> None:
        if not self._sweeps.is_due:
            return
        self._sweeps.begin()
        if self._sweeper is None:
            timeouts = self._options.timeouts
            self._sweeper = Sweeper(self._maps, timeouts, programs, rest=lambda: time.sleep(0.001))
        sweeper = self._sweeper
        sweeper.use(programs)
        removed, backends = self._writer.removed_backends, self._writer.backends_end
        needs_client_key = self._writer.needs_client_key

        # A program that chose before the change has stored its choice by now.
        over = dict(removed.items() & self._ended.items())

        def sweep() -> tuple[Sweep, dict[bytes, int]]:
            swept = sweeper.sweep(backends)
            if swept.left:
                # Flows of removed backends are still there, whichever they are of.
                over.clear()
            forget_expired(self._maps, time.monotonic_ns())
            for key in recorded_removals(self._maps, over):
                del over[key]
            return swept, namespace_cookies() if needs_client_key else {}

        def done(found: tuple[Sweep, dict[bytes, int]]) -> None:
            swept, clients = found
            self._sweeps.end(max(_SWEEP_SECONDS, swept.rest))
            self._writer.forget_removed_backends(over)
            self._writer.redirects.sweep()
            self._ended = dict(self._ended.items() - over.items())
            self.clients.set(clients)
            self._writer.follow_routes()
            self.conntrack_entries = swept.entries
            self.conntrack_evicted += swept.evicted
            self._metrics.swept(swept, swept.removed)
            self._writer.retry()

        self._background(sweep, done)

    # -- records of sockets that were closed unseen

    def _start_comparison(self, programs: RecordPrograms) -> None:
        if not self._comparisons.is_due:
            return
        self._comparisons.begin()

        def done(removed: Mapping[str, int]) -> None:
            self._comparisons.end(self._options.socket_sweep_seconds)
            self._metrics.forgot_sockets(removed)
            if any(removed.values()):
                log.info("removed records of closed sockets", **removed)
                self._writer.retry()

        self._background(lambda: self._forgotten.sweep(programs), done)

    # -- what programs have to look up

    def _start_caching(self, programs: RecordPrograms) -> None:
        """Caches all frontends once some have changed. Until then programs look up what they need."""
        generation = frontend_cache.generation(self._maps)
        if generation == self._cached or not self._cachings.is_due:
            return
        self._cachings.begin()

        def cache() -> tuple[float, str]:
            used, problem = time.thread_time(), ""
            try:
                programs.cache(frontend_cache.frontends_to_cache(self._maps))
            except BpfError as error:
                # Such as without memory: programs look up what is not cached.
                problem = str(error)
            return time.thread_time() - used, problem

        def done(result: tuple[float, str]) -> None:
            used, problem = result
            if problem:
                log.info("frontends are not cached", error=problem)
            else:
                self._cached = generation
            pause = _CACHING_AGAIN_SECONDS if problem else _CACHING_SECONDS
            self._cachings.end(max(pause, used / _CACHING_SHARE))

        self._background(cache, done)
