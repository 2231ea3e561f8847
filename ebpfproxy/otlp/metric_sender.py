"""Sends the metrics of a registry, again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    MetricExportResult,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry

from ebpfproxy.otlp.convert import converted, in_requests
from ebpfproxy.otlp.delivery import Delivery, Outcome
from ebpfproxy.otlp.origin import SCOPE, url

#: Points in one request: a collector takes 20 MB.
_POINTS = 5000


class MetricSender:
    """Collectors of ``registry`` are called in a thread of this."""

    def __init__(
        self,
        endpoint: str,
        resource: Resource,
        registry: CollectorRegistry,
        seconds: float,
        changed: Callable[[str], None],
    ) -> None:
        """``seconds``: between two sendings. ``changed``: as of :class:`Delivery`, called in the thread."""
        self._resource = resource
        self._registry, self._seconds = registry, seconds
        self._delivery = Delivery(changed)
        self._exporter = OTLPMetricExporter(url(endpoint, "metrics"), session=self._delivery.session)
        #: Counters of maps may have counted before this agent. A first point without duration says that
        #: what it has is older, and later ones count from there (OpenTelemetry: "unknown start time").
        self._began: int | None = None
        #: How often metrics were not sent, or not all of them.
        self.missed = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)

    @property
    def outcome(self) -> Outcome:
        return self._delivery.outcome

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Nothing is sent any more, not even what is new: another agent of this node may send already."""
        self._ends.set()
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._ends.is_set():
            try:
                self._send()
            except Exception as error:
                # A collector of the registry, say. The next time may go well.
                self._note_missed(repr(error))
            self._ends.wait(self._seconds)

    def _send(self) -> None:
        now = time.time_ns()
        began = self._began or now
        for metrics in in_requests(converted(self._registry.collect(), began, now, _POINTS), _POINTS):
            self._delivery.session.failure = ""
            result = self._exporter.export(
                MetricsData([ResourceMetrics(self._resource, [ScopeMetrics(SCOPE, metrics, "")], "")])
            )
            if self._ends.is_set():
                return
            if result is not MetricExportResult.SUCCESS:
                self._note_missed()
                return
        self._delivery.note(sent=True)
        self._began = began

    def _note_missed(self, error: str = "") -> None:
        self.missed += 1
        self._delivery.note(sent=False, error=error)
