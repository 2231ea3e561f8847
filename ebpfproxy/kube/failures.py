"""What can go wrong with a request, the word that metrics count it under, and whether to ask again."""

from __future__ import annotations

import re
from http import HTTPStatus
from http.client import responses

import urllib3

from ebpfproxy.kube.decode import Status
from ebpfproxy.kube.errors import without_credentials


class Failure(Exception):  # noqa: N818 - a failure to go on, not an error of ours
    """``reason`` is a metric label, for an answer its HTTP status; ``retry_after`` seconds are the server's
    wish."""

    def __init__(self, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
        #: How long a call that failed has waited for the server, in seconds.
        self.waited = 0.0

    @property
    def status(self) -> int:
        """The HTTP status; 0 where no answer came."""
        return int(self.reason) if self.reason.isdecimal() else 0

    @property
    def is_transient(self) -> bool:
        """The server is overloaded, or the connection broke after the request: it is worth sending again.

        False where no connection could be made, so that a wrong address is reported at once.
        """
        return self.reason in _TRANSIENT

    @property
    def is_silence(self) -> bool:
        """Nothing came in time: no connection, no answer, or no end of it."""
        return self.reason in ("idle", "timeout")


class Expired(Failure):
    """The resourceVersion or the continue token is too old (410): list again."""

    def __init__(self, message: str) -> None:
        super().__init__(str(int(HTTPStatus.GONE)), message)


_TRANSIENT = frozenset({"429", "502", "503", "504", "connection", "idle", "truncated"})
#: The first name counts that is found among the exceptions in the chain that urllib3 raises.
_REASONS = (
    ("ReadTimeoutError", "idle"),
    # urllib3 raises it from a TimeoutError.
    ("ConnectTimeoutError", "timeout"),
    ("TimeoutError", "idle"),
    ("SSLError", "tls"),
    ("SSLCertVerificationError", "tls"),
    ("NameResolutionError", "dns"),
    ("ConnectionRefusedError", "refused"),
    ("IncompleteRead", "truncated"),
)
#: No answer makes a request wait longer, in seconds.
_LONGEST_RETRY_AFTER = 300.0
#: urllib3's messages begin with its objects.
_CONNECTION = re.compile(r"^<?\S+Connection\S*?(\(.*?\))?( object at 0x[0-9a-f]+>)?: ")


def of_status(status: Status, retry_after: str | None = None) -> Failure:
    """``retry_after``: the header, in seconds; dates (RFC 9110) are ignored, since API servers send none."""
    phrase = responses.get(status.code, status.reason)
    # A list of conflicts has a line for each field.
    text = status.message.replace(":\n- ", ": ").replace("\n- ", ", ").replace("\n", "; ")
    message = f"{status.code} {phrase}".strip() + (f": {text}" if text else "")
    if status.code == HTTPStatus.GONE:
        return Expired(message)
    wait = None
    if retry_after and retry_after.isdecimal():
        wait = min(float(retry_after), _LONGEST_RETRY_AFTER)
    return Failure(str(status.code), message, wait)


def of_exception(error: BaseException) -> Failure:
    causes = [error, *error.args, error.__cause__, error.__context__]
    kinds = {type(cause).__name__ for cause in causes if isinstance(cause, BaseException)}
    reason = next((reason for kind, reason in _REASONS if kind in kinds), "connection")
    text = without_credentials(" ".join(_CONNECTION.sub("", _text(error)).split()))
    if isinstance(error, urllib3.exceptions.LocationParseError):
        # Its message may have a part of a password.
        text = "not a valid URL"
    return Failure(reason, text or type(error).__name__)


def _text(error: BaseException) -> str:
    """Returns the message. urllib3 passes connections and causes beside it, which str() shows as a tuple."""
    found = getattr(error, "reason", None) or error
    if not isinstance(found, urllib3.exceptions.HTTPError) or len(found.args) < 2:
        return str(found)
    texts = [each.rstrip(".") for each in found.args if isinstance(each, str)]
    causes = [each for each in found.args if isinstance(each, Exception) and repr(each) not in "".join(texts)]
    return ": ".join([*texts, *map(str, causes)])
