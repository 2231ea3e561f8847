"""The connection to the API server: configured by the ``kubernetes`` package, requests as raw streams."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
import yaml
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.config.config_exception import ConfigException

import ebpfproxy

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


class ConfigError(Exception):
    """The connection's configuration cannot be used; the message names the file and the field."""


Configure = Callable[[kube_client.Configuration], None]


class ApiConnection:
    """Requests to one API server. Any thread may use it.

    Credentials that rotate (exec plugins, token files, service account tokens) are read anew for every
    request; :meth:`reload` reads the whole configuration again, after a 401.
    """

    def __init__(self, configure: Configure, token_file: Path | None = None) -> None:
        self._configure = configure
        self._token_file = token_file
        self._lock = threading.Lock()
        #: Answers by HTTP status; ``<error>`` where none came.
        self.requests: dict[str, int] = {}
        self._open()

    @classmethod
    def from_options(cls, kubeconfig: Path | None, master: str | None) -> ApiConnection:
        """``--kubeconfig`` and ``--master``; without them the pod's service account.

        ``master`` alone is an API server that asks for no credentials; with a kubeconfig it replaces the
        server's address in it. Raises ConfigError.
        """
        if kubeconfig is None and master is None:
            return cls(_in_cluster)

        def configure(configuration: kube_client.Configuration) -> None:
            if kubeconfig is not None:
                _from_kubeconfig(kubeconfig, configuration)
            if master is not None:
                configuration.host = master.rstrip("/")

        return cls(configure, _token_file(kubeconfig) if kubeconfig is not None else None)

    def _open(self) -> None:
        configuration = kube_client.Configuration()
        self._configure(configuration)
        configuration.socket_options = list(_KEEPALIVE)
        # One connection for each watch and one to list beside it.
        configuration.connection_pool_maxsize = 8
        configuration.retries = False
        api = kube_client.ApiClient(configuration)
        api.user_agent = f"ebpfproxy/{ebpfproxy.__version__}"
        self._configuration = configuration
        self._api = api
        # The package's refresh of credentials sets the kubeconfig's own server again.
        self.host = str(configuration.host)

    def reload(self) -> None:
        """Reads files and credentials again. Raises ConfigError, then the old ones stay in use."""
        with self._lock:
            self._open()

    def get(self, path: str, params: Mapping[str, str], *, read_seconds: float) -> urllib3.BaseHTTPResponse:
        """Starts a GET and returns the response unread, whatever its status.

        ``read_seconds`` bounds every wait for bytes. Raises urllib3's HTTPError and OSError.
        """
        with self._lock:
            configuration, api, host = self._configuration, self._api, self.host
        headers = {"Accept": "application/json", "User-Agent": api.user_agent}
        if self._token_file is not None:
            headers["authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        else:
            authorization = configuration.get_api_key_with_prefix("BearerToken", "authorization")
            if authorization:
                headers["authorization"] = authorization
            elif configuration.username:
                headers["authorization"] = configuration.get_basic_auth_token()
        pool: Any = api.rest_client.pool_manager
        query = f"?{urlencode(params)}" if params else ""
        code = "<error>"
        try:
            response: urllib3.BaseHTTPResponse = pool.request(
                "GET",
                f"{host}{path}{query}",
                headers=headers,
                preload_content=False,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=_CONNECT_SECONDS, read=read_seconds),
            )
            code = str(response.status)
        finally:
            with self._lock:
                self.requests[code] = self.requests.get(code, 0) + 1
        return response


def _in_cluster(configuration: kube_client.Configuration) -> None:
    try:
        kube_config.load_incluster_config(client_configuration=configuration)
    except ConfigException as error:
        raise ConfigError(
            f"no --kubeconfig, --master or --manifests, and not in a pod with a service account: {error}"
        ) from error


def _from_kubeconfig(path: Path, configuration: kube_client.Configuration) -> None:
    try:
        kube_config.load_kube_config(str(path), client_configuration=configuration, persist_config=False)
    except ConfigException as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.filename or ''}: {error.strerror}") from error


def _token_file(kubeconfig: Path) -> Path | None:
    """The current user's ``tokenFile``: the kubernetes package reads it once, but it rotates."""
    try:
        content = yaml.safe_load(kubeconfig.read_text()) or {}
        context = {c["name"]: c["context"] for c in content["contexts"]}[content["current-context"]]
        user = {u["name"]: u["user"] for u in content["users"]}[context["user"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None  # load_kube_config says it better
    named = user.get("tokenFile") if isinstance(user, dict) else None
    return kubeconfig.parent / named if named else None
