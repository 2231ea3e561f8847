"""A collector: an HTTP server that decodes what it is sent."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

#: What ``/metrics`` would say of a sample: its name, and its labels.
Key = tuple[str, tuple[tuple[str, str], ...]]


class Receiver:
    """Serves at an open listener. ``status`` is what it answers."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self.status = 200
        #: How often it was sent anything.
        self.asked = 0
        self.headers: list[dict[str, str]] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.logs: list[ExportLogsServiceRequest] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                receiver.asked += 1
                if receiver.status == 200:
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    receiver.take(self.path, headers, body)
                self.send_response(receiver.status)
                self.send_header("Content-Length", "0")
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
        self._server.socket.close()
        port = listener.getsockname()[1]
        self._server.socket = tls.wrap_socket(listener, server_side=True) if tls is not None else listener
        self.url = f"http{'s' if tls is not None else ''}://127.0.0.1:{port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        assert headers["content-type"] == "application/x-protobuf"
        self.headers.append(headers)
        if path == "/v1/metrics":
            self.metrics.append(ExportMetricsServiceRequest.FromString(body))
        else:
            assert path == "/v1/logs"
            self.logs.append(ExportLogsServiceRequest.FromString(body))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def records(self) -> list[LogRecord]:
        """All so far."""
        return [
            record
            for request in list(self.logs)
            for each in request.resource_logs
            for scope in each.scope_logs
            for record in scope.log_records
        ]

    def bodies(self) -> list[str]:
        return [record.body.string_value for record in self.records()]


def attributes(found: Any) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in found}


def value(found: AnyValue) -> Any:
    kind = found.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in found.array_value.values]
    return getattr(found, kind) if kind else None


def metrics_of(requests: Iterable[ExportMetricsServiceRequest]) -> dict[str, Metric]:
    return {metric.name: metric for metric in _metrics(requests)}


def samples(requests: Iterable[ExportMetricsServiceRequest]) -> dict[Key, float]:
    """The samples that Prometheus would have of these metrics; the last ones of those that are there again."""
    found: dict[Key, float] = {}
    for metric in _metrics(requests):
        found.update(_samples(metric))
    return found


def _metrics(requests: Iterable[ExportMetricsServiceRequest]) -> Iterator[Metric]:
    for request in requests:
        for each in request.resource_metrics:
            for scope in each.scope_metrics:
                yield from scope.metrics


def _samples(metric: Metric) -> dict[Key, float]:
    kind = metric.WhichOneof("data")
    assert kind is not None, metric.name
    found: dict[Key, float] = {}
    for point in getattr(metric, kind).data_points:
        labels = {name: str(each) for name, each in attributes(point.attributes).items()}
        if kind != "histogram":
            found[key(metric.name, labels)] = point.as_double if point.HasField("as_double") else point.as_int
            continue
        found[key(f"{metric.name}_sum", labels)] = point.sum
        found[key(f"{metric.name}_count", labels)] = point.count
        below = 0
        for bound, count in zip([*point.explicit_bounds, float("inf")], point.bucket_counts, strict=True):
            below += count
            found[key(f"{metric.name}_bucket", {**labels, "le": str(bound)})] = below
    return found


def key(name: str, labels: dict[str, str]) -> Key:
    return name, tuple(sorted(labels.items()))
