"""Requests to the collector, and what becomes of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import requests

#: For one connection of several tries: where a Service's address is not served yet, nothing answers at all.
_CONNECT_SECONDS = 2.0
_libraries = logging.getLogger("opentelemetry")


class Session(requests.Session):
    """Knows why its last request failed.

    What the exporters log about it gives no reason in most cases, and headers in some.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure = ""

    def request(self, method: str, url: str | bytes, *args: Any, **more: Any) -> requests.Response:
        if isinstance(seconds := more.get("timeout"), int | float):
            more["timeout"] = (min(seconds, _CONNECT_SECONDS), seconds)
        if isinstance(self.verify, str):
            # Otherwise REQUESTS_CA_BUNDLE would take the place of OTEL_EXPORTER_OTLP_CERTIFICATE.
            more["verify"] = self.verify
        try:
            response = super().request(method, url, *args, **more)
        except (requests.exceptions.InvalidHeader, UnicodeError):
            self.failure = "OTEL_EXPORTER_OTLP_HEADERS has a header that cannot be sent"
            raise
        except Exception as error:
            self.failure = str(error) or type(error).__name__
            raise
        self.failure = "" if response.ok else f"{response.status_code} {response.reason}"
        if 300 <= response.status_code < 400:
            # The exporters would take it for a success.
            self.failure = f"{response.status_code} {response.reason}: the endpoint is another one"
            raise requests.TooManyRedirects(self.failure)
        return response


class Outcome(NamedTuple):
    """When a signal arrived last, and when and why it last did not, in Unix seconds; None: never."""

    sent: float | None = None
    failed: float | None = None
    error: str = ""


class Delivery:
    """Whether one signal arrives. ``changed`` gets the first error, and "" when it arrives again."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        self.session = Session()
        #: Replaced as a whole, so that any thread may read it.
        self.outcome = Outcome()
        self._changed = changed
        self._is_failing = False

    def note(self, *, sent: bool, error: str = "") -> None:
        """``error``: if it was not the last request's."""
        now = time.time()
        if sent:
            self.outcome = self.outcome._replace(sent=now)
        else:
            error = error or self.session.failure or "the data cannot be encoded"
            self.outcome = self.outcome._replace(failed=now, error=error)
        if sent == self._is_failing:
            self._is_failing = not sent
            self._changed(error)


class _Remarks(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        # Its message has the whole header.
        is_header = record.name == "opentelemetry.util.re"
        text = "ignoring a header of OTEL_EXPORTER_OTLP_HEADERS that is not NAME=VALUE"
        self._tell(text if is_header else record.getMessage())


@contextmanager
def remarks(tell: Callable[[str], None]) -> Iterator[None]:
    """What the libraries remark about variables as they read them is told; all that they log later is not."""
    _libraries.propagate = False
    handler = _Remarks(tell)
    # Without any, the standard library would print it.
    _libraries.handlers = [handler]
    try:
        yield
    finally:
        _libraries.handlers = [logging.NullHandler()]
