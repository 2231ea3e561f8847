"""Metrics of OpenTelemetry say what /metrics says: decoded, they are the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ebpfproxy.metrics.agent_metrics import AgentMetrics
from ebpfproxy.otlp.convert import converted, in_requests
from ebpfproxy.otlp.origin import SCOPE
from tests.otlp.receiver import Key, key, metrics_of, samples


def requests(families: Iterable[Family], most: int = 1000) -> Iterator[ExportMetricsServiceRequest]:
    for metrics in in_requests(converted(families, 5, 7, most), most):
        data = MetricsData([ResourceMetrics(Resource({}), [ScopeMetrics(SCOPE, metrics, "")], "")])
        yield encode_metrics(data)


def sent(registry: CollectorRegistry) -> dict[Key, float]:
    (request,) = requests(registry.collect())
    return samples([request])


def scraped(registry: CollectorRegistry) -> dict[Key, float]:
    """What Prometheus reads, with bounds as numbers."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        key(sample.name, with_number(sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


def with_number(labels: dict[str, str]) -> dict[str, str]:
    return labels | ({"le": str(float(labels["le"]))} if "le" in labels else {})


def test_each_type_is_the_same() -> None:
    registry = AgentMetrics().registry
    counter = Counter("asked", "How often", ["path", "code"], registry=registry)
    counter.labels("/", "200").inc(3)
    counter.labels("/x", "404").inc()
    Gauge("full", "How full", registry=registry).set(0.25)
    histogram = Histogram("took", "Seconds", ["verb"], buckets=(0.1, 1, 10), registry=registry)
    for seconds in (0.05, 0.5, 0.6, 20):
        histogram.labels("GET").observe(seconds)
    Histogram("never", "Nothing was observed", ["verb"], registry=registry)
    expected, found = scraped(registry), sent(registry)
    # These change from one reading to the next.
    assert found.keys() == expected.keys()
    assert {name: found[name] for name in found if not name[0].startswith(("process_", "python_gc"))} == {
        name: expected[name] for name in expected if not name[0].startswith(("process_", "python_gc"))
    }
    assert found["took_bucket", (("le", "1.0"), ("verb", "GET"))] == 3


class Connected(Collector):
    def collect(self) -> Iterator[Family]:
        yield GaugeMetricFamily("connected", "1 if it is", value=True)


def test_truth_values_are_numbers() -> None:
    registry = CollectorRegistry()
    registry.register(Connected())
    assert sent(registry) == scraped(registry) == {("connected", ()): 1.0}


def test_counters_are_cumulative_and_monotonic() -> None:
    registry = CollectorRegistry()
    Counter("asked", "How often", registry=registry).inc()
    # kube-proxy has such a name.
    Gauge("now_total", "How full", registry=registry).set(1)
    Histogram("took", "Seconds", registry=registry).observe(1)
    metrics = metrics_of(requests(registry.collect()))
    cumulative = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    total = metrics["asked_total"].sum
    assert (total.is_monotonic, total.aggregation_temporality) == (True, cumulative)
    point = total.data_points[0]
    assert (point.start_time_unix_nano, point.time_unix_nano, point.as_double) == (5, 7, 1.0)
    assert metrics["now_total"].WhichOneof("data") == "gauge"
    assert metrics["took"].histogram.aggregation_temporality == cumulative
    assert metrics["took"].histogram.data_points[0].start_time_unix_nano == 5
    assert metrics["took"].description == "Seconds"
    assert not metrics["took"].histogram.data_points[0].HasField("min")


def test_units_are_those_of_ucum() -> None:
    registry = CollectorRegistry()
    Counter("sent_bytes", "", registry=registry)
    Counter("busy_seconds", "", registry=registry)
    Gauge("start_time_seconds", "", registry=registry)
    Histogram("took_seconds", "", registry=registry)
    Gauge("seconds_of_nothing", "", registry=registry)
    units = {name: each.unit for name, each in metrics_of(requests(registry.collect())).items()}
    assert units == {
        "sent_bytes_total": "By",
        "busy_seconds_total": "s",
        "start_time_seconds": "s",
        "took_seconds": "s",
        "seconds_of_nothing": "",
    }


class _Unsorted(Collector):
    """Buckets in another order, as a collector may have them."""

    def collect(self) -> list[HistogramMetricFamily]:
        family = HistogramMetricFamily("odd", "Odd", labels=["a"])
        family.add_metric(["x"], [("+Inf", 5), ("2.0", 1)], sum_value=9)
        return [family]


def test_buckets_are_counted_on_their_own() -> None:
    registry = CollectorRegistry()
    registry.register(_Unsorted())
    assert sent(registry) == {
        ("odd_bucket", (("a", "x"), ("le", "2.0"))): 1,
        ("odd_bucket", (("a", "x"), ("le", "inf"))): 5,
        ("odd_count", (("a", "x"),)): 5,
        ("odd_sum", (("a", "x"),)): 9,
    }


def test_many_series_are_several_requests() -> None:
    """A collector refuses what is too large."""
    families = []
    for name, series in (("few", 3), ("many", 25), ("none", 0), ("last", 4)):
        family = GaugeMetricFamily(name, "", labels=["n"])
        for n in range(series):
            family.add_metric([str(n)], n)
        families.append(family)
    made = list(requests(families, most=10))
    assert [len(samples([each])) for each in made] == [13, 10, 9]
    assert len(samples(made)) == 32
