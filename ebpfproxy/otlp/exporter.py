"""The agent's log and metrics on their way to a collector."""

from __future__ import annotations

import logging

from opentelemetry._logs import LogRecord, SeverityNumber
from prometheus_client import CollectorRegistry

from ebpfproxy.logs import event_of, get_logger
from ebpfproxy.otlp.delivery import remarks
from ebpfproxy.otlp.libraries import OtlpError
from ebpfproxy.otlp.log_sender import LogSender, attributes, nanoseconds, text
from ebpfproxy.otlp.metric_sender import MetricSender
from ebpfproxy.otlp.origin import resource_of

_SEVERITIES = {
    logging.DEBUG: SeverityNumber.DEBUG,
    logging.INFO: SeverityNumber.INFO,
    logging.WARNING: SeverityNumber.WARN,
    logging.ERROR: SeverityNumber.ERROR,
}

log = get_logger(__name__)


class Exporter:
    """Sends the log from now on, and metrics between :meth:`start` and :meth:`stop`."""

    def __init__(self, endpoint: str, seconds: float, registry: CollectorRegistry, node: str) -> None:
        """Raises OtlpError where a variable of OpenTelemetry has no use."""
        try:
            with remarks(lambda remark: log.warning("configuration", remark=remark)):
                resource = resource_of(node)
                self.logs = LogSender(endpoint, resource, self._logs_changed)
                self.metrics = MetricSender(endpoint, resource, registry, seconds, _metrics_changed)
        except ValueError as error:
            raise OtlpError(f"otlpEndpoint: variables of OpenTelemetry: {error}") from error
        self._handler = _Handler(self.logs)
        logging.getLogger().addHandler(self._handler)

    def start(self) -> None:
        self.metrics.start()

    def stop(self) -> None:
        self.metrics.stop()

    def close(self) -> None:
        logging.getLogger().removeHandler(self._handler)
        self.logs.close()

    def _logs_changed(self, error: str) -> None:
        _tell("logs", error, lost=self.logs.lost)


def _metrics_changed(error: str) -> None:
    _tell("metrics", error)


def _tell(signal: str, error: str, **facts: object) -> None:
    if error:
        log.warning(
            "failed to send to otlpEndpoint; further errors suppressed", signal=signal, error=error, **facts
        )
    else:
        log.info("sent to otlpEndpoint again", signal=signal, **facts)


class _Handler(logging.Handler):
    """The event is the body, and its details are attributes, as in the JSON on standard error."""

    def __init__(self, sender: LogSender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event, facts = event_of(record)
            self._sender.emit(
                LogRecord(
                    timestamp=nanoseconds(record.created),
                    severity_number=_SEVERITIES.get(record.levelno, SeverityNumber.FATAL),
                    severity_text=record.levelname.lower(),
                    body=text(event),
                    attributes=attributes(facts),
                )
            )
        except Exception:
            self.handleError(record)
