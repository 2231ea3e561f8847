"""What can go wrong between a list and a watch, and the word that metrics count it under."""

from __future__ import annotations

from ebpfproxy.kube.decode import Status


class Failure(Exception):  # noqa: N818 - a failure to go on, not an error of ours
    """``reason`` is a metric label; ``retry_after`` seconds are the server's wish."""

    def __init__(self, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Expired(Exception):  # noqa: N818
    """The resourceVersion or the continue token is too old (410): list again."""


#: By the name of an exception in the chain that urllib3 raises; the first that is found counts.
_REASONS = (
    ("ReadTimeoutError", "idle"),
    ("TimeoutError", "idle"),
    ("ConnectTimeoutError", "timeout"),
    ("SSLError", "tls"),
    ("SSLCertVerificationError", "tls"),
    ("NameResolutionError", "dns"),
    ("ConnectionRefusedError", "refused"),
    ("IncompleteRead", "truncated"),
)


def of_status(status: Status, retry_after: str | None = None) -> Failure | Expired:
    """Retry-After counts in seconds for the API server (RFC 9110 allows a date, too: ignored)."""
    message = f"{status.code} {status.reason}: {status.message}".strip()
    if status.code == 410:
        return Expired(message)
    wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
    return Failure(str(status.code), message, wait)


def of_exception(error: BaseException) -> Failure:
    causes = [error, *error.args, error.__cause__, error.__context__]
    kinds = {type(cause).__name__ for cause in causes if isinstance(cause, BaseException)}
    reason = next((reason for kind, reason in _REASONS if kind in kinds), "connection")
    return Failure(reason, f"{type(error).__name__}: {error}")
