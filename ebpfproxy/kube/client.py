"""The one connection to an API server: requests with credentials, counted, limited, and sent again where
that may help."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlencode

import urllib3

import ebpfproxy
from ebpfproxy.kube import access, control_plane, deadlines, failures, kubeconfig
from ebpfproxy.kube.access import Access, check_server
from ebpfproxy.kube.backoff import Backoff
from ebpfproxy.kube.decode import decode_status
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.failures import Failure
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.logs import get_logger

__all__ = ["KEEPALIVE", "USER_AGENT", "ApiConnection", "Reply"]

log = get_logger(__name__)

_CONNECT_SECONDS = 10.0
#: After this many requests in a row that nobody answers, another address is looked for.
_UNANSWERED = 3
_MOST_BYTES = 1 << 20
_ERROR_BYTES = 64 * 1024
#: urllib3 takes no time-out of 0.
_LEAST_SECONDS = 0.01
USER_AGENT = f"ebpfproxy/{ebpfproxy.__version__}"
#: Seconds between two tries of one request.
_BACKOFF_FIRST, _BACKOFF_MOST = 0.5, 8.0
#: A peer that vanishes is noticed after about a minute (tcp(7)).
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

NOTHING: Mapping[str, str] = MappingProxyType({})
JSON = "application/json"


class Reply(NamedTuple):
    """A whole answer, with a status below 300."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: bytes


class _Session(NamedTuple):
    """The configuration as it was read; it is replaced as a whole."""

    access: Access
    pool: urllib3.PoolManager


class ApiConnection:
    """Requests to one API server. Any thread may use it.

    Credentials that rotate (exec plugins, token files, service account tokens) are read anew for every
    request; :meth:`reload` reads the whole configuration again, after the server has refused them.
    """

    def __init__(
        self, configure: Callable[[], Access], limit: RateLimit | None = None, *, has_choice: bool = False
    ) -> None:
        """``limit`` holds for :meth:`get`. ``has_choice``: ``configure`` chooses among addresses, and is
        asked again when nobody answers at the one that it chose. Raises ConfigError."""
        self._configure = configure
        self._limit = limit
        self._has_choice = has_choice
        self._unanswered = 0
        self._unverified = ""
        self._session_lock = threading.Lock()
        self._requests_lock = threading.Lock()
        #: Answers by HTTP status and method; the status is ``<error>`` where none came.
        self.requests: dict[tuple[str, str], int] = {}
        #: It is called for every request: with its method, and how long its answer took to begin, in seconds.
        self.observe: Callable[[str, float], None] = lambda *_: None
        self._session = self._open()

    @classmethod
    def from_options(
        cls,
        kubeconfigs: Path | Sequence[Path] | None,
        master: str | None,
        limit: RateLimit | None = None,
        *,
        context: str | None = None,
    ) -> ApiConnection:
        """``--kubeconfig`` and ``--master``; without them the pod's service account.

        ``master`` alone is an API server that asks for no credentials; with a kubeconfig it replaces the
        server's address in it. Raises ConfigError.
        """
        if kubeconfigs is None and master is None:
            return cls.in_pod(limit=limit)
        if master is not None:
            check_server(master, "--master")
        paths = [kubeconfigs] if isinstance(kubeconfigs, Path) else list(kubeconfigs or ())

        def configure() -> Access:
            if not paths:
                server = str(master).rstrip("/")
                return Access(server, access.verifying() if server.startswith("https://") else None)
            return kubeconfig.load(paths, context, master)

        return cls(configure, limit)

    @classmethod
    def in_pod(cls, master: str | None = None, limit: RateLimit | None = None) -> ApiConnection:
        """The pod's service account; ``master`` replaces the server's address. Raises ConfigError."""
        if master is None:
            return cls(_InCluster(), limit, has_choice=True)
        check_server(master, "--master")
        return cls(lambda: access.in_cluster()._replace(server=master.rstrip("/")), limit)

    @property
    def access(self) -> Access:
        """The configuration as it is now."""
        return self._session.access

    @property
    def host(self) -> str:
        """Where requests go: ``https://10.0.0.1:6443``."""
        return self._session.access.server

    @property
    def kubeconfig_server(self) -> str:
        """What the kubeconfig names, whatever ``--master`` says; empty without a kubeconfig."""
        return self._session.access.kubeconfig_server

    def _open(self) -> _Session:
        found = self._configure()
        if found.is_unverified:
            # urllib3 would warn for each request: one line for each server is enough.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
            if found.server != self._unverified:
                self._unverified = found.server
                log.warning(
                    "the API server's certificate is not verified (insecure-skip-tls-verify)",
                    server=found.server,
                )
        # A connection for each watch, and one to list meanwhile.
        pool = access.pool(found, socket_options=list(KEEPALIVE), maxsize=8)
        return _Session(found, deadlines.watching(pool))

    def reload(self) -> None:
        """Reads files and credentials again. Raises ConfigError, then the old ones stay in use."""
        with self._session_lock:
            self._session = self._open()

    def get(self, path: str, params: Mapping[str, str], *, read_seconds: float) -> urllib3.BaseHTTPResponse:
        """Starts a GET, at the rate of the limit, and returns the response unread, whatever its status.

        ``read_seconds`` bounds every wait for bytes. Raises Failure.
        """
        if self._limit is not None:
            self._limit.wait()
        return self.request("GET", path, params, read_seconds=read_seconds)

    def call(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] = NOTHING,
        *,
        body: bytes | None = None,
        content_type: str = JSON,
        read_seconds: float,
        most_bytes: int | None = None,
        tries: int = 1,
        seconds: float = math.inf,
    ) -> Reply:
        """Returns the whole answer, of which no more than ``most_bytes`` are read.

        The request is sent up to ``tries`` times, as long as failures are transient
        (:attr:`Failure.is_transient`), and all of it takes ``seconds`` at most, without the time that
        credentials take: a plugin may wait for its user. Raises Failure, also for a status of 300 and more.
        """
        backoff = Backoff(_BACKOFF_FIRST, _BACKOFF_MOST)
        began = time.monotonic()
        while True:
            tries -= 1
            try:
                before = time.monotonic()
                session, authorization = self._prepare()
                began += time.monotonic() - before
                deadline = began + seconds
                with deadlines.until(deadline):
                    response = self._send(
                        session,
                        authorization,
                        method,
                        path,
                        params,
                        body=body,
                        content_type=content_type,
                        read_seconds=min(read_seconds, max(_LEAST_SECONDS, deadline - time.monotonic())),
                    )
                if response.status >= 300:
                    raise refusal(response)
                return Reply(response.status, response.headers, read(response, most_bytes))
            except Failure as failure:
                pause = max(failure.retry_after or 0.0, backoff.next())
                failure.waited = time.monotonic() - began
                if tries <= 0 or not failure.is_transient or failure.waited + pause >= seconds:
                    raise
                time.sleep(pause)

    def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] = NOTHING,
        *,
        body: bytes | None = None,
        content_type: str = JSON,
        read_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        """Does the same as :meth:`get`, but without a limit."""
        prepared = self._prepare()
        return self._send(
            *prepared, method, path, params, body=body, content_type=content_type, read_seconds=read_seconds
        )

    def _prepare(self) -> tuple[_Session, str]:
        """The session with its credentials as they are now. Raises Failure."""
        try:
            self._choose_again()
            session = self._session
            return session, session.access.authorization()
        except ConfigError as error:
            raise Failure("credentials", str(error)) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise failures.of_exception(error) from error

    def _send(
        self,
        session: _Session,
        authorization: str,
        method: str,
        path: str,
        params: Mapping[str, str],
        *,
        body: bytes | None,
        content_type: str,
        read_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        query = f"?{urlencode(params)}" if params else ""
        began = time.monotonic()
        try:
            response = session.pool.request(
                method,
                f"{session.access.server}{path}{query}",
                headers=_headers(method, body, content_type, authorization),
                body=body,
                preload_content=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=min(_CONNECT_SECONDS, read_seconds), read=read_seconds),
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            self._count("<error>", method, began)
            raise failures.of_exception(error) from error
        self._count(str(response.status), method, began)
        return response

    def _count(self, code: str, method: str, began: float) -> None:
        self.observe(method, time.monotonic() - began)
        with self._requests_lock:
            self._unanswered = self._unanswered + 1 if code == "<error>" else 0
            self.requests[code, method] = self.requests.get((code, method), 0) + 1

    def _choose_again(self) -> None:
        if not self._has_choice or self._unanswered < _UNANSWERED:
            return
        with self._session_lock:
            # Another thread may have done so while this one waited.
            if self._unanswered >= _UNANSWERED:
                self._unanswered = 0
                self._session = self._open()


def _headers(method: str, body: bytes | None, content_type: str, authorization: str) -> dict[str, str]:
    headers = {"Accept": JSON, "User-Agent": USER_AGENT}
    if method == "GET":
        # Long lists come compressed, and from 1.37 on (WatchListCompression) streams, too.
        headers["Accept-Encoding"] = "gzip"
    if body is not None:
        headers["Content-Type"] = content_type
    if authorization:
        headers["Authorization"] = authorization
    return headers


def _up_to(response: urllib3.BaseHTTPResponse, most_bytes: int | None) -> bytes:
    """Reads the body; a connection with more of it is closed."""
    body = bytes(response.read(most_bytes))
    if most_bytes is None or len(body) < most_bytes:
        response.release_conn()
    else:
        response.close()
    return body


def read(response: urllib3.BaseHTTPResponse, most_bytes: int | None = None) -> bytes:
    """Reads the body. Raises Failure."""
    try:
        return _up_to(response, most_bytes)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise failures.of_exception(error) from error


def refusal(response: urllib3.BaseHTTPResponse) -> Failure:
    """Reads an answer and returns the Failure (or Expired) that it stands for."""
    try:
        body = _up_to(response, _ERROR_BYTES)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        return failures.of_exception(error)
    return failures.of_status(decode_status(body, response.status), response.headers.get("Retry-After"))


class _InCluster:
    """The service account's credentials, for the best address of the control plane."""

    def __init__(self) -> None:
        self._chosen: control_plane.Choice | None = None
        self._last_answering: control_plane.Choice | None = None

    def __call__(self) -> Access:
        try:
            found = access.in_cluster()
        except ConfigError as error:
            raise ConfigError(
                f"no --kubeconfig, --master or --manifests, and not in a pod with a service account: {error}"
            ) from error
        choice = control_plane.choose(found.server, _anonymously(found), last=self._last_answering)
        if choice.answers:
            self._last_answering = choice
        if choice != self._chosen:
            self._chosen = choice
            if choice.answers:
                log.info("control plane found", server=choice.server, named_by=choice.source)
            else:
                log.warning("no control plane answers", server=choice.server, named_by=choice.source)
        return found._replace(server=choice.server)


def _anonymously(found: Access) -> control_plane.Ask:
    """Sends no token, and takes no longer than a choice may."""
    pool = access.pool(found)

    def ask(url: str) -> bytes:
        response = pool.request(
            "GET",
            url,
            headers={"Accept": JSON, "User-Agent": USER_AGENT},
            preload_content=False,
            redirect=False,
            timeout=urllib3.Timeout(control_plane.SECONDS),
        )
        try:
            return bytes(response.read(_MOST_BYTES)) if response.status == 200 else b""
        finally:
            response.close()

    return ask
