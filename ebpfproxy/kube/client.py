"""The connection to the API server: configured by the ``kubernetes`` package, requests as raw streams."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import urllib3
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.config.config_exception import ConfigException

import ebpfproxy
from ebpfproxy.kube.control_plane import control_plane
from ebpfproxy.kube.kubeconfig import ConfigError, check, check_url, errors_of_the_package
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.logs import get_logger

__all__ = ["ApiConnection", "ConfigError"]

log = get_logger(__name__)

_CONNECT_SECONDS = 10.0
#: A peer that is gone without a word is noticed after about a minute (tcp(7)).
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)

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

    def __init__(self, configure: Configure, limit: RateLimit | None = None) -> None:
        self._configure = configure
        self._limit = limit
        #: One thread at a time reads credentials: an exec plugin may ask somebody who is slow.
        self._credentials_lock = threading.Lock()
        self._requests_lock = threading.Lock()
        #: Answers by HTTP status; ``<error>`` where none came.
        self.requests: dict[str, int] = {}
        #: Told of every request how long its answer took to begin, in seconds.
        self.observe: Callable[[float], None] = lambda _: None
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
            return cls(_in_cluster, limit)
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
        try:
            pool = kube_client.ApiClient(configuration).rest_client.pool_manager
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ConfigError(f"proxy {configuration.proxy}: {error}") from error
        return _Session(configuration, pool, str(configuration.host), token_file)

    def reload(self) -> None:
        """Reads files and credentials again. Raises ConfigError, then the old ones stay in use."""
        with self._credentials_lock:
            self._session = self._open()

    def get(self, path: str, params: Mapping[str, str], *, read_seconds: float) -> urllib3.BaseHTTPResponse:
        """Starts a GET and returns the response unread, whatever its status.

        ``read_seconds`` bounds every wait for bytes. Raises ConfigError where credentials cannot be had,
        urllib3's HTTPError, and OSError.
        """
        if self._limit is not None:
            self._limit.wait()
        session = self._session
        headers = {"Accept": "application/json", "User-Agent": f"ebpfproxy/{ebpfproxy.__version__}"}
        authorization = self._authorization(session)
        if authorization:
            headers["Authorization"] = authorization
        query = f"?{urlencode(params)}" if params else ""
        code, began = "<error>", time.monotonic()
        try:
            response: urllib3.BaseHTTPResponse = session.pool.request(
                "GET",
                f"{session.host}{path}{query}",
                headers=headers,
                preload_content=False,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=read_seconds),
            )
            code = str(response.status)
        finally:
            self.observe(time.monotonic() - began)
            with self._requests_lock:
                self.requests[code] = self.requests.get(code, 0) + 1
        return response

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


def _in_cluster(configuration: kube_client.Configuration) -> None:
    try:
        kube_config.load_incluster_config(client_configuration=configuration)
    except (ConfigException, OSError, ValueError) as error:
        raise ConfigError(
            f"no --kubeconfig, --master or --manifests, and not in a pod with a service account: {error}"
        ) from error
    better = control_plane()
    if better is not None:
        configuration.host, source = better
        log.info("the control plane's own address is used", server=configuration.host, file=source)
    _check_certificates(configuration, "service account")


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
