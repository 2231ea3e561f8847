"""Sends records of logs: soon, together, and from a thread that alone waits for the collector."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.util.types import AnyValue

from ebpfproxy.otlp.delivery import Delivery, Outcome
from ebpfproxy.otlp.origin import SCOPE, url

#: Records that wait, and those of one request.
_WAITING, _TOGETHER = 2048, 512
_MILLISECONDS = 1000.0
#: The end of an agent does not wait longer for a collector.
_END_SECONDS = 3.0
_INTEGERS = range(-(1 << 63), 1 << 63)


class LogSender:
    """Any thread may call :meth:`emit`, which never waits: what finds no room is lost, and counted."""

    def __init__(self, endpoint: str, resource: Resource, changed: Callable[[str], None]) -> None:
        """``changed``: as of :class:`Delivery`, called in the sending thread. Raises ValueError."""
        self._delivery = Delivery(changed)
        self._exporter = _Exporter(endpoint, self._delivery)
        self._provider = LoggerProvider(resource, shutdown_on_exit=False)
        self._provider.add_log_record_processor(
            BatchLogRecordProcessor(
                self._exporter,
                schedule_delay_millis=_MILLISECONDS,
                max_export_batch_size=_TOGETHER,
                max_queue_size=_WAITING,
            )
        )
        self._logger = self._provider.get_logger(SCOPE.name, SCOPE.version)
        self._lock = threading.Lock()
        self._emitted = self._without_room = 0

    def emit(self, record: LogRecord) -> None:
        with self._lock:
            # The libraries' queue drops without a count.
            if self._emitted - self._exporter.sent - self._exporter.lost >= _WAITING:
                self._without_room += 1
                return
            self._emitted += 1
        self._logger.emit(record)

    @property
    def outcome(self) -> Outcome:
        return self._delivery.outcome

    @property
    def lost(self) -> int:
        """Records that did not and will not arrive."""
        return self._without_room + self._exporter.lost

    def close(self) -> None:
        """Sends what there is, and counts as lost what has not been sent after some seconds."""
        last = threading.Thread(target=self._provider.shutdown, name="otlp-logs-end", daemon=True)
        last.start()
        last.join(_END_SECONDS)
        with self._lock:
            self._without_room += self._emitted - self._exporter.sent - self._exporter.lost


class _Exporter(OTLPLogExporter):
    def __init__(self, endpoint: str, delivery: Delivery) -> None:
        super().__init__(url(endpoint, "logs"), session=delivery.session)
        self._delivery = delivery
        self.sent = self.lost = 0

    def export(self, batch: Sequence[ReadableLogRecord]) -> LogRecordExportResult:
        self._delivery.session.failure = ""
        result = super().export(batch)
        is_sent = result is LogRecordExportResult.SUCCESS
        if is_sent:
            self.sent += len(batch)
        else:
            self.lost += len(batch)
        self._delivery.note(sent=is_sent)
        return result


def nanoseconds(seconds: float) -> int:
    """A float has microseconds of this century, and no more."""
    return round(seconds * 1e6) * 1000


def attributes(details: Mapping[str, Any]) -> dict[str, AnyValue]:
    """Details as JSON has them, without nulls. A dot joins the name of one to that of one within it."""
    return dict(_attributes(msgspec.to_builtins(details, enc_hook=str, str_keys=True)))


def _attributes(details: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, AnyValue]]:
    for name, value in details.items():
        if isinstance(value, dict):
            yield from _attributes(value, f"{above}{name}.")
        elif value is not None:
            yield above + text(name), _value(value)


def _value(value: Any) -> AnyValue:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool | float) or (isinstance(value, int) and value in _INTEGERS):
        return value
    return [_value(each) for each in value] if isinstance(value, list | tuple) else str(value)


def text(value: str) -> str:
    """Half a surrogate pair may be in the path of a file, but not in UTF-8: a whole request would fail."""
    return value.encode(errors="backslashreplace").decode()
