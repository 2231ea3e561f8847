"""Metrics of OpenTelemetry from those of a Prometheus registry.

There is no second bookkeeping: what is sent is what ``/metrics`` would have said at that moment. The names
are unchanged, ``_total`` included, as in OpenTelemetry's rules for metrics of Prometheus.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

_CUMULATIVE = AggregationTemporality.CUMULATIVE
#: UCUM's units for those that names of Prometheus end with.
_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}
_Labels = tuple[tuple[str, str], ...]


def converted(families: Iterable[Family], began: int, now: int, most: int) -> Iterator[Metric]:
    """One metric for each name that samples have, for a histogram one in all; more, if there are many points.

    ``began``: since when counters count, and ``now``, in Unix nanoseconds. But for histograms no metric has
    more than ``most`` points.
    """
    for family in families:
        if family.type == "histogram":
            if histograms := list(_histograms(family.samples, began, now)):
                yield _metric(family.name, family, Histogram(histograms, _CUMULATIVE))
            continue
        by_name: dict[str, list[Sample]] = {}
        for sample in family.samples:
            by_name.setdefault(sample.name, []).append(sample)
        for name, samples in by_name.items():
            is_counter = family.type == "counter" and name.endswith("_total")
            for at in range(0, len(samples), most):
                # Collectors may give truth values, which only Prometheus' text takes for numbers.
                points = [
                    NumberDataPoint(each.labels, began if is_counter else 0, now, float(each.value))
                    for each in samples[at : at + most]
                ]
                data = Sum(points, _CUMULATIVE, is_monotonic=True) if is_counter else Gauge(points)
                yield _metric(name, family, data)


def in_requests(metrics: Iterable[Metric], most: int) -> Iterator[list[Metric]]:
    """Metrics in lists with at least ``most`` points, so that neither memory nor a request is large."""
    some: list[Metric] = []
    points = 0
    for metric in metrics:
        some.append(metric)
        points += len(metric.data.data_points)
        if points >= most:
            yield some
            some, points = [], 0
    if some:
        yield some


def _metric(name: str, family: Family, data: Sum | Gauge | Histogram) -> Metric:
    unit = _UNITS.get(name.removesuffix("_total").rpartition("_")[2], "")
    return Metric(name, family.documentation, unit, data)


def _histograms(samples: Iterable[Sample], began: int, now: int) -> Iterator[HistogramDataPoint]:
    """One for each set of labels. A bucket of Prometheus counts what those below it count, too."""
    buckets: dict[_Labels, list[tuple[float, float]]] = {}
    sums: dict[_Labels, float] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets.setdefault(labels, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            sums[labels] = sample.value
    for labels, found in buckets.items():
        found.sort()
        below = [0.0, *(count for _, count in found)]
        yield HistogramDataPoint(
            attributes=dict(labels),
            start_time_unix_nano=began,
            time_unix_nano=now,
            count=int(below[-1]),
            sum=sums.get(labels, 0.0),
            bucket_counts=[int(count - last) for last, count in pairwise(below)],
            explicit_bounds=[bound for bound, _ in found if not math.isinf(bound)],
            # Prometheus has neither, and the message need not.
            min=None,  # type: ignore[arg-type]
            max=None,  # type: ignore[arg-type]
        )
