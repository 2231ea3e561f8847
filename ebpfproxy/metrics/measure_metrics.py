"""Metrics of measured connections: the busiest Services each on their own, and all others together.

A Service may become one of the busiest, and stop being one. What it has counted as one of the others stays
theirs, so that no counter ever falls.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Set
from typing import Generic, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, NOBODY, ConnectFailure
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import Connects
from ebpfproxy.services.model import ServicePortKey, format_endpoint

#: The Service of all others: it has no namespace.
OTHER = "other"
LABELS = ("namespace", "service", "port", "protocol", "ip_family")

Key = TypeVar("Key", bound=Hashable)
Counts = tuple[float, ...]


class Split(Generic[Key]):
    """Counters by key, of which some are told apart at each reading, and others together."""

    def __init__(self, before: Mapping[Key, Counts], width: int) -> None:
        """``before``: what an earlier agent may have told; of that, nothing is told again as others'."""
        self._last = dict(before)
        self._of_others = dict(before)
        self._others: Counts = (0,) * width

    def read(self, now: Mapping[Key, Counts], own: Set[Key]) -> tuple[dict[Key, Counts], Counts]:
        """The counters of those of the keys that are in ``own``, and the sums of all others."""
        found = {}
        for key, counts in now.items():
            last = self._last.get(key)
            if last is not None and any(a < b for a, b in zip(counts, last, strict=True)):
                # It was counted anew.
                del self._of_others[key]
                last = None
            nothing = (0,) * len(counts)
            of_others = self._of_others.get(key, nothing)
            if key not in own:
                grown = _less(counts, last or nothing)
                self._others = _sum(self._others, grown)
                of_others = _sum(of_others, grown)
            self._of_others[key] = of_others
            if key in own:
                found[key] = _less(counts, of_others)
        self._last = dict(now)
        self._of_others = {key: counts for key, counts in self._of_others.items() if key in now}
        return found, self._others


def _sum(a: Counts, b: Counts) -> Counts:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _less(a: Counts, b: Counts) -> Counts:
    return tuple(x - y for x, y in zip(a, b, strict=True))


#: None: those that programs count together.
_Service = ServicePortKey | None
_Failed = tuple[_Service, str]


class MeasureCollector(Collector):
    """Reads the maps at each scrape."""

    def __init__(self, maps: MapSet, services: int, *, backends: bool) -> None:
        """``services``: how many have series of their own. ``backends``: failures have a backend's label."""
        self._maps = maps
        self._services = services
        self._backends = backends
        #: Two scrapes at once would count what is new twice.
        self._lock = threading.Lock()
        dump = Dump(maps)
        now = _connects(dump, maps)
        self._times = Split(_times(now), len(CONNECT_BOUNDS) + 2)
        self._failures = Split(self._failed(dump, now), len(ConnectFailure))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            yield from self._read()

    def _read(self) -> Iterator[Metric]:
        dump = Dump(self._maps)
        now = _connects(dump, self._maps)
        own = self._busiest(now)
        seconds = HistogramMetricFamily(
            "ebpfproxy_service_connect_seconds",
            "Time until a TCP connection was established, if that is measured",
            labels=LABELS,
        )
        times, others = self._times.read(_times(now), own)
        for service, counts in [*sorted(times.items()), (None, others)]:
            if service is not None or any(counts):
                seconds.add_metric(_labels(service), _buckets(counts[1:]), sum_value=counts[0])
        yield seconds

        failed = CounterMetricFamily(
            "ebpfproxy_backend_connect_failures",
            "TCP connections that were not established, if that is measured; backend: with metricsBackends",
            labels=[*LABELS, "backend", "reason"],
        )
        counted = self._failed(dump, now)
        failures, others = self._failures.read(counted, {key for key in counted if key[0] in own})
        for (service, backend), counts in [*failures.items(), ((None, ""), others)]:
            if service is not None or any(counts):
                for reason in ConnectFailure:
                    failed.add_metric([*_labels(service), backend, str(reason)], counts[reason])
        yield failed

    def _busiest(self, now: Mapping[_Service, Connects]) -> Set[_Service]:
        def connections(service: _Service) -> tuple[int, ServicePortKey]:
            assert service is not None
            return -now[service].established - sum(now[service].failures), service

        return set(sorted(now.keys() - {None}, key=connections)[: self._services])

    def _failed(self, dump: Dump, now: Mapping[_Service, Connects]) -> dict[_Failed, Counts]:
        if not self._backends:
            return {(service, ""): each.failures for service, each in now.items()}
        found: dict[_Failed, Counts] = {}
        for (service_id, backend_id), counts in measures.failures(self._maps).items():
            service, backend = dump.names.get(service_id), dump.backend(backend_id)
            if service_id == NOBODY:
                found[None, ""] = counts
            elif service is not None and backend is not None:
                found[service, format_endpoint(backend.address, backend.port)] = counts
        return found


def _connects(dump: Dump, maps: MapSet) -> dict[_Service, Connects]:
    found: dict[_Service, Connects] = {}
    for number, each in measures.connects(maps).items():
        if number in dump.names:
            found[dump.names[number]] = each
        elif number == NOBODY:
            found[None] = each
    return found


def _times(now: Mapping[_Service, Connects]) -> dict[_Service, Counts]:
    return {service: (each.seconds, *each.times) for service, each in now.items()}


def _buckets(times: Counts) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds = [*(str(bound / 1e6) for bound in CONNECT_BOUNDS), "+Inf"]
    return [(bound, sum(times[: index + 1])) for index, bound in enumerate(bounds)]


def _labels(service: _Service) -> list[str]:
    if service is None:
        return ["", OTHER, "", "", ""]
    key = service
    return [key.namespace, key.name, key.port_name, key.protocol.name, str(key.family)]
