"""Logging: one line an event, as text or as JSON, to standard error.

JSON keys that stay: ``ts`` (RFC 3339, UTC), ``level``, ``event``; everything else says what it is about:
``resource``, ``object``, ``file``, ``error``, …
"""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

#: kube-proxy's -v: at this level and above everything is logged.
DEBUG_VERBOSITY = 4


def configure(form: str, verbosity: int) -> None:
    """``form`` is ``text`` or ``json``; ``verbosity`` is klog's level."""
    level = logging.DEBUG if verbosity >= DEBUG_VERBOSITY else logging.INFO
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    last: list[Processor]
    if form == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="ts", pad_event_to=0)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard module: what they warn of is worth a line, the rest is noise.
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format='{"ts":"%(asctime)s","level":"%(levelname)s","event":"%(name)s: %(message)s"}'
        if form == "json"
        else "%(asctime)s [%(levelname)s] %(name)s: %(message)s",
    )
    # Each failing request is logged by the reflector, once for each change of state.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
