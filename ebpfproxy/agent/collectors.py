"""What ``/metrics`` has beside what the agent counts itself: read from its parts at each scrape."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.source import Source
from ebpfproxy.datapath.kernel import roots
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import attach
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.metrics.health_metrics import HealthCollector
from ebpfproxy.metrics.map_metrics import MapCollector
from ebpfproxy.metrics.measure_metrics import MeasureCollector
from ebpfproxy.metrics.source_metrics import SourceCollector


def register(
    registry: CollectorRegistry, options: AgentOptions, maps: MapSet, source: Source, health: ProxyHealth
) -> None:
    pins = roots.pin_folder(options.bpf_root)
    services, backends = options.metrics_services, options.metrics_backends
    registry.register(SourceCollector(source.statuses, source.requests, source.host))
    registry.register(MapCollector(maps, services, backends=backends))
    if options.measure_connections or options.measure_traffic:
        registry.register(MeasureCollector(maps, services, backends=backends))
    registry.register(HealthCollector(health.healthz, lambda: attach.attachments(pins)))
