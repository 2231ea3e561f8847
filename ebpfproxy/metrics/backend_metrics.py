"""Metrics of the backends that new connections to a Service get: how many, which, how often others."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ebpfproxy.datapath.abi.layout import POLICIES
from ebpfproxy.datapath.dump import Dump, ServiceCounters
from ebpfproxy.services.model import ServicePortKey, format_endpoint

LABELS = ("namespace", "service", "port", "protocol", "ip_family")


def labels_of(key: ServicePortKey) -> list[str]:
    """The values of ``LABELS``."""
    return [key.namespace, key.name, key.port_name, key.protocol.name, str(key.family)]


class _Seen(NamedTuple):
    #: Ids, sorted.
    backends: array[int]
    added: int = 0
    removed: int = 0


class ServiceBackends:
    """Compares the backends of each service port with those at the last reading. Any thread may read."""

    def __init__(self, named: int) -> None:
        """``named``: of how many service ports, the busiest, each backend has a series."""
        self._named = named
        self._lock = threading.Lock()
        self._seen: dict[ServicePortKey, _Seen] = {}

    def read(self, dump: Dump, counted: Sequence[ServiceCounters]) -> Iterator[Metric]:
        """``counted``: the service ports that get series."""
        with self._lock:
            seen = self._seen = dict(self._compare(dump, [each.key for each in counted]))
        numbers = GaugeMetricFamily(
            "ebpfproxy_service_backends",
            "Backends that new connections get here; only service ports with any connections",
            labels=LABELS,
        )
        changes = CounterMetricFamily(
            "ebpfproxy_service_backend_changes",
            "Backends that new connections began (added) or ceased (removed) to get, from scrape to scrape",
            labels=[*LABELS, "change"],
        )
        for key, found in seen.items():
            labels = labels_of(key)
            numbers.add_metric(labels, len(found.backends))
            changes.add_metric([*labels, "added"], found.added)
            changes.add_metric([*labels, "removed"], found.removed)
        yield from (numbers, changes)
        info = GaugeMetricFamily(
            "ebpfproxy_service_backend_info",
            "1 for each backend of the busiest service ports, with metricsBackends",
            labels=[*LABELS, "address"],
        )
        busiest = sorted(counted, key=attrgetter("chosen"), reverse=True)[: self._named]
        for key in (each.key for each in busiest):
            for number in seen[key].backends:
                if (backend := dump.backend(number)) is not None:
                    info.add_metric([*labels_of(key), format_endpoint(backend.address, backend.port)], 1)
        yield info

    def _compare(self, dump: Dump, keys: Sequence[ServicePortKey]) -> Iterator[tuple[ServicePortKey, _Seen]]:
        ids = {key: number for number, key in dump.names.items()}
        for key in keys:
            now = {each for policy in range(POLICIES) for each in dump.selection(ids[key], policy)}
            last = self._seen.get(key)
            if last is None:
                yield key, _Seen(array("I", sorted(now)))
                continue
            before = set(last.backends)
            if now == before:
                yield key, last
            else:
                added, removed = last.added + len(now - before), last.removed + len(before - now)
                yield key, _Seen(array("I", sorted(now)), added, removed)
