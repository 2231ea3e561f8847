"""Counters of the agent.

Names, help, labels and buckets of ``kubeproxy_*`` and ``rest_client_*`` are kube-proxy v1.36's, down to
[ALPHA] and to ``le="1"`` where this library would write 1.0: queries that select a bucket compare text.

Counters with known labels exist from the start, because ``increase()`` misses a step from nothing to one.
"""

from __future__ import annotations

import platform
import threading
from collections import Counter as CounterDict
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import ebpfproxy
from ebpfproxy.datapath.drift.compare import Kind
from ebpfproxy.datapath.flows.socket_records import SOCKET_MAPS
from ebpfproxy.datapath.flows.sweeper import Sweep
from ebpfproxy.datapath.programs.attach import DETACHED, OVERTAKEN, REPLACED
from ebpfproxy.health.proxy import FAMILIES
from ebpfproxy.kube.events.event import RESULTS
from ebpfproxy.kube.objects import Resource
from ebpfproxy.services.model import Family, Protocol

_SYNC_BUCKETS = tuple(0.001 * 2**i for i in range(15))
#: kube-proxy has the 0 by accident (component-base's MergeBuckets).
_NETWORK_BUCKETS = (0, 0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
_REQUEST_BUCKETS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60)
_EVENT_BUCKETS = (
    *(i / 10_000 for i in (1, 2, 3, 4, 5, 6, 8)),
    *(i / 1000 for i in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50, 100, 250, 500)),
    1,
    2.5,
    5,
    10,
)


class AgentMetrics:
    """One registry per agent, so that several can run in one process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        registry.register(_ThreadCollector())
        self._declare_kube_proxys(registry)
        self._declare_own(registry)
        self._start_known_labels()

    def _declare_kube_proxys(self, registry: CollectorRegistry) -> None:
        def sync_histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"kubeproxy_{name}",
                f"[ALPHA] {text}",
                ["ip_family"],
                buckets=_SYNC_BUCKETS,
                registry=registry,
            )

        self._sync = sync_histogram("sync_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds")
        self._sync_full = sync_histogram(
            "sync_full_proxy_rules_duration_seconds", "SyncProxyRules latency in seconds for full resyncs"
        )
        self._sync_partial = sync_histogram(
            "sync_partial_proxy_rules_duration_seconds",
            "SyncProxyRules latency in seconds for partial resyncs",
        )
        self._network = Histogram(
            "kubeproxy_network_programming_duration_seconds",
            "[ALPHA] In Cluster Network Programming Latency in seconds",
            ["ip_family"],
            buckets=_NETWORK_BUCKETS,
            registry=registry,
        )
        self._last = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "[ALPHA] The last time proxy rules were successfully synced",
            ["ip_family"],
            registry=registry,
        )
        self._last_queued = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "[ALPHA] The last time a sync of proxy rules was queued",
            ["ip_family"],
            registry=registry,
        )
        self._pending = {
            what: Gauge(
                f"kubeproxy_sync_proxy_rules_{what.lower()}_changes_pending",
                f"[ALPHA] Pending proxy rules {what} changes",
                registry=registry,
            )
            for what in ("Endpoint", "Service")
        }
        self._changes = {
            what: Counter(
                f"kubeproxy_sync_proxy_rules_{what.lower()}_changes",
                f"[ALPHA] Cumulative proxy rules {what} changes",
                registry=registry,
            )
            for what in ("Endpoint", "Service")
        }
        self._no_local = Gauge(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "[ALPHA] Number of services with a Local traffic policy and no endpoints",
            ["ip_family", "traffic_policy"],
            registry=registry,
        )
        self._asked = {
            path: Counter(
                f"kubeproxy_proxy_{path}",
                f"[ALPHA] Cumulative proxy {path} HTTP status",
                ["code"],
                registry=registry,
            )
            for path in ("healthz", "livez")
        }
        self._reconciler = sync_histogram(
            "conntrack_reconciler_sync_duration_seconds", "ReconcileConntrackFlowsLatency latency in seconds"
        )
        self._reconciled = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "[ALPHA] Cumulative conntrack flows deleted by conntrack reconciler",
            ["ip_family"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "rest_client_request_duration_seconds",
            "[ALPHA] Request latency in seconds. Broken down by verb, and host.",
            ["host", "verb"],
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )

    def _declare_own(self, registry: CollectorRegistry) -> None:
        self.event_to_map = Histogram(
            "ebpfproxy_event_to_map_seconds",
            "Time from reading an event to the updated maps",
            buckets=_EVENT_BUCKETS,
            registry=registry,
        )
        self._warnings = Counter(
            "ebpfproxy_warnings",
            "Invalid fields of objects that were ignored; the log has the reason",
            ["resource"],
            registry=registry,
        )
        self._events = Counter(
            "ebpfproxy_events",
            "Kubernetes Events by result",
            ["result"],
            registry=registry,
        )
        self._capacity_problems = Counter(
            "ebpfproxy_capacity_problems",
            "Service ports that could not be programmed because a map is full",
            registry=registry,
        )
        self._without_room = Gauge(
            "ebpfproxy_service_ports_without_room",
            "Service ports that are not or not completely programmed now because a map is full",
            registry=registry,
        )
        self._devices = Gauge(
            "ebpfproxy_devices", "Devices with packet programs", ["state"], registry=registry
        )
        self._health_ports = Gauge(
            "ebpfproxy_health_check_ports",
            "healthCheckNodePorts, by whether they could be bound",
            ["state"],
            registry=registry,
        )
        self._entries = Gauge(
            "ebpfproxy_conntrack_entries",
            "Entries after the last sweep: two per flow, four if it is masqueraded",
            registry=registry,
        )
        self._expired = Counter(
            "ebpfproxy_conntrack_expired", "Expired entries that sweeps deleted", registry=registry
        )
        self._evicted = Counter(
            "ebpfproxy_conntrack_evicted", "Entries evicted from the full table", registry=registry
        )
        self._redirected_sockets = Counter(
            "ebpfproxy_stale_sockets_redirected",
            "Connected UDP sockets of a deleted backend whose packets are sent to another one",
            registry=registry,
        )
        self._ended_sockets = Counter(
            "ebpfproxy_stale_sockets_ended",
            "Connected sockets that were closed because their backend was deleted",
            ["protocol"],
            registry=registry,
        )
        self._unseen_sockets = Counter(
            "ebpfproxy_stale_sockets_not_found",
            "Sockets of a deleted backend that are in no network namespace that the agent can enter",
            registry=registry,
        )
        self._forgotten = Counter(
            "ebpfproxy_socket_records_removed",
            "Records of sockets whose end no program saw",
            ["map"],
            registry=registry,
        )
        self._drift = Counter(
            "ebpfproxy_drift",
            "Entries of maps, attachments and pins that others have changed, and the agent has repaired",
            ["map", "kind"],
            registry=registry,
        )
        self._sweep = Histogram(
            "ebpfproxy_conntrack_sweep_seconds",
            "Time to read the whole table and delete expired entries",
            buckets=_SYNC_BUCKETS,
            registry=registry,
        )
        Gauge("ebpfproxy_build_info", "Version and kernel", ["version", "kernel"], registry=registry).labels(
            ebpfproxy.__version__, platform.release()
        ).set(1)

    def _start_known_labels(self) -> None:
        """Makes counters exist from the start, with a value of 0."""
        for family in FAMILIES:
            self._reconciled.labels(family)
        for resource in Resource:
            self._warnings.labels(str(resource))
        for result in RESULTS:
            self._events.labels(result)
        for protocol in (Protocol.TCP, Protocol.UDP):
            self._ended_sockets.labels(protocol.name)
        for name in SOCKET_MAPS:
            self._forgotten.labels(name)

    def redirected_sockets(self, number: int) -> None:
        self._redirected_sockets.inc(number)

    def ended_sockets(self, protocol: str, number: int) -> None:
        self._ended_sockets.labels(protocol).inc(number)

    def sockets_not_found(self, number: int) -> None:
        self._unseen_sockets.inc(number)

    def forgot_sockets(self, removed: Mapping[str, int]) -> None:
        """The number of removed records by map."""
        for name, number in removed.items():
            self._forgotten.labels(name).inc(number)

    def drift_of(self, maps: Iterable[str]) -> None:
        """Names the maps that are compared, so that their counters are there from the start."""
        for name in maps:
            for kind in Kind:
                self._drift.labels(name, str(kind))
        for where in ("programs", "devices"):
            for program_kind in (DETACHED, REPLACED):
                self._drift.labels(where, program_kind)
        self._drift.labels("devices", OVERTAKEN)
        self._drift.labels("pins", str(Kind.MISSING))

    def drifted(self, counts: Mapping[tuple[str, str], int]) -> None:
        """The number of repaired differences by map and kind."""
        for (name, kind), number in counts.items():
            self._drift.labels(name, kind).inc(number)

    def devices(self, wanted: int, failed: int) -> None:
        self._devices.labels("attached").set(wanted - failed)
        self._devices.labels("failed").set(failed)

    def health_check_ports(self, bound: int, failed: int) -> None:
        self._health_ports.labels("bound").set(bound)
        self._health_ports.labels("failed").set(failed)

    def swept(self, sweep: Sweep, departed: Mapping[Family, int] | None = None) -> None:
        """``departed``: flows that ended because their backend was deleted; others had expired."""
        self._entries.set(sweep.entries)
        self._expired.inc(sweep.expired)
        self._evicted.inc(sweep.evicted)
        self._sweep.observe(sweep.seconds)
        for name in FAMILIES:
            # One table holds both families, and one sweep reads it.
            self._reconciler.labels(name).observe(sweep.seconds)
        for family, flows in (departed or {}).items():
            self._reconciled.labels(str(family)).inc(flows)

    def queued(self, now: float) -> None:
        for family in FAMILIES:
            self._last_queued.labels(family).set(now)

    def programmed(self, families: Iterable[Family], seconds: float, *, full: bool, now: float) -> None:
        part = self._sync_full if full else self._sync_partial
        for family in families:
            self._sync.labels(str(family)).observe(seconds)
            part.labels(str(family)).observe(seconds)
        for name in FAMILIES:
            self._last.labels(name).set(now)

    def network_programming(self, families: Iterable[Family], seconds: float) -> None:
        for family in families:
            self._network.labels(str(family)).observe(seconds)

    def changes(self, services: int, endpoints: int) -> None:
        self._changes["Service"].inc(services)
        self._changes["Endpoint"].inc(endpoints)

    def pending(self, services: int, endpoints: int) -> None:
        self._pending["Service"].set(services)
        self._pending["Endpoint"].set(endpoints)

    def no_local_endpoints(self, counts: CounterDict[tuple[Family, str]]) -> None:
        for family in Family:
            for policy in ("internal", "external"):
                self._no_local.labels(str(family), policy).set(counts[family, policy])

    def asked(self, path: str, code: int) -> None:
        """``path`` is healthz or livez."""
        self._asked[path].labels(str(code)).inc()

    def warned(self, resource: str) -> None:
        self._warnings.labels(resource).inc()

    def event(self, result: str) -> None:
        """``result``: one of ``kube.events.event.RESULTS``."""
        self._events.labels(result).inc()

    def did_not_fit(self) -> None:
        self._capacity_problems.inc()

    def without_room(self, service_ports: int) -> None:
        """How many do not fit now."""
        self._without_room.set(service_ports)

    def requested(self, host: str, verb: str, seconds: float) -> None:
        """Seconds until the API server's response began: a watch goes on for minutes after that."""
        self._request_seconds.labels(host, verb).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(_BoundsAsInGo(self.registry))


class _BoundsAsInGo(Collector):
    """The metrics of a registry, with whole bounds of buckets in kube-proxy's notation."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if metric.type == "histogram":
                for sample in metric.samples:
                    if "le" in sample.labels:
                        sample.labels["le"] = sample.labels["le"].removesuffix(".0")
            yield metric


class _ThreadCollector(Collector):
    """The metric of the panel "Goroutines" of dashboards for kube-proxy."""

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "go_goroutines",
            "Threads: there are no goroutines here, but dashboards for kube-proxy ask for them.",
            value=threading.active_count(),
        )
