"""Logging to standard error: one line per event, as text or as JSON.

A thin layer over the standard library's logging, with the details of an event as keywords. (structlog would
do the same, but imports rich's tracebacks: 13 MB in every agent, which never prints one.)

Stable JSON keys are ``ts`` (RFC 3339, UTC), ``level`` and ``event``; all others are details:
``resource``, ``object``, ``file``, ``error``, …
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from ebpfproxy.plain_text import escaped_json, plain

#: kube-proxy's -v: at this level and above everything is logged.
DEBUG_VERBOSITY = 4

_FACTS = "ebpfproxy_facts"
_PLAIN = logging.Formatter()


class Logger:
    """``log.warning("watch is failing", resource="services")``"""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _log(self, level: int, event: str, facts: dict[str, Any]) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", event, extra={_FACTS: facts})

    def debug(self, event: str, **facts: Any) -> None:
        self._log(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: Any) -> None:
        self._log(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._log(logging.WARNING, event, facts)

    def error(self, event: str, **facts: Any) -> None:
        self._log(logging.ERROR, event, facts)


def get_logger(name: str) -> Logger:
    return Logger(name)


def event_of(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The event and its details; a library's record has none."""
    facts = dict(getattr(record, _FACTS, {}))
    event = record.getMessage()
    if not record.name.startswith("ebpfproxy"):
        event = f"{record.name}: {event}"
    if record.exc_info:
        facts["exception"] = _PLAIN.formatException(record.exc_info)
    return event, facts


class _Formatter(logging.Formatter):
    """The parts of a record: time, level, event, details."""

    def parts(self, record: logging.LogRecord) -> tuple[str, str, str, dict[str, Any]]:
        event, facts = event_of(record)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return time.replace("+00:00", "Z"), record.levelname.lower(), event, facts


class TextFormatter(_Formatter):
    """``2026-11-20T10:00:00.000Z warning watch is failing resource=services error='401 …'``"""

    def format(self, record: logging.LogRecord) -> str:
        time, level, event, facts = self.parts(record)
        shown = "".join(f" {key}={_quoted(value)}" for key, value in facts.items())
        return f"{time} {level:<7} {plain(event)}{shown}"


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time, level, event, facts = self.parts(record)
        line = {"ts": time, "level": level, "event": event, **facts}
        try:
            encoded = msgspec.json.encode(line, enc_hook=str)
        except UnicodeEncodeError:
            # Half a surrogate pair is in no JSON of msgspec's, but may be in the path of a file.
            encoded = json.dumps(line, default=str).encode()
        return escaped_json(encoded.decode())


def _quoted(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    is_plain = text and text.isprintable() and not any(c.isspace() or c in "\"'=" for c in text)
    return text if is_plain else repr(text)


def configure(form: str, verbosity: int) -> None:
    """``form`` is ``text`` or ``json``; ``verbosity`` is klog's level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    # Libraries may log warnings; anything below is noise.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("ebpfproxy").setLevel(logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO)
    # The reflector logs failing requests itself, once per change of state.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
