"""An API server to install into: the stand-in over HTTPS or a real one, with requests past ebpfproxy."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import ssl
import threading
import urllib.error
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from ebpfproxy.cli import main
from ebpfproxy.operator.api import path_of
from tests.apiserver import ApiServer, objects
from tests.apiserver.certificates import Authority
from tests.kube.files import kubeconfig
from tests.kube.test_real_api_server import TOKEN, RealServer
from tests.operator.install.controller import Controller

IMAGE = "registry.example/ebpfproxy:1.2.3"
SYSTEM = "kube-system"
#: An installation consists of these objects.
INSTALLED = (
    ("ServiceAccount", SYSTEM, "ebpfproxy"),
    ("ClusterRole", "", "ebpfproxy"),
    ("ClusterRoleBinding", "", "ebpfproxy"),
    ("ConfigMap", SYSTEM, "ebpfproxy"),
    ("DaemonSet", SYSTEM, "ebpfproxy"),
)
_NODES = "/api/v1/nodes"
_CONTEXT = ssl._create_unverified_context()

Object = dict[str, Any]


class Site:
    """``kubeconfig`` is an administrator's; ``controller`` runs until the end."""

    url: str
    kubeconfig: Path
    controller: Controller

    def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        content_type: str = "application/merge-patch+json",
    ) -> Object:
        """Raises urllib's HTTPError."""
        headers = {
            "Authorization": f"Bearer {TOKEN}",
            "Content-Type": content_type if method == "PATCH" else "application/json",
            "User-Agent": "somebody/1.0",
        }
        data = json.dumps(body).encode() if body is not None else None
        connection = self._connection()
        is_new = connection.sock is None
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            # The next request opens it again.
            connection.close()
            if not is_new and isinstance(error, ConnectionError):
                return self.request(method, path, body, content_type)
            raise
        if answer.status >= 400:
            raise urllib.error.HTTPError(
                self.url + path, answer.status, answer.reason, answer.msg, io.BytesIO(content)
            )
        found: Object = json.loads(content)
        return found

    def _connection(self) -> http.client.HTTPSConnection:
        """One for each thread: the controller asks all the time, and a handshake is most of a request's work."""
        found: http.client.HTTPSConnection | None = getattr(self._kept, "connection", None)
        if found is None:
            host = self.url.removeprefix("https://")
            found = self._kept.connection = http.client.HTTPSConnection(host, context=_CONTEXT, timeout=10)
        return found

    @cached_property
    def _kept(self) -> threading.local:
        return threading.local()

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return self.request("GET", path_of(kind, namespace, name))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def create(self, item: Object) -> None:
        self.request("POST", path_of(item["kind"], item["metadata"].get("namespace", "")), item)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        with contextlib.suppress(urllib.error.HTTPError):
            self.request("DELETE", f"{path_of(kind, namespace, name)}?gracePeriodSeconds=0")

    def config_map(self, name: str, namespace: str = SYSTEM, **data: str) -> None:
        meta = {"name": name, "namespace": namespace}
        named = {key.replace("_", "."): value for key, value in data.items()}
        self.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": named})

    def add_node(self, name: str, **labels: str) -> None:
        raise NotImplementedError

    def versions(self) -> dict[tuple[str, str, str], str]:
        """Returns resourceVersions of the installed objects."""
        found = {place: self.get(*place) for place in INSTALLED}
        return {place: each["metadata"]["resourceVersion"] for place, each in found.items() if each}

    def cli(self, *arguments: str) -> Result:
        command = [*arguments, "--kubeconfig", str(self.kubeconfig)]
        return CliRunner().invoke(main, command, catch_exceptions=False)

    def install(self, *arguments: str) -> Result:
        return self.cli("install", "--image", IMAGE, "--timeout", "5s", *arguments)

    def uninstall(self, *arguments: str) -> Result:
        return self.cli("uninstall", "--timeout", "5s", *arguments)


class StandIn(Site):
    """``server`` is the stand-in itself."""

    def __init__(self, folder: Path) -> None:
        authority = Authority(folder)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.pair("server"))
        self.server = ApiServer(tokens={TOKEN}, tls=context)
        self.server.__enter__()
        self.url = self.server.url
        self.kubeconfig = kubeconfig(
            folder / "admin.conf",
            self.url,
            {"token": TOKEN},
            **{"certificate-authority": str(authority.path)},
        )
        self.controller = Controller(self.request)

    def add_node(self, name: str, **labels: str) -> None:
        item = objects.node(name)
        item["metadata"]["labels"] |= {key.replace("__", "/"): value for key, value in labels.items()}
        self.server.store.put("nodes", item)
        self.controller.nodes.add(name)

    def stop(self) -> None:
        self.controller.stop()
        self.server.stop()


class Real(Site):
    """One server for several tests: :meth:`stop` removes the objects of a test."""

    def __init__(self, server: RealServer, folder: Path) -> None:
        self.url = server.url
        self.kubeconfig = kubeconfig(
            folder / "admin.conf", self.url, {"token": TOKEN}, **{"insecure-skip-tls-verify": True}
        )
        meta = {"name": "default", "namespace": SYSTEM}
        with contextlib.suppress(urllib.error.HTTPError):
            self.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
        self.controller = Controller(self.request)

    def add_node(self, name: str, **labels: str) -> None:
        named = {key.replace("__", "/"): value for key, value in labels.items()}
        meta = {"name": name, "labels": named}
        self.request("POST", _NODES, {"apiVersion": "v1", "kind": "Node", "metadata": meta})
        self.controller.nodes.add(name)

    def stop(self) -> None:
        self.controller.stop()
        for place in INSTALLED:
            self.delete(*place)
        for name in ("kube-proxy", "ebpfproxy-cleanup"):
            self.delete("DaemonSet", SYSTEM, name)
        for name in ("kube-proxy", "kubeadm-config"):
            self.delete("ConfigMap", SYSTEM, name)
        self.delete("ConfigMap", "kube-public", "cluster-info")
        for pod in self.request("GET", path_of("Pod", SYSTEM))["items"]:
            self.delete("Pod", SYSTEM, pod["metadata"]["name"])
        for name in self.controller.nodes:
            self.request("DELETE", f"{_NODES}/{name}")


def kube_proxy(configuration: str = "") -> Iterator[Object]:
    """Creates its ConfigMap and DaemonSet as kubeadm does."""
    labels = {"k8s-app": "kube-proxy"}
    meta = {"name": "kube-proxy", "namespace": SYSTEM, "labels": labels}
    yield {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "data": {"config.conf": configuration, "kubeconfig.conf": "apiVersion: v1\nkind: Config\n"},
    }
    command = [
        "/usr/local/bin/kube-proxy",
        "--config=/var/lib/kube-proxy/config.conf",
        "--hostname-override=$(NODE_NAME)",
    ]
    container = {
        "name": "kube-proxy",
        "image": "registry.k8s.io/kube-proxy:v1.36.2",
        "command": command,
        "volumeMounts": [{"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"}],
    }
    pod = {
        "containers": [container],
        "volumes": [{"name": "kube-proxy", "configMap": {"name": "kube-proxy"}}],
    }
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    yield {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta, "spec": spec}
