"""The agent's log and metrics, and a collector that decodes them, without an agent."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

import ebpfproxy
from ebpfproxy.logs import get_logger
from ebpfproxy.otlp import log_sender
from ebpfproxy.otlp.delivery import Outcome
from ebpfproxy.otlp.exporter import Exporter
from ebpfproxy.otlp.libraries import OtlpError
from tests.apiserver.certificates import Authority
from tests.lab.waiting import until
from tests.otlp.receiver import Receiver, attributes, metrics_of, samples

log = get_logger("ebpfproxy.test")
FAILED = "failed to send to otlpEndpoint; further errors suppressed"
AGAIN = "sent to otlpEndpoint again"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about time: log lines wait for others for a moment only."""
    monkeypatch.setattr(log_sender, "_MILLISECONDS", 50.0)
    monkeypatch.setattr(logging.getLogger("ebpfproxy"), "level", logging.INFO)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver(socket.create_server(("127.0.0.1", 0)))
    yield made
    made.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(autouse=True)
def counter(registry: CollectorRegistry) -> Counter:
    return Counter("asked", "How often", registry=registry)


@pytest.fixture
def exporter(receiver: Receiver, registry: CollectorRegistry) -> Iterator[Exporter]:
    with_slash = f"{receiver.url}/"
    made = Exporter(with_slash, 0.05, registry, "node-a")
    yield made
    made.stop()
    made.close()


def end(exporter: Exporter) -> None:
    exporter.stop()
    exporter.close()


def said(caplog: pytest.LogCaptureFixture, text: str, signal: str = "metrics") -> list[str]:
    """The errors of what was logged about a signal."""
    facts = [record.__dict__["ebpfproxy_facts"] for record in caplog.records if record.getMessage() == text]
    return [each.get("error", "") for each in facts if each["signal"] == signal]


def test_metrics_are_sent_again_and_again(receiver: Receiver, counter: Counter, exporter: Exporter) -> None:
    def last() -> float:
        return samples(receiver.metrics[-1:]).get(("asked_total", ()), 0)

    counter.inc()
    exporter.start()
    until(lambda: last() == 1)
    counter.inc()
    until(lambda: last() == 2)
    resource = attributes(receiver.metrics[-1].resource_metrics[0].resource.attributes)
    wanted = {
        "service.name": "ebpfproxy",
        "service.version": ebpfproxy.__version__,
        "service.instance.id": "node-a",
        "k8s.node.name": "node-a",
    }
    assert {name: resource[name] for name in wanted} == wanted


def test_what_was_counted_before_is_not_taken_for_new(
    receiver: Receiver, counter: Counter, exporter: Exporter
) -> None:
    """Counters of maps go on from one agent to the next: the first point that arrives has no duration."""
    counter.inc(1000)
    receiver.status = 400
    exporter.start()
    until(lambda: receiver.asked >= 2)
    receiver.status = 200
    until(lambda: len(receiver.metrics) >= 2)
    first, second = (metrics_of([each])["asked_total"].sum.data_points[0] for each in receiver.metrics[:2])
    assert first.start_time_unix_nano == first.time_unix_nano
    assert second.start_time_unix_nano == first.time_unix_nano < second.time_unix_nano


def test_log_lines_have_their_details(receiver: Receiver, exporter: Exporter) -> None:
    log.warning("odd", count=3, share=0.5, right=True, names=("a", 1), where=None, path=Path("/x"))
    try:
        raise LookupError("it is not there")
    except LookupError:
        logging.getLogger("library").exception("failed")
    until(lambda: len(receiver.records()) == 2)
    ours, other = receiver.records()
    assert (ours.severity_text, ours.severity_number, ours.body.string_value) == ("warning", 13, "odd")
    details = {"count": 3, "share": 0.5, "right": True, "names": ["a", 1], "path": "/x"}
    assert attributes(ours.attributes) == details
    assert ours.time_unix_nano <= ours.observed_time_unix_nano
    assert (other.severity_text, other.body.string_value) == ("error", "library: failed")
    assert "LookupError: it is not there" in attributes(other.attributes)["exception"]


def test_a_line_that_is_not_utf_8_is_sent_with_the_others(receiver: Receiver, exporter: Exporter) -> None:
    log.info("of \udcff", path="/\udcfe", large=1 << 64)
    log.info("good")
    until(lambda: len(receiver.records()) == 2)
    assert receiver.bodies() == ["of \\udcff", "good"]
    assert attributes(receiver.records()[0].attributes) == {"path": "/\\udcfe", "large": str(1 << 64)}


def test_the_last_lines_are_sent_at_the_end_and_metrics_are_not(
    receiver: Receiver, registry: CollectorRegistry
) -> None:
    """Another agent of the node may have begun to send its own."""
    exporter = Exporter(receiver.url, 3600, registry, "node-a")
    exporter.start()
    until(lambda: len(receiver.metrics) == 1)
    exporter.stop()
    log.info("the last")
    exporter.close()
    assert receiver.bodies() == ["the last"]
    log.info("too late")
    assert (len(receiver.metrics), receiver.bodies()) == (1, ["the last"])


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "401 Unauthorized"), (308, "308 Permanent Redirect: the endpoint is another one")],
)
def test_a_refusal_is_said_once_until_it_goes_well_again(
    receiver: Receiver, exporter: Exporter, caplog: pytest.LogCaptureFixture, status: int, reason: str
) -> None:
    exporter.start()
    until(lambda: receiver.metrics)
    receiver.status = status
    until(lambda: said(caplog, FAILED))
    refused = receiver.asked
    until(lambda: receiver.asked >= refused + 5)
    receiver.status = 200
    until(lambda: said(caplog, AGAIN))
    assert said(caplog, FAILED) == [reason]
    # Logs are another signal, and that warning was one of them.
    assert len(said(caplog, FAILED, "logs")) <= 1
    # What the libraries say themselves is no line of the agent's.
    assert not any("opentelemetry" in body for body in receiver.bodies())


def test_last_success_last_failure_and_losses_can_be_read(receiver: Receiver, exporter: Exporter) -> None:
    for sender in (exporter.logs, exporter.metrics):
        assert sender.outcome == Outcome(None, None, "")
    receiver.status = 401
    exporter.start()
    log.info("refused")
    until(lambda: exporter.metrics.missed and exporter.logs.lost)
    for sender in (exporter.logs, exporter.metrics):
        assert sender.outcome.error == "401 Unauthorized"
        assert sender.outcome.sent is None
    receiver.status = 200
    log.info("taken")
    until(lambda: exporter.metrics.outcome.sent and exporter.logs.outcome.sent)
    for sender in (exporter.logs, exporter.metrics):
        last = sender.outcome
        assert last.sent is not None
        assert last.failed is not None
        assert last.sent >= last.failed
        assert last.error == "401 Unauthorized"
    missed, lost = exporter.metrics.missed, exporter.logs.lost
    before = len(receiver.metrics)
    until(lambda: len(receiver.metrics) > before)
    assert (exporter.metrics.missed, exporter.logs.lost) == (missed, lost)


def test_a_collector_that_is_away_for_a_moment_misses_nothing(
    receiver: Receiver, exporter: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    """The libraries try again after a second, then after two, and so on."""
    receiver.status = 503
    log.info("kept")
    until(lambda: receiver.asked == 1)
    receiver.status = 200
    until(receiver.records)
    assert receiver.bodies() == ["kept"]
    assert not said(caplog, FAILED, "logs")


def test_lines_that_nobody_takes_are_bounded_and_counted(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who logs does not wait, and the number of those that are lost is said when lines arrive again."""
    monkeypatch.setattr(log_sender, "_WAITING", 8)
    monkeypatch.setattr(log_sender, "_TOGETHER", 4)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        exporter = Exporter(f"http://127.0.0.1:{port}", 3600, registry, "node-a")
        for number in range(100):
            log.info("unheard", number=number)
        until(lambda: said(caplog, FAILED, "logs"))
    receiver = Receiver(socket.create_server(("127.0.0.1", port)))

    def arrives() -> bool:
        log.info("heard")
        return bool(said(caplog, AGAIN, "logs"))

    until(arrives)
    exporter.close()
    receiver.close()
    (again,) = (record for record in caplog.records if record.getMessage() == AGAIN)
    assert again.__dict__["ebpfproxy_facts"]["lost"] >= 92
    assert len(receiver.bodies()) <= sum(record.getMessage() == "heard" for record in caplog.records) + 10


def test_it_ends_although_nobody_answers(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_sender, "_END_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = Exporter(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.05, registry, "node-a")
        exporter.start()
        log.info("unheard")
        # Both are under way.
        requests = [silent.accept() for _ in ("metrics", "logs")]
        end(exporter)
        for connection, _ in requests:
            connection.close()


class _Broken(Collector):
    def __init__(self) -> None:
        self.is_broken = True

    def collect(self) -> list[CounterMetricFamily]:
        if self.is_broken:
            raise RuntimeError("no such map")
        return [CounterMetricFamily("fine", "Fine", value=1)]


def test_an_error_of_a_collector_does_not_end_it(
    receiver: Receiver, registry: CollectorRegistry, exporter: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    broken = _Broken()
    registry.register(broken)
    exporter.start()
    until(lambda: said(caplog, FAILED))
    assert said(caplog, FAILED) == ["RuntimeError('no such map')"]
    broken.is_broken = False
    until(lambda: receiver.metrics)


# -- variables of OpenTelemetry


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[Receiver, Authority]]:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    context.load_verify_locations(authority.path)
    context.verify_mode = ssl.CERT_REQUIRED
    made = Receiver(socket.create_server(("127.0.0.1", 0)), context)
    yield made, authority
    made.close()


def test_variables_have_headers_certificates_compression_and_attributes(
    secure: tuple[Receiver, Authority], registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, authority = secure
    certificate, key = authority.pair("client")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20s3cret,X-Scope-OrgID=shop")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(authority.path))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/ssl/certs/ca-certificates.crt")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", str(certificate))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", str(key))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.cluster.name=east")
    exporter = Exporter(receiver.url, 3600, registry, "node-a")
    exporter.start()
    log.info("by TLS")
    until(lambda: receiver.metrics and receiver.logs)
    end(exporter)
    for headers in receiver.headers:
        assert headers["authorization"] == "Bearer s3cret"
        assert headers["x-scope-orgid"] == "shop"
        assert headers["content-encoding"] == "gzip"
    resource = attributes(receiver.metrics[0].resource_metrics[0].resource.attributes)
    assert (resource["k8s.cluster.name"], resource["service.name"]) == ("east", "ebpfproxy")


def test_a_collector_whose_certificate_is_unknown_gets_nothing(
    secure: tuple[Receiver, Authority],
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    receiver, _ = secure
    exporter = Exporter(receiver.url, 3600, registry, "node-a")
    exporter.start()
    until(lambda: said(caplog, FAILED))
    end(exporter)
    assert "certificate verify failed" in said(caplog, FAILED)[0]
    assert receiver.asked == 0


@pytest.mark.parametrize(
    ("headers", "text"),
    [
        ("Authorization: Bearer s3cret", "ignoring a header of OTEL_EXPORTER_OTLP_HEADERS"),
        ("Authorization=Bearer%20s3cret%0A", ""),
        ("Authorization=Bearer%0As3cret", "OTEL_EXPORTER_OTLP_HEADERS has a header that cannot be sent"),
        ("Authorization=s3cret%E2%82%AC", "OTEL_EXPORTER_OTLP_HEADERS has a header that cannot be sent"),
    ],
)
def test_no_line_has_a_header(
    receiver: Receiver,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    headers: str,
    text: str,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", headers)
    exporter = Exporter(receiver.url, 0.05, registry, "node-a")
    exporter.start()
    until(lambda: receiver.metrics or said(caplog, FAILED))
    end(exporter)
    logged = "".join(str(record.__dict__) for record in caplog.records)
    assert text in logged
    assert "s3cret" not in logged


def test_a_variable_without_use_is_told_or_an_error(
    receiver: Receiver,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "zip")
    Exporter(receiver.url, 0.05, registry, "node-a").close()
    remarks = [record.__dict__["ebpfproxy_facts"]["remark"] for record in caplog.records]
    # Each of both exporters reads it.
    assert set(remarks) == {"Unsupported compression type: zip"}
    monkeypatch.setenv("OTEL_ATTRIBUTE_COUNT_LIMIT", "many")
    with pytest.raises(OtlpError, match=r"^otlpEndpoint: .*OTEL_ATTRIBUTE_COUNT_LIMIT"):
        Exporter(receiver.url, 0.05, registry, "node-a")
