"""Metrics of the maps, read at each scrape: entries, writes, and the programs' counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpfproxy.datapath.abi.node_layout import ACTIONS, UNALLOCATED, PacketEvent
from ebpfproxy.datapath.dump import Dump, fill
from ebpfproxy.datapath.flows.conntrack_table import counters
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.metrics.backend_metrics import LABELS, ServiceBackends, labels_of
from ebpfproxy.services.model import format_endpoint


class MapCollector(Collector):
    """Reads the maps like a command does, without disturbing programs and the agent's thread."""

    def __init__(self, maps: MapSet, services: int, *, backends: bool) -> None:
        """``backends``: of this number of ``services``, the busiest, each backend has a series."""
        self._maps = maps
        self._backends = ServiceBackends(services if backends else 0)

    def collect(self) -> Iterator[Metric]:
        entries = GaugeMetricFamily("ebpfproxy_map_entries", "Entries in use", labels=["map"])
        capacity = GaugeMetricFamily("ebpfproxy_map_capacity", "Maximum number of entries", labels=["map"])
        for one in fill(self._maps):
            entries.add_metric([one.name], one.entries)
            capacity.add_metric([one.name], one.capacity)
        writes = CounterMetricFamily(
            "ebpfproxy_map_writes", "Entries written or deleted by this agent", labels=["map"]
        )
        for name, opened in self._maps.maps.items():
            writes.add_metric([name], opened.writes)
        yield from (entries, capacity, writes)

        yield self._packet_events()
        yield self._early_drops()
        yield self._unallocated()
        dump = Dump(self._maps)
        services = CounterMetricFamily(
            "ebpfproxy_service_connections",
            "Connections and datagrams by result: chosen, refused, dropped",
            labels=[*LABELS, "result"],
        )
        counted = dump.service_counters()
        for each in counted:
            labels = labels_of(each.key)
            services.add_metric([*labels, "chosen"], each.chosen)
            services.add_metric([*labels, "refused"], each.refused)
            services.add_metric([*labels, "dropped"], each.dropped)
        yield services
        yield from self._backends.read(dump, counted)
        backends = CounterMetricFamily(
            "ebpfproxy_backend_connections",
            "Connections and datagrams sent to a backend; only backends with any",
            labels=["address", "protocol"],
        )
        _add_backends(dump, backends, dump.backend_connections())
        yield backends
        loads = GaugeMetricFamily(
            "ebpfproxy_backend_open_connections",
            "Open connected sockets and flows from this node to a backend; only backends with any",
            labels=["address", "protocol"],
        )
        _add_backends(dump, loads, dump.backend_loads())
        yield loads

    def _packet_events(self) -> Metric:
        events = CounterMetricFamily(
            "ebpfproxy_packets",
            "Packets that were rejected, dropped, passed although something was wrong, or forwarded at XDP",
            labels=["action", "reason"],
        )
        found = counters(self._maps["packet_events"])
        for action, reasons in ACTIONS.items():
            for reason in sorted(reasons):
                events.add_metric([action, str(reason)], found[reason])
        return events

    def _early_drops(self) -> Metric:
        return CounterMetricFamily(
            "ebpfproxy_conntrack_early_dropped",
            "Flows, not confirmed or timed out, that were ended as a new one found no masquerade port",
            value=counters(self._maps["packet_events"])[PacketEvent.EARLY_DROPS],
        )

    def _unallocated(self) -> Metric:
        family = CounterMetricFamily(
            "ebpfproxy_unallocated_service_addresses",
            "Traffic to an address of a Service CIDR that no Service has: packets dropped, sockets refused",
            labels=["path", "ip_family"],
        )
        found = {index: count for index, (count,) in self._maps["unallocated"].nonzero_counters()}
        for (path, version), index in UNALLOCATED.items():
            family.add_metric([path, f"IPv{version}"], found.get(index, 0))
        return family


def _add_backends(
    dump: Dump, family: CounterMetricFamily | GaugeMetricFamily, numbers: Mapping[int, int]
) -> None:
    """``numbers``: by backend id; a backend that is gone meanwhile is skipped."""
    for backend_id, number in numbers.items():
        backend = dump.backend(backend_id)
        if backend is not None:
            address = format_endpoint(backend.address, backend.port)
            family.add_metric([address, backend.protocol.name], number)
