"""Logs and metrics for a collector, where ``otlpEndpoint`` names one; else nothing is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.state import SignalState, TelemetryState
from ebpfproxy.logs import get_logger
from ebpfproxy.otlp.libraries import OtlpError, require_libraries

if TYPE_CHECKING:
    from ebpfproxy.otlp.exporter import Exporter

log = get_logger(__name__)


class Telemetry:
    """The log is sent from now on until :meth:`close`, ``registry`` from :meth:`start` to :meth:`stop`.

    What keeps it from being sent does not keep the agent from its work: something else than the agent's
    configuration may have set the variables of OpenTelemetry in its pod.
    """

    def __init__(self, options: AgentOptions, registry: CollectorRegistry) -> None:
        self._exporter: Exporter | None = None
        self._endpoint, self._error = options.otlp_endpoint, ""
        if options.otlp_endpoint:
            try:
                self._exporter = _exporter(options, registry)
            except OtlpError as error:
                self._error = str(error)
                log.error("sending nothing to a collector", error=self._error)

    @property
    def state(self) -> TelemetryState | None:
        """For ``ebpfproxy status``; None without an endpoint."""
        if self._exporter is None:
            return TelemetryState(self._endpoint, self._error) if self._endpoint else None
        logs, metrics = self._exporter.logs, self._exporter.metrics
        return TelemetryState(
            self._endpoint,
            log=SignalState(*logs.outcome, logs.lost),
            metrics=SignalState(*metrics.outcome, metrics.missed),
        )

    def start(self) -> None:
        """All collectors are registered: a counter that comes later would count from nothing."""
        if self._exporter is not None:
            self._exporter.start()

    def stop(self) -> None:
        if self._exporter is not None:
            self._exporter.stop()

    def close(self) -> None:
        if self._exporter is not None:
            self._exporter.close()


def _exporter(options: AgentOptions, registry: CollectorRegistry) -> Exporter:
    """Raises OtlpError."""
    require_libraries("otlpEndpoint")
    from ebpfproxy.otlp.exporter import Exporter  # noqa: PLC0415 - 10 MB

    return Exporter(options.otlp_endpoint, options.otlp_interval_seconds, registry, options.node_name)
