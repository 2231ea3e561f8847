"""What the maps say, read when asked: fill, writes, and the counters that programs keep."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpfproxy.datapath.dump import Dump, fill
from ebpfproxy.datapath.maps import MapSet
from ebpfproxy.services.model import format_endpoint


class MapCollector(Collector):
    """Reads the maps as a command would: programs and the agent's thread are not disturbed."""

    def __init__(self, maps: MapSet) -> None:
        self._maps = maps

    def collect(self) -> Iterator[Metric]:
        entries = GaugeMetricFamily("ebpfproxy_map_entries", "Entries in use", labels=["map"])
        capacity = GaugeMetricFamily("ebpfproxy_map_capacity", "Entries that fit", labels=["map"])
        for each in fill(self._maps):
            entries.add_metric([each.name], each.entries)
            capacity.add_metric([each.name], each.capacity)
        writes = CounterMetricFamily(
            "ebpfproxy_map_writes", "Entries written or deleted by this agent", labels=["map"]
        )
        for name, opened in self._maps.maps.items():
            writes.add_metric([name], opened.writes)
        yield from (entries, capacity, writes)

        dump = Dump(self._maps)
        services = CounterMetricFamily(
            "ebpfproxy_service_connections",
            "Connections and datagrams by what became of them: chosen, refused, dropped",
            labels=["namespace", "service", "port", "protocol", "ip_family", "result"],
        )
        for counters in dump.service_counters():
            key = counters.key
            labels = [key.namespace, key.name, key.port_name, key.protocol.name, str(key.family)]
            services.add_metric([*labels, "chosen"], counters.chosen)
            services.add_metric([*labels, "refused"], counters.refused)
            services.add_metric([*labels, "dropped"], counters.dropped)
        yield services
        backends = CounterMetricFamily(
            "ebpfproxy_backend_connections",
            "Connections and datagrams sent to a backend; only those that have any",
            labels=["address", "protocol"],
        )
        for number, connections in dump.backend_connections().items():
            backend = dump.backend(number)
            if backend is not None:
                address = format_endpoint(backend.address, backend.port)
                backends.add_metric([address, backend.protocol.name], connections)
        yield backends
