"""Changes of the maps: the writer gets what the tracker knows, and all that tell of it hear of it.

These are health checks, the record of the agent's state, metrics, Kubernetes events and the log.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence

from ebpfproxy.agent import kube_events
from ebpfproxy.agent.serving import Serving
from ebpfproxy.agent.status_record import Status
from ebpfproxy.datapath.services.capacity import CapacityError
from ebpfproxy.datapath.services.former import Former, with_former, without_service
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.health.node_port import ServiceHealth
from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.services.model import Family, ServicePortKey
from ebpfproxy.services.tracker import Tracker, Update

log = get_logger(__name__)

#: A change of more service ports than these is a new list, or a cluster that grew.
_MANY_CHANGES = 1000


class Programming:
    """Brings the maps to what the tracker knows. One thread uses it."""

    def __init__(
        self,
        node: str,
        tracker: Tracker,
        writer: Writer,
        serving: Serving,
        status: Status,
        *,
        metrics: AgentMetrics,
        record: Callable[[KubeEvent], None],
        former: Callable[[], Former],
        started: float,
    ) -> None:
        """``record`` takes Kubernetes events. ``former`` reads maps of other sizes.

        ``started``: when the agent started, in Unix seconds.
        """
        self._node = node
        self._tracker = tracker
        self._writer = writer
        self._serving = serving
        self._status = status
        self._metrics = metrics
        self._record = record
        self._former = former
        self._started = started
        #: True once everything that is known has been programmed.
        self.complete = False
        #: What has an id for the copy of its connections only.
        self._gone = set[ServicePortKey]()

    @property
    def is_due(self) -> bool:
        return self._tracker.synced and (self._tracker.pending or not self.complete)

    def apply(self) -> None:
        """Programs everything the first time, then what has changed."""
        self._serving.health.queued()
        self._metrics.queued(time.time())
        began = time.monotonic()
        update = self._tracker.drain()
        full = not self.complete
        former = self._former() if full else {}
        if former:
            # What is not wanted any more then leaves with the complete state, as it would in maps that stay.
            self._writer.apply(list(with_former(update.changed, former)))
        problems = self._writer.apply(update.changed, update.removed, complete=full)
        self._gone.difference_update(port.key for port in update.changed)
        if gone := list(without_service(update.changed, former)):
            # Where there is no room for it, its connections are not copied.
            self._writer.apply(gone)
            self._gone = {port.key for port in gone}
        done = time.monotonic()
        if full or len(update.changed) > _MANY_CHANGES:
            # What is known now mostly stays: the collector, which the agent begins without, need not walk it
            # for every change.
            if not full:
                gc.collect()
            gc.freeze()
            gc.enable()
        self.complete = True
        self._serving.health.programmed()
        self._serving.node_port_health.update(ServiceHealth(*check) for check in self._tracker.health_checks)
        self._status.programmed(done - began)
        self._measure(update, began, done, full=full)
        self._report(update, problems)
        log.debug("programmed", changed=len(update.changed), removed=len(update.removed))
        if full:
            log.info(
                "programmed all Services",
                service_ports=self._writer.service_ports,
                frontends=self._writer.frontends,
                backends=self._writer.backends,
                seconds=round(done - began, 3),
            )

    def drop_gone(self) -> None:
        """Removes what is no Service any more: its connections have been copied from maps of other sizes."""
        if self._gone:
            self._writer.apply((), self._gone)
            self._gone.clear()

    def _measure(self, update: Update, began: float, done: float, *, full: bool) -> None:
        """``began`` and ``done`` are monotonic seconds."""
        metrics, now = self._metrics, time.time()
        metrics.no_local_endpoints(self._tracker.without_local_endpoints)
        families = set(Family) if full else {port.key.family for port in update.changed}
        families |= {key.family for key in update.removed}
        metrics.programmed(families, done - began, full=full, now=now)
        metrics.changes(update.service_changes, update.endpoint_changes)
        for received in update.received:
            metrics.event_to_map.observe(done - received)
        for trigger in update.triggers:
            # One from before this agent's start was programmed by another (KEP-2433's metric does so, too).
            if trigger > self._started:
                metrics.network_programming(families, max(0.0, now - trigger))

    def _report(self, update: Update, problems: Sequence[CapacityError]) -> None:
        for warning in update.warnings:
            self._metrics.warned(str(warning.resource))
            log.warning(
                "ignoring invalid field",
                resource=str(warning.resource),
                object=str(warning.key),
                field=warning.field,
                error=warning.message,
            )
            self._record(kube_events.value_not_used(warning))
        for problem in problems:
            self._metrics.did_not_fit()
            log.error("failed to program a service port, trying again when there is room", error=str(problem))
        for kube_event in kube_events.no_room(self._node, problems):
            self._record(kube_event)
