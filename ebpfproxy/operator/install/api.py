"""Single objects of one API server, as JSON: get, list, server-side apply, delete.

The ``kubernetes`` package reads the kubeconfig and makes the connections. Requests are made here: its typed
calls drop fields of servers that are newer than itself, and each error is to be one line with the object and
the server's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec
import urllib3
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.config.config_exception import ConfigException

import ebpfproxy
from ebpfproxy.kube import kubeconfig as kubeconfig_file
from ebpfproxy.kube.kubeconfig import ConfigError, check_url, errors_of_the_package

FIELD_MANAGER = "ebpfproxy"
#: JSON is YAML.
APPLY_PATCH = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
_TIMEOUT = urllib3.Timeout(connect=10.0, read=30.0)
_NOT_FOUND = 404
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')

Object = dict[str, Any]

#: Where objects of a kind are: the group's path, the resource, and whether a namespace has them.
RESOURCES: Mapping[str, tuple[str, str, bool]] = {
    "ServiceAccount": ("/api/v1", "serviceaccounts", True),
    "ConfigMap": ("/api/v1", "configmaps", True),
    "Pod": ("/api/v1", "pods", True),
    "Event": ("/api/v1", "events", True),
    "Node": ("/api/v1", "nodes", False),
    "ClusterRole": ("/apis/rbac.authorization.k8s.io/v1", "clusterroles", False),
    "ClusterRoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "clusterrolebindings", False),
    "DaemonSet": ("/apis/apps/v1", "daemonsets", True),
}


class ApiError(Exception):
    """The API server said no, or did not answer: one line. ``status`` is HTTP's, 0 where no answer came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passes(self) -> bool:
        """Whether asking again may help."""
        return self.status in (0, 429) or self.status >= 500


class Applied(NamedTuple):
    """``created``: it was not there. ``warnings``: what the server says besides (admission's, RFC 9111)."""

    item: Object
    created: bool
    warnings: tuple[str, ...]


class _Cause(msgspec.Struct):
    field: str = ""
    message: str = ""


class _Details(msgspec.Struct):
    causes: tuple[_Cause, ...] = ()


class _Status(msgspec.Struct):
    message: str = ""
    details: _Details | None = None


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """``/apis/apps/v1/namespaces/kube-system/daemonsets/ebpfproxy``; without a name, of all in there."""
    group, resource, namespaced = RESOURCES[kind]
    place = f"/namespaces/{quote(namespace)}" if namespaced else ""
    return f"{group}{place}/{resource}" + (f"/{quote(name)}" if name else "")


def shown(kind: str, namespace: str, name: str) -> str:
    """An object in messages: ``DaemonSet kube-system/ebpfproxy``."""
    return f"{kind} {namespace}/{name}" if RESOURCES[kind][2] else f"{kind} {name}"


class Api:
    """Requests to one API server, by one user.

    ``host`` is asked. ``server`` is the kubeconfig's, whatever ``--master`` says; empty in a pod, which is
    told of a Service.
    """

    def __init__(self, configuration: kube_client.Configuration, server: str = "") -> None:
        configuration.retries = False
        if not configuration.verify_ssl:
            # The kubeconfig says so: once is enough.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        self._configuration = configuration
        self.host = str(configuration.host)
        self.server = server
        try:
            self._pool = kube_client.ApiClient(configuration).rest_client.pool_manager
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as error:
            raise ConfigError(f"{self.host}: {error}") from error

    @classmethod
    def from_options(cls, kubeconfig: str, context: str | None, master: str | None) -> Api:
        """``kubeconfig``: paths as ``KUBECONFIG`` has them. Where none of them is there, and in a pod, the
        service account. Raises ConfigError.
        """
        configuration = kube_client.Configuration()
        server = str(configuration.host) if _configure(configuration, kubeconfig, context) else ""
        if master is not None:
            check_url(master, "--master")
            configuration.host = master.rstrip("/")
        return cls(configuration, server)

    # -- objects

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """None where there is none. Raises ApiError."""
        try:
            return self._ask("GET", path_of(kind, namespace, name), shown(kind, namespace, name))[0]
        except ApiError as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    def list(self, kind: str, namespace: str, **selectors: str) -> list[Object]:
        """``labelSelector=…``, ``fieldSelector=…``. Raises ApiError."""
        what = f"{RESOURCES[kind][1]} of {namespace}" if RESOURCES[kind][2] else RESOURCES[kind][1]
        found = self._ask("GET", path_of(kind, namespace), what, selectors)[0]
        return list(found.get("items") or ())

    def version(self) -> Object:
        """Of the server: ``gitVersion``, ``major``, ``minor``. Raises ApiError."""
        return self._ask("GET", "/version", "/version")[0]

    def apply(self, item: Object, *, force: bool = False, dry_run: bool = False) -> Applied:
        """Server-side apply as ``ebpfproxy``; ``force`` takes over fields that others manage.

        Raises ApiError: 409 where another manager's field would change.
        """
        kind, meta = item["kind"], item["metadata"]
        namespace, name = meta.get("namespace", ""), meta["name"]
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower(), "fieldValidation": "Strict"}
        if dry_run:
            query["dryRun"] = "All"
        made, response = self._ask(
            "PATCH", path_of(kind, namespace, name), shown(kind, namespace, name), query, body=item
        )
        said = " ".join(response.headers.getlist("Warning"))
        warnings = tuple(re.sub(r"\\(.)", r"\1", text) for text in _WARNING.findall(said))
        return Applied(made, response.status == 201, warnings)

    def remove_label(self, kind: str, name: str, label: str) -> None:
        """Of an object that has no namespace. Raises ApiError."""
        body: Object = {"metadata": {"labels": {label: None}}}
        what = shown(kind, "", name)
        self._ask("PATCH", path_of(kind, "", name), what, body=body, content_type=MERGE_PATCH)

    def delete(self, kind: str, namespace: str, name: str) -> bool:
        """False where there is none. What it owns is deleted after it. Raises ApiError."""
        path, what = path_of(kind, namespace, name), shown(kind, namespace, name)
        try:
            self._ask("DELETE", path, what, {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == _NOT_FOUND:
                return False
            raise
        return True

    # -- requests

    def _ask(
        self,
        method: str,
        path: str,
        what: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Object | None = None,
        content_type: str = APPLY_PATCH,
    ) -> tuple[Object, urllib3.BaseHTTPResponse]:
        headers = {"Accept": "application/json", "User-Agent": f"ebpfproxy/{ebpfproxy.__version__}"}
        if authorization := self._authorization():
            headers["Authorization"] = authorization
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            response: urllib3.BaseHTTPResponse = self._pool.request(
                method,
                f"{self.host}{path}" + (f"?{urlencode(query)}" if query else ""),
                headers=headers,
                body=msgspec.json.encode(body) if body is not None else None,
                retries=False,
                redirect=False,
                timeout=_TIMEOUT,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiError(f"{self.host}: {_reason(error)}") from error
        if response.status >= 300:
            raise ApiError(f"{what}: {_words(response)}", response.status)
        try:
            return msgspec.json.decode(response.data, type=Object), response
        except msgspec.DecodeError as error:
            raise ApiError(f"{self.host}{path}: not an API server's answer: {error}") from error

    def _authorization(self) -> str:
        with errors_of_the_package():
            found = self._configuration.get_api_key_with_prefix("BearerToken", "authorization")
        return str(found or "").strip()


def _configure(configuration: kube_client.Configuration, paths: str, context: str | None) -> bool:
    """Whether it was a kubeconfig, and not a service account. Raises ConfigError."""
    found = [path for each in paths.split(":") if each and (path := Path(each).expanduser()).exists()]
    if not found:
        try:
            kube_config.load_incluster_config(client_configuration=configuration)
        except (ConfigException, OSError, ValueError) as error:
            raise ConfigError(
                f"{paths}: no such kubeconfig, and this is no pod: name a --kubeconfig"
            ) from error
        return False
    if len(found) == 1 and context is None:
        kubeconfig_file.check(found[0])
    shown_paths = ":".join(map(str, found))
    with errors_of_the_package() as said:
        try:
            kube_config.load_kube_config(
                shown_paths, context=context, client_configuration=configuration, persist_config=False
            )
        except (ConfigException, OSError) as error:
            raise ConfigError(f"{shown_paths}: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(f"{shown_paths}: the kubernetes package cannot read it: {error!r}") from error
    if said:
        raise ConfigError(f"{shown_paths}: no credentials: {'; '.join(said)}")
    return True


def _words(response: urllib3.BaseHTTPResponse) -> str:
    """What the server says: code, reason phrase and message in one line."""
    status = _Status()
    with suppress(msgspec.DecodeError, msgspec.ValidationError):
        status = msgspec.json.decode(response.data, type=_Status)
    head = f"{response.status} {response.reason or ''}".strip()
    # A list of conflicts has a line for each field.
    message = status.message.replace(":\n- ", ": ").replace("\n- ", ", ").replace("\n", "; ")
    return f"{head}: {message}" if message else head


def _reason(error: BaseException) -> str:
    """urllib3's words without its own objects in them."""
    cause = getattr(error, "reason", None) or error
    return re.sub(r"^<?\S+Connection\S*?(\(.*?\))?( object at 0x[0-9a-f]+>)?: ", "", str(cause))
