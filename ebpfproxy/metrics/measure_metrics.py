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

from ebpfproxy.datapath.abi.layout import NOBODY
from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS, ConnectFailure
from ebpfproxy.datapath.dump import Dump
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services import measures
from ebpfproxy.datapath.services.measures import NO_CONNECTS, NO_TRAFFIC, Connects, Traffic
from ebpfproxy.metrics.backend_metrics import LABELS, labels_of
from ebpfproxy.services.model import ServicePortKey, format_endpoint

#: The Service of all others: it has no namespace.
OTHER = "other"

Key = TypeVar("Key", bound=Hashable)
Counted = TypeVar("Counted")
#: Whole numbers, which can be subtracted without a remainder.
Counts = tuple[int, ...]


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
        now = _named(dump, measures.connects(maps))
        self._times = Split(_times(now), len(CONNECT_BOUNDS) + 2)
        self._failures = Split(self._failed(dump, now), len(ConnectFailure))
        self._traffic = Split(_named(dump, measures.traffic(maps)), len(Traffic._fields))

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            yield from self._read()

    def _read(self) -> Iterator[Metric]:
        dump = Dump(self._maps)
        now = _named(dump, measures.connects(self._maps))
        all_traffic = _named(dump, measures.traffic(self._maps))
        own = self._busiest(now, all_traffic)
        seconds = HistogramMetricFamily(
            "ebpfproxy_service_connect_seconds",
            "Time until a TCP connection was established, if that is measured",
            labels=LABELS,
        )
        times, others = self._times.read(_times(now), own)
        for service, counts in [*sorted(times.items()), (None, others)]:
            if service is not None or any(counts):
                seconds.add_metric(_labels(service), _buckets(counts[1:]), sum_value=counts[0] / 1e6)
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
        yield from self._sizes(all_traffic, own)

    def _sizes(self, now: Mapping[_Service, Traffic], own: Set[_Service]) -> Iterator[Metric]:
        """``own``: those told apart."""
        sizes, packets = (
            CounterMetricFamily(
                f"ebpfproxy_service_{unit}",
                f"{unit.capitalize()} from clients (request) and to them (response), if that is measured",
                labels=[*LABELS, "direction"],
            )
            for unit in ("bytes", "packets")
        )
        found, others = self._traffic.read(now, own)
        for service, counts in [*sorted(found.items()), (None, others)]:
            if service is not None or any(counts):
                for at, direction in enumerate(("request", "response")):
                    sizes.add_metric([*_labels(service), direction], counts[at])
                    packets.add_metric([*_labels(service), direction], counts[2 + at])
        yield from (sizes, packets)

    def _busiest(self, now: Mapping[_Service, Connects], sizes: Mapping[_Service, Traffic]) -> Set[_Service]:
        """Those with most connections, and then with most packets."""

        def order(service: _Service) -> tuple[int, int, ServicePortKey]:
            assert service is not None
            each, size = now.get(service, NO_CONNECTS), sizes.get(service, NO_TRAFFIC)
            packets = size.request_packets + size.response_packets
            return -each.established - sum(each.failures), -packets, service

        return set(sorted((now.keys() | sizes.keys()) - {None}, key=order)[: self._services])

    def _failed(self, dump: Dump, now: Mapping[_Service, Connects]) -> dict[_Failed, Counts]:
        if not self._backends:
            return {(service, ""): each.failures for service, each in now.items()}
        found: dict[_Failed, Counts] = {}
        for (service_id, backend_id), counts in measures.failures(self._maps).items():
            service, backend = dump.names.get(service_id), dump.backend(backend_id)
            if service_id == NOBODY:
                found[None, ""] = counts
            elif service is not None and backend is not None:
                key = service, format_endpoint(backend.address, backend.port)
                # An endpoint may have another id while connections to the one before are open.
                found[key] = _sum(found[key], counts) if key in found else counts
        return found


def _named(dump: Dump, counted: Mapping[int, Counted]) -> dict[_Service, Counted]:
    """By the service port, of those that there are now."""
    found: dict[_Service, Counted] = {}
    for number, each in counted.items():
        if number in dump.names:
            found[dump.names[number]] = each
        elif number == NOBODY:
            found[None] = each
    return found


def _times(now: Mapping[_Service, Connects]) -> dict[_Service, Counts]:
    return {service: (each.microseconds, *each.times) for service, each in now.items()}


def _buckets(times: Counts) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds = [*(str(bound / 1e6) for bound in CONNECT_BOUNDS), "+Inf"]
    return [(bound, sum(times[: index + 1])) for index, bound in enumerate(bounds)]


def _labels(service: _Service) -> list[str]:
    return ["", OTHER, "", "", ""] if service is None else labels_of(service)
