"""The API server, as a migration asks it: objects as JSON, errors in the server's words.

Who calls needs more than the agent may: get, list and patch of nodes; get and patch of DaemonSets; get, list,
create and delete of pods; get of pods' logs and ConfigMaps; list of events.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client as kube_client
from kubernetes import config as kube_config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException

Object = dict[str, Any]
#: RFC 6902.
Patch = list[dict[str, Any]]

_SECONDS = 10.0
_NOT_FOUND = 404
#: Overloaded, or behind a balancer without anybody: worth another try.
_TRANSIENT = frozenset({429, 502, 503, 504})
_TRIES, _PAUSE_SECONDS = 4, 1.0


class ClusterError(Exception):
    """The API server cannot be asked, or said no; the message has its words.

    ``status``: HTTP's, 0 where there was no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NotFoundError(ClusterError):
    """There is no such object."""


class Api:
    """Methods raise ClusterError. Any thread may use it."""

    def __init__(self, kubeconfig: Path | None, master: str | None) -> None:
        configuration = kube_client.Configuration()
        configuration.retries = False
        try:
            if kubeconfig is not None:
                kube_config.load_kube_config(
                    str(kubeconfig), client_configuration=configuration, persist_config=False
                )
            elif master is None:
                kube_config.load_incluster_config(client_configuration=configuration)
        except (ConfigException, OSError, ValueError) as error:
            raise ClusterError(f"{kubeconfig or 'service account'}: {error}") from error
        if master is not None:
            configuration.host = master.rstrip("/")
        self.host = str(configuration.host)
        api = kube_client.ApiClient(configuration)
        self._core, self._apps = kube_client.CoreV1Api(api), kube_client.AppsV1Api(api)

    # -- DaemonSets and nodes

    def daemon_set(self, namespace: str, name: str) -> Object:
        return self._json(self._apps.read_namespaced_daemon_set, name, namespace)

    def patch_daemon_set(self, namespace: str, name: str, patch: Patch) -> None:
        # Not again by itself: it tests the version that it was made for.
        self._json(self._apps.patch_namespaced_daemon_set, name, namespace, patch, again=False)

    def node(self, name: str) -> Object:
        return self._json(self._core.read_node, name)

    def nodes(self, selector: str = "") -> list[Object]:
        return self._items(self._core.list_node, label_selector=selector)

    def patch_node(self, name: str, patch: Patch) -> None:
        self._json(self._core.patch_node, name, patch)

    # -- pods

    def pods(self, namespace: str, node: str = "") -> list[Object]:
        """All, or those of one node."""
        fields = {"field_selector": f"spec.nodeName={node}"} if node else {}
        return self._items(self._core.list_namespaced_pod, namespace, **fields)

    def pod(self, namespace: str, name: str) -> Object:
        return self._json(self._core.read_namespaced_pod, name, namespace)

    def create_pod(self, namespace: str, manifest: Object) -> None:
        self._json(self._core.create_namespaced_pod, namespace, manifest, again=False)

    def delete_pod(self, namespace: str, name: str) -> None:
        """Also where it is gone already."""
        try:
            self._json(self._core.delete_namespaced_pod, name, namespace)
        except NotFoundError:
            return

    def log(self, namespace: str, name: str) -> str:
        """What the pod's one container has written up to now."""
        return self._ask(self._core.read_namespaced_pod_log, name, namespace).decode(errors="replace")

    def events(self, namespace: str, pod: str) -> list[Object]:
        """What was said of the pod."""
        fields = f"involvedObject.kind=Pod,involvedObject.name={pod}"
        return self._items(self._core.list_namespaced_event, namespace, field_selector=fields)

    def config_map(self, namespace: str, name: str) -> dict[str, str]:
        """Its data; empty where there is none."""
        try:
            found = self._json(self._core.read_namespaced_config_map, name, namespace)
        except NotFoundError:
            return {}
        return dict(found.get("data") or {})

    # -- requests

    def _items(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Object]:
        return list(self._json(function, *arguments, **options)["items"])

    def _json(
        self, function: Callable[..., Any], *arguments: Any, again: bool = True, **options: Any
    ) -> Object:
        found: Object = json.loads(self._ask(function, *arguments, again=again, **options))
        return found

    def _ask(
        self, function: Callable[..., Any], *arguments: Any, again: bool = True, **options: Any
    ) -> bytes:
        for left in reversed(range(_TRIES if again else 1)):
            try:
                answer = function(*arguments, **options, _preload_content=False, _request_timeout=_SECONDS)
                return bytes(answer.data)
            except ApiException as error:
                if not left or error.status not in _TRANSIENT:
                    raise self._refused(error) from error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                # Nobody is there, or the name is wrong: that is for the operator to see at once.
                if not left or isinstance(error, urllib3.exceptions.NewConnectionError):
                    raise ClusterError(f"{self.host}: {error}") from error
            time.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def _refused(self, error: ApiException) -> ClusterError:
        body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else error.body or ""
        try:
            words = str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            words = " ".join(str(error.reason or body).split())
        kind = NotFoundError if error.status == _NOT_FOUND else ClusterError
        return kind(f"{self.host}: {error.status}: {words}", int(error.status or 0))
