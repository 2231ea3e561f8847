"""Decisions of ``ebpfproxy trace`` on their way to a collector."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from opentelemetry._logs import LogRecord, SeverityNumber

from ebpfproxy.otlp.delivery import remarks
from ebpfproxy.otlp.libraries import OtlpError
from ebpfproxy.otlp.log_sender import LogSender, attributes, nanoseconds, text
from ebpfproxy.otlp.origin import NAME, resource_of
from ebpfproxy.trace.rows import DecisionRow, is_good, sentence

#: Between two lines about what was lost.
_LOST_SECONDS = 1.0


class DecisionSender:
    """``say`` gets what is to be said about the way to the collector."""

    def __init__(self, endpoint: str, node: str, say: Callable[[str], None]) -> None:
        """Raises OtlpError."""
        self._say = say
        self._told, self._next = 0, 0.0
        try:
            with remarks(say):
                self._logs = LogSender(endpoint, resource_of(node), self._changed)
        except ValueError as error:
            raise OtlpError(f"--otlp-endpoint: variables of OpenTelemetry: {error}") from error

    def write(self, rows: list[DecisionRow]) -> None:
        for row in rows:
            details = msgspec.to_builtins(row)
            self._logs.emit(
                LogRecord(
                    timestamp=nanoseconds(details.pop("time")),
                    severity_number=SeverityNumber.INFO if is_good(row) else SeverityNumber.WARN,
                    severity_text="info" if is_good(row) else "warning",
                    body=text(sentence(row)),
                    attributes=attributes(details),
                    event_name=f"{NAME}.decision",
                )
            )
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOST_SECONDS
            self._say_lost()

    def close(self) -> None:
        self._logs.close()
        self._say_lost()

    def _changed(self, error: str) -> None:
        self._say(f"failed to send to --otlp-endpoint: {error}" if error else "sent to --otlp-endpoint again")

    def _say_lost(self) -> None:
        lost = self._logs.lost
        if lost > self._told:
            self._say(f"lost {lost - self._told} decisions: the collector did not take them")
            self._told = lost
