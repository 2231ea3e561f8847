"""Metrics, log lines and events of one change of the maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ebpfproxy.agent import kube_events
from ebpfproxy.datapath.services.capacity import CapacityError
from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.logs import get_logger
from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.services.model import Family
from ebpfproxy.services.tracker import Update

log = get_logger(__name__)


def programmed(
    metrics: AgentMetrics,
    record: Callable[[KubeEvent], None],
    node: str,
    update: Update,
    problems: Sequence[CapacityError],
    *,
    began: float,
    done: float,
    started: float,
    full: bool,
) -> None:
    """Reports a change of the maps.

    ``began`` and ``done`` are monotonic seconds, ``started`` is the agent's start in Unix seconds.
    """
    now = time.time()
    families = set(Family) if full else {port.key.family for port in update.changed}
    families |= {key.family for key in update.removed}
    metrics.programmed(families, done - began, full=full, now=now)
    metrics.changes(update.service_changes, update.endpoint_changes)
    for received in update.received:
        metrics.event_to_map.observe(done - received)
    for trigger in update.triggers:
        # One from before this agent's start was programmed by another (KEP-2433's metric does so, too).
        if trigger > started:
            metrics.network_programming(families, max(0.0, now - trigger))
    for warning in update.warnings:
        metrics.warned(str(warning.resource))
        log.warning(
            "ignoring invalid field",
            resource=str(warning.resource),
            object=str(warning.key),
            field=warning.field,
            error=warning.message,
        )
        record(kube_events.value_not_used(warning))
    for problem in problems:
        metrics.did_not_fit()
        log.error("failed to program a service port, trying again when there is room", error=str(problem))
    for kube_event in kube_events.no_room(node, problems):
        record(kube_event)
    log.debug("programmed", changed=len(update.changed), removed=len(update.removed))
