"""Single objects of one API server, as JSON: get, list, create, server-side apply, patch, delete.

And logs of containers, and commands in them.

Objects are plain JSON, since typed ones lose the fields of servers that are newer than their types. Each
error is one line with the object and the server's words.
"""

from __future__ import annotations

import copy
import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import msgspec

from ebpfproxy.kube.client import JSON, ApiConnection, Reply
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.kube.failures import Failure
from ebpfproxy.logs import get_logger
from ebpfproxy.operator.waiting import Wait

if TYPE_CHECKING:
    from ebpfproxy.kube.exec import Exec

log = get_logger(__name__)

FIELD_MANAGER = "ebpfproxy"
#: JSON is YAML.
_APPLY_PATCH = "application/apply-patch+yaml"
_MERGE_PATCH = "application/merge-patch+json"
_JSON_PATCH = "application/json-patch+json"
_READ_SECONDS = 30.0
#: A server that answers nothing for so long is given up, unless a command has a ``--timeout``.
_SILENCE_SECONDS = 60.0
#: A request may take so much longer than the wait that it is sent in: a server may be slow, and the wait
#: shorter than an answer. A server that answers nothing already is not waited for again.
_LATE_SECONDS = 5.0
#: A request gets so much even where the server was silent for too long: what ends a command asks once more.
_LEAST_SECONDS = 1.0
_TRIES = 4
_NOT_FOUND, _CREATED = 404, 201
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')

Object = dict[str, Any]
#: RFC 6902.
Patch = list[dict[str, Any]]

#: The place of each kind's objects: the group's path, the resource, and whether a namespace has them.
RESOURCES: Mapping[str, tuple[str, str, bool]] = {
    "ServiceAccount": ("/api/v1", "serviceaccounts", True),
    "ConfigMap": ("/api/v1", "configmaps", True),
    "Pod": ("/api/v1", "pods", True),
    "Event": ("/api/v1", "events", True),
    "Node": ("/api/v1", "nodes", False),
    "Namespace": ("/api/v1", "namespaces", False),
    "Secret": ("/api/v1", "secrets", True),
    "Service": ("/api/v1", "services", True),
    "EndpointSlice": ("/apis/discovery.k8s.io/v1", "endpointslices", True),
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
    def may_pass(self) -> bool:
        """The server may restart, or be overloaded: who waits goes on waiting."""
        return self.status in (0, 429) or self.status >= 500


class Applied(NamedTuple):
    """``created``: it was not there. ``warnings``: what the server warns of (RFC 9111)."""

    item: Object
    created: bool
    warnings: tuple[str, ...]


def path_of(kind: str, namespace: str, name: str = "") -> str:
    """``/apis/apps/v1/namespaces/kube-system/daemonsets/ebpfproxy``; without a name, of all in there.

    An empty namespace is all of them.
    """
    group, resource, namespaced = RESOURCES[kind]
    place = f"/namespaces/{quote(namespace)}" if namespaced and namespace else ""
    return f"{group}{place}/{resource}" + (f"/{quote(name)}" if name else "")


def shown(kind: str, namespace: str, name: str) -> str:
    """An object in messages: ``DaemonSet kube-system/ebpfproxy``."""
    return f"{kind} {namespace}/{name}" if RESOURCES[kind][2] else f"{kind} {name}"


class _Silence:
    """How long a server has answered nothing, to any thread, and how long it may."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        #: When the first request was sent that has failed since the last answer, without one.
        self._since: float | None = None
        self._answered = -math.inf

    def left(self) -> float:
        """How long a request may take that is sent now.

        One that waits for its answer does not shorten others: the server may answer it yet.
        """
        with self._lock:
            return self._seconds if self._since is None else self._since + self._seconds - time.monotonic()

    @property
    def has_begun(self) -> bool:
        """True if the last request has failed without an answer."""
        return self._since is not None

    def answered(self) -> None:
        with self._lock:
            self._since, self._answered = None, time.monotonic()

    def unanswered(self, waited: float) -> str:
        """Notes that a request failed, after so many seconds, and says for how long nothing came."""
        with self._lock:
            now = time.monotonic()
            sent = now - waited
            since = sent if self._since is None else min(sent, self._since)
            # Where another request was answered meanwhile, the server is not silent.
            if sent > self._answered:
                self._since = since
            seconds = now - since
        return f"no answer for {round(seconds, 1 if seconds < 10 else None):g} s"


class Api:
    """Requests to one API server, by one user. Methods raise ApiError. Any thread may use it."""

    def __init__(self, connection: ApiConnection, seconds: float = _SILENCE_SECONDS) -> None:
        """A server that answers nothing for ``seconds`` is given up."""
        self._connection = connection
        self._silence = _Silence(seconds)
        self._wait: Wait | None = None

    @classmethod
    def from_options(
        cls, kubeconfig: Path | None, master: str | None, *, seconds: float = _SILENCE_SECONDS
    ) -> Api:
        """Takes an agent's ``--kubeconfig`` and ``--master``. Raises ConfigError."""
        return cls(ApiConnection.from_options(kubeconfig, master), seconds)

    @classmethod
    def from_kubeconfigs(
        cls,
        paths: str,
        context: str | None = None,
        master: str | None = None,
        *,
        seconds: float = _SILENCE_SECONDS,
    ) -> Api:
        """``paths`` as ``KUBECONFIG`` has them. Without any of these files, the pod's service account.

        Raises ConfigError.
        """
        found = [path for each in paths.split(":") if each and (path := Path(each).expanduser()).exists()]
        if found:
            return cls(ApiConnection.from_options(found, master, context=context), seconds)
        try:
            return cls(ApiConnection.in_pod(master), seconds)
        except ConfigError as error:
            log.debug("no service account", error=str(error))
        raise ConfigError(f"{paths}: no such kubeconfig, and this is no pod: name a --kubeconfig")

    def within(self, wait: Wait | None) -> Api:
        """The same server, for requests that end with ``wait``, or soon after it."""
        made = copy.copy(self)
        made._wait = wait
        return made

    @property
    def host(self) -> str:
        return self._connection.host

    @property
    def kubeconfig_server(self) -> str:
        """What the kubeconfig names, whatever ``--master`` says; empty without a kubeconfig."""
        return self._connection.kubeconfig_server

    # -- objects

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """Returns None where there is none."""
        path = path_of(kind, namespace, name)
        try:
            found = self._json("GET", path, shown(kind, namespace, name))[0]
        except ApiError as error:
            if error.status == _NOT_FOUND:
                return None
            raise
        self._check_objects(path, [found])
        return found

    def list(self, kind: str, namespace: str, **selectors: str) -> list[Object]:
        """``labelSelector=…``, ``fieldSelector=…``; empty ones select all."""
        what = RESOURCES[kind][1] + (f" of {namespace}" if RESOURCES[kind][2] and namespace else "")
        query = {name: value for name, value in selectors.items() if value}
        path = path_of(kind, namespace)
        items = self._json("GET", path, what, query)[0].get("items") or []
        self._check_objects(path, items)
        return list(items)

    def config(self, namespace: str, name: str, key: str) -> str:
        """Returns a text of a ConfigMap; empty where there is none."""
        found = self.get("ConfigMap", namespace, name) or {}
        return str((found.get("data") or {}).get(key, ""))

    def version(self) -> Object:
        """Returns the server's ``gitVersion``, ``major`` and ``minor``."""
        return self._json("GET", "/version", "/version")[0]

    def create(self, item: Object) -> Object:
        """Sent once: 409 where it is there already. Returns it with what the server has added."""
        kind, namespace, name = _place(item)
        return self._json("POST", path_of(kind, namespace), shown(kind, namespace, name), body=item, tries=1)[
            0
        ]

    def apply(self, item: Object, *, force: bool = False, dry_run: bool = False) -> Applied:
        """Server-side apply as ``ebpfproxy``; ``force`` takes over fields that others manage: 409 without."""
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower(), "fieldValidation": "Strict"}
        if dry_run:
            query["dryRun"] = "All"
        path, what = path_of(*_place(item)), shown(*_place(item))
        made, reply = self._json("PATCH", path, what, query, body=item, content_type=_APPLY_PATCH)
        said = " ".join(reply.headers.getlist("Warning"))
        warnings = tuple(re.sub(r"\\(.)", r"\1", text) for text in _WARNING.findall(said))
        return Applied(made, reply.status == _CREATED, warnings)

    def patch(
        self, kind: str, namespace: str, name: str, patch: Patch | Object, *, tries: int = _TRIES
    ) -> None:
        """A JSON patch, or a merge patch (RFC 7386) for an Object. One that tests a version is not to be sent
        again: ``tries=1``."""
        content_type = _JSON_PATCH if isinstance(patch, list) else _MERGE_PATCH
        path, what = path_of(kind, namespace, name), shown(kind, namespace, name)
        self._json("PATCH", path, what, body=patch, content_type=content_type, tries=tries)

    def delete(self, kind: str, namespace: str, name: str) -> bool:
        """Returns False where there is none. What it owns is deleted after it."""
        path, what = path_of(kind, namespace, name), shown(kind, namespace, name)
        try:
            self._json("DELETE", path, what, {"propagationPolicy": "Background"})
        except ApiError as error:
            if error.status == _NOT_FOUND:
                return False
            raise
        return True

    def log(self, namespace: str, pod: str, **query: str) -> str:
        """Returns what the pod's container has written up to now: ``container=…`` where it has several."""
        what, path = f"log of {shown('Pod', namespace, pod)}", f"{path_of('Pod', namespace, pod)}/log"
        return self._ask("GET", path, what, query).body.decode(errors="replace")

    def start(self, namespace: str, pod: str, container: str, command: Sequence[str]) -> Exec:
        """Starts a command in a container."""
        # Most commands of operators start none, and do not wait for the WebSocket client.
        from ebpfproxy.kube.exec import Exec  # noqa: PLC0415

        try:
            return Exec(self._connection, namespace, pod, container, command)
        except Failure as failure:
            what = shown("Pod", namespace, pod) if failure.status else self.host
            raise ApiError(f"{what}: {failure}", failure.status) from failure

    # -- requests

    def _check_objects(self, path: str, found: Any) -> None:
        """Something between may answer in place of an API server: all that this relies on is missing then."""
        if not isinstance(found, list) or not all(map(_is_object, found)):
            raise ApiError(f"{self.host}{path}: not an API server's answer: no objects with metadata")

    def _json(self, method: str, path: str, what: str, *rest: Any, **options: Any) -> tuple[Object, Reply]:
        reply = self._ask(method, path, what, *rest, **options)
        try:
            return msgspec.json.decode(reply.body, type=Object), reply
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(f"{self.host}{path}: not an API server's answer: {error}") from error

    def _ask(
        self,
        method: str,
        path: str,
        what: str,
        query: Mapping[str, str] | None = None,
        *,
        body: Object | Patch | None = None,
        content_type: str = JSON,
        tries: int = _TRIES,
    ) -> Reply:
        left = self._silence.left()
        if self._wait is not None:
            late = 0.0 if self._silence.has_begun else _LATE_SECONDS
            left = min(left, max(0.0, self._wait.left) + late)
        try:
            reply = self._connection.call(
                method,
                path,
                query or {},
                body=msgspec.json.encode(body) if body is not None else None,
                content_type=content_type,
                read_seconds=_READ_SECONDS,
                tries=tries,
                seconds=max(_LEAST_SECONDS, left),
            )
        except Failure as failure:
            text = str(failure)
            if failure.is_silence:
                text = self._silence.unanswered(failure.waited)
            else:
                self._silence.answered()
            raise ApiError(f"{what if failure.status else self.host}: {text}", failure.status) from failure
        self._silence.answered()
        return reply


def _is_object(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("metadata"), dict)


def _place(item: Object) -> tuple[str, str, str]:
    """Kind, namespace and name."""
    meta = item["metadata"]
    return item["kind"], meta.get("namespace", ""), meta["name"]
