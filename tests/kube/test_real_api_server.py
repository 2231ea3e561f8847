"""The reflector against a real kube-apiserver, where KUBEBUILDER_ASSETS names one (and etcd)."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.reflector import Reflector
from ebpfproxy.objects import Changed, Deleted, Event, ObjectKey, Replaced, Resource

ASSETS = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent"))
TOKEN = "test-token"

pytestmark = [
    pytest.mark.apiserver,
    pytest.mark.skipif(
        not (ASSETS / "kube-apiserver").exists(),
        reason="KUBEBUILDER_ASSETS names no folder with kube-apiserver and etcd",
    ),
]


class RealServer:
    """etcd and kube-apiserver on loopback, with one token that may do everything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        key = folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f"{TOKEN},admin,1,system:masters\n")
        self._start(
            "etcd",
            "--data-dir",
            str(folder / "etcd"),
            "--listen-client-urls=http://127.0.0.1:23790",
            "--advertise-client-urls=http://127.0.0.1:23790",
            "--listen-peer-urls=http://127.0.0.1:23800",
        )
        self._start(
            "kube-apiserver",
            "--etcd-servers=http://127.0.0.1:23790",
            "--secure-port=26443",
            "--bind-address=127.0.0.1",
            f"--cert-dir={folder / 'certs'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=AlwaysAllow",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://test",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        )
        self.kubeconfig = folder / "config"
        cluster = {"server": "https://127.0.0.1:26443", "insecure-skip-tls-verify": True}
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "clusters": [{"name": "c", "cluster": cluster}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )
        deadline = time.monotonic() + 60
        while not self._ready():
            assert time.monotonic() < deadline, "kube-apiserver does not become ready"
            time.sleep(0.5)

    def _start(self, program: str, *arguments: str) -> None:
        log = (self._folder / f"{program}.log").open("wb")
        self._processes.append(
            subprocess.Popen([str(ASSETS / program), *arguments], stdout=log, stderr=log, cwd=self._folder)
        )

    def _ready(self) -> bool:
        try:
            return self.request("GET", "/readyz") is not None
        except OSError:
            return False

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            f"https://127.0.0.1:26443{path}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=5) as answer:
            content: bytes = answer.read()
            return content

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    made = RealServer(tmp_path_factory.mktemp("apiserver"))
    yield made
    made.stop()


def _service(name: str, port: int) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"ports": [{"name": "http", "port": port}]}}


def test_list_and_watch(server: RealServer) -> None:
    events: list[Event] = []
    connection = ApiConnection.from_options(server.kubeconfig, None)
    reflector = Reflector(connection, Resource.SERVICES, events.append)
    reflector.start()

    def until(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(events) < count:
            assert time.monotonic() < deadline, (events, reflector.status)
            time.sleep(0.05)

    until(1)
    assert isinstance(events[0], Replaced)
    assert ObjectKey("default", "kubernetes") in events[0].objects
    path = "/api/v1/namespaces/default/services"
    server.request("POST", path, _service("a", 80))
    until(2)
    assert isinstance(events[1], Changed)
    assert events[1].object.spec.cluster_ip.startswith("10.96.")  # type: ignore[attr-defined]
    server.request("DELETE", f"{path}/a")
    until(3)
    assert events[2] == Deleted(Resource.SERVICES, ObjectKey("default", "a"), events[2].received)  # type: ignore[union-attr]
    assert reflector.status.failures == {}
    reflector.stop()
