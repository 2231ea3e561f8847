"""The connection to the API server: configured by the ``kubernetes`` package, requests as raw streams."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlencode

import urllib3
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.config.config_exception import ConfigException

import ebpfproxy
from ebpfproxy.kube import control_plane
from ebpfproxy.kube.kubeconfig import ConfigError, check, check_url, errors_of_the_package
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.logs import get_logger

__all__ = ["ApiConnection", "ConfigError"]

log = get_logger(__name__)

_CONNECT_SECONDS = 10.0
#: So many requests in a row that nobody answers are reason to look for another address.
_UNANSWERED = 3
_MOST_BYTES = 1 << 20
_USER_AGENT = f"ebpfproxy/{ebpfproxy.__version__}"
#: A peer that is gone without a word is noticed after about a minute (tcp(7)).
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

NOTHING: Mapping[str, str] = MappingProxyType({})

Configure = Callable[[kube_client.Configuration], Path | None]
"""Fills a configuration; returns the token file that is read for each request, if there is one."""


class _Session(NamedTuple):
    """What one reading of the configuration gave; replaced as a whole."""

    configuration: Any
    pool: Any
    #: Kept beside: the package's refresh of credentials sets the kubeconfig's own server again.
    host: str
    token_file: Path | None


class ApiConnection:
    """Requests to one API server. Any thread may use it.

    Credentials that rotate (exec plugins, token files, service account tokens) are looked at anew for every
    request; :meth:`reload` reads the whole configuration again, after the server has refused them.
    """

    def __init__(
        self, configure: Configure, limit: RateLimit | None = None, *, has_choice: bool = False
    ) -> None:
        """``limit`` holds for :meth:`get`. ``has_choice``: ``configure`` chooses among addresses, and is
        asked again when nobody answers at the one that it chose."""
        self._configure = configure
        self._limit = limit
        self._has_choice = has_choice
        self._unanswered = 0
        self._unverified = ""
        #: One thread at a time reads credentials: an exec plugin may ask somebody who is slow.
        self._credentials_lock = threading.Lock()
        self._requests_lock = threading.Lock()
        #: Answers by HTTP status and method; the status is ``<error>`` where none came.
        self.requests: dict[tuple[str, str], int] = {}
        #: Told of every request its method, and how long its answer took to begin, in seconds.
        self.observe: Callable[[str, float], None] = lambda *_: None
        self._session = self._open()

    @classmethod
    def from_options(
        cls, kubeconfig: Path | None, master: str | None, limit: RateLimit | None = None
    ) -> ApiConnection:
        """``--kubeconfig`` and ``--master``; without them the pod's service account.

        ``master`` alone is an API server that asks for no credentials; with a kubeconfig it replaces the
        server's address in it. Raises ConfigError.
        """
        if kubeconfig is None and master is None:
            return cls(_InCluster(), limit, has_choice=True)
        if master is not None:
            check_url(master, "--master")

        def configure(configuration: kube_client.Configuration) -> Path | None:
            token_file = None
            if kubeconfig is not None:
                token_file = _from_kubeconfig(kubeconfig, configuration)
            if master is not None:
                configuration.host = master.rstrip("/")
            return token_file

        return cls(configure, limit)

    @property
    def host(self) -> str:
        """Where requests go: ``https://10.0.0.1:6443``."""
        return self._session.host

    def _open(self) -> _Session:
        configuration = kube_client.Configuration()
        token_file = self._configure(configuration)
        configuration.socket_options = list(_KEEPALIVE)
        # One connection for each watch and one to list beside it.
        configuration.connection_pool_maxsize = 8
        configuration.retries = False
        self._tell_of_unverified(configuration)
        try:
            pool = kube_client.ApiClient(configuration).rest_client.pool_manager
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ConfigError(f"proxy {configuration.proxy}: {error}") from error
        return _Session(configuration, pool, str(configuration.host), token_file)

    def _tell_of_unverified(self, configuration: Any) -> None:
        """One line for each server, where urllib3 has one for each request."""
        if configuration.verify_ssl or not configuration.host.startswith("https://"):
            return
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if configuration.host != self._unverified:
            self._unverified = configuration.host
            log.warning(
                "the API server's certificate is not verified (insecure-skip-tls-verify)",
                server=configuration.host,
            )

    def reload(self) -> None:
        """Reads files and credentials again. Raises ConfigError, then the old ones stay in use."""
        with self._credentials_lock:
            self._session = self._open()

    def get(self, path: str, params: Mapping[str, str], *, read_seconds: float) -> urllib3.BaseHTTPResponse:
        """Starts a GET, at the rate of the limit, and returns the response unread, whatever its status.

        ``read_seconds`` bounds every wait for bytes. Raises ConfigError where credentials cannot be had,
        urllib3's HTTPError, and OSError.
        """
        if self._limit is not None:
            self._limit.wait()
        return self.request("GET", path, params, read_seconds=read_seconds)

    def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] = NOTHING,
        *,
        body: bytes | None = None,
        read_seconds: float,
    ) -> urllib3.BaseHTTPResponse:
        """As :meth:`get`, but without a limit. ``body``: JSON."""
        self._choose_again()
        session = self._session
        headers = {"Accept": "application/json", "User-Agent": _USER_AGENT}
        if method == "GET":
            # Long lists come compressed, and from 1.37 on (WatchListCompression) streams, too.
            headers["Accept-Encoding"] = "gzip"
        if body is not None:
            headers["Content-Type"] = "application/json"
        authorization = self._authorization(session)
        if authorization:
            headers["Authorization"] = authorization
        query = f"?{urlencode(params)}" if params else ""
        code, began = "<error>", time.monotonic()
        try:
            response: urllib3.BaseHTTPResponse = session.pool.request(
                method,
                f"{session.host}{path}{query}",
                headers=headers,
                body=body,
                preload_content=False,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=read_seconds),
            )
            code = str(response.status)
        finally:
            self.observe(method, time.monotonic() - began)
            with self._requests_lock:
                self._unanswered = self._unanswered + 1 if code == "<error>" else 0
                self.requests[code, method] = self.requests.get((code, method), 0) + 1
        return response

    def _choose_again(self) -> None:
        if not self._has_choice or self._unanswered < _UNANSWERED:
            return
        with self._credentials_lock:
            # Another thread may have done so while this one waited.
            if self._unanswered >= _UNANSWERED:
                self._unanswered = 0
                self._session = self._open()

    def _authorization(self, session: _Session) -> str:
        """The header as it is to be now; empty without one. Raises ConfigError."""
        configuration, token_file = session.configuration, session.token_file
        try:
            if token_file is not None:
                found = f"Bearer {token_file.read_text().strip()}"
            else:
                with self._credentials_lock, errors_of_the_package():
                    # Calls the package's hook, which reads an old token or asks a plugin again. Where that
                    # fails the old token is used, and the server's answer says what it is worth.
                    found = configuration.get_api_key_with_prefix("BearerToken", "authorization") or ""
                if not found and configuration.username:
                    found = configuration.get_basic_auth_token()
        except (ConfigException, OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"credentials: {error}") from error
        found = found.strip()
        if not (found.isascii() and found.isprintable()):
            raise ConfigError(f"credentials: {token_file or 'the token'}: not one line of ASCII text")
        return found


class _InCluster:
    """The service account's credentials, for the best address of the control plane."""

    def __init__(self) -> None:
        self._chosen: control_plane.Choice | None = None
        self._last_answering: control_plane.Choice | None = None

    def __call__(self, configuration: kube_client.Configuration) -> None:
        try:
            kube_config.load_incluster_config(client_configuration=configuration)
        except (ConfigException, OSError, ValueError) as error:
            raise ConfigError(
                f"no --kubeconfig, --master or --manifests, and not in a pod with a service account: {error}"
            ) from error
        _check_certificates(configuration, "service account")
        choice = control_plane.choose(
            configuration.host, _anonymously(configuration), last=self._last_answering
        )
        if choice.answers:
            self._last_answering = choice
        if choice != self._chosen:
            self._chosen = choice
            say, text = (
                (log.info, "control plane") if choice.answers else (log.warning, "no control plane answers")
            )
            say(text, server=choice.server, named_by=choice.source)
        configuration.host = choice.server


def _anonymously(configuration: kube_client.Configuration) -> control_plane.Ask:
    """Asks without the token, and does not take longer than a choice may."""
    pool = kube_client.ApiClient(configuration).rest_client.pool_manager

    def ask(url: str) -> bytes:
        response = pool.request(
            "GET",
            url,
            headers={"Accept": "application/json", "User-Agent": _USER_AGENT},
            preload_content=False,
            retries=False,
            redirect=False,
            timeout=urllib3.Timeout(control_plane.SECONDS),
        )
        try:
            return bytes(response.read(_MOST_BYTES)) if response.status == 200 else b""
        finally:
            response.close()

    return ask


def _from_kubeconfig(path: Path, configuration: kube_client.Configuration) -> Path | None:
    checked = check(path)
    with errors_of_the_package() as said:
        try:
            kube_config.load_kube_config(str(path), client_configuration=configuration, persist_config=False)
        except ConfigException as error:
            raise ConfigError(f"{path}: {error}") from error
        except OSError as error:
            raise ConfigError(f"{path}: {error.filename or ''}: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(f"{path}: the kubernetes package cannot read it: {error!r}") from error
    if checked.has_plugin and not configuration.api_key and not configuration.cert_file:
        raise ConfigError(f"{path}: user.exec: no credentials: {'; '.join(said) or 'the plugin gave none'}")
    _check_certificates(configuration, str(path))
    return checked.token_file


def _check_certificates(configuration: Any, source: str) -> None:
    """OpenSSL names neither file nor field, and only when a connection is made."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if configuration.ssl_ca_cert:
        try:
            context.load_verify_locations(cafile=configuration.ssl_ca_cert)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{source}: certificate-authority ({configuration.ssl_ca_cert}): {error}"
            ) from error
    if configuration.cert_file:
        try:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{source}: client-certificate ({configuration.cert_file}) with client-key"
                f" ({configuration.key_file}): {error}"
            ) from error
