"""Metrics of the API server's watches and requests, at each scrape.

``rest_client_requests`` has the name, help and labels of kube-proxy v1.36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpfproxy.kube.source_status import SourceStatus, State


class SourceCollector(Collector):
    """The state of the watches, read at each scrape. ``requests`` counts responses by status and method."""

    def __init__(
        self,
        statuses: Callable[[], list[SourceStatus]],
        requests: Callable[[], dict[tuple[str, str], int]],
        host: str,
    ) -> None:
        self._statuses = statuses
        self._requests = requests
        self._host = host

    def collect(self) -> Iterator[Metric]:
        connected = GaugeMetricFamily(
            "ebpfproxy_watch_connected", "1 while the watch is connected", labels=["resource"]
        )
        last = GaugeMetricFamily(
            "ebpfproxy_watch_last_event_timestamp_seconds",
            "Time of the last data of the watch",
            labels=["resource"],
        )
        lists = CounterMetricFamily("ebpfproxy_watch_lists", "Complete lists", labels=["resource"])
        failures = CounterMetricFamily(
            "ebpfproxy_watch_failures", "Failed requests and streams", labels=["resource", "reason"]
        )
        for status in self._statuses():
            resource = [str(status.resource)]
            if status.state is not State.ABSENT:
                connected.add_metric(resource, status.state is State.CONNECTED)
            last.add_metric(resource, status.last_event or 0)
            lists.add_metric(resource, status.lists)
            for reason, count in status.failures.items():
                failures.add_metric([*resource, reason], count)
        yield from (connected, last, lists, failures)
        requests = CounterMetricFamily(
            "rest_client_requests",
            "[ALPHA] Number of HTTP requests, partitioned by status code, method, and host.",
            labels=["code", "host", "method"],
        )
        for (code, method), count in self._requests().items():
            requests.add_metric([code, self._host, method], count)
        yield requests
