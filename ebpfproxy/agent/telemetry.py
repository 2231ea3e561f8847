"""Logs and metrics for a collector, where ``otlpEndpoint`` names one; else nothing is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from ebpfproxy.agent.agent_options import AgentOptions

if TYPE_CHECKING:
    from ebpfproxy.otlp.exporter import Exporter


class Telemetry:
    """The log is sent from now on until :meth:`close`, ``registry`` from :meth:`start` to :meth:`stop`."""

    def __init__(self, options: AgentOptions, registry: CollectorRegistry) -> None:
        """Raises OtlpError."""
        self._exporter: Exporter | None = None
        if options.otlp_endpoint:
            from ebpfproxy.otlp.exporter import Exporter  # noqa: PLC0415 - 10 MB

            self._exporter = Exporter(
                options.otlp_endpoint,
                options.otlp_interval_seconds,
                registry,
                options.node_name,
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
