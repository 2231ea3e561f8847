"""The agent's requests to the stand-in, and to a real API server where KUBEBUILDER_ASSETS is set.

The tests show that the stand-in behaves as kube-apiserver does.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.events.event import KubeEvent, Level, Reference, Series, to_api
from ebpfproxy.kube.events.recorder import Pace, Recorder
from ebpfproxy.kube.objects import Changed, Deleted, Event, ObjectKey, Replaced, Resource
from ebpfproxy.kube.source_status import State
from ebpfproxy.kube.watch.reflector import Reflector, Timing
from tests.apiserver import ApiServer, objects
from tests.kube.files import kubeconfig

ASSETS = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent"))
TOKEN = "test-token"
SERVICES_OF_DEFAULT = "/api/v1/namespaces/default/services"
LABEL = "service.kubernetes.io/service-proxy-name"

pytestmark = pytest.mark.apiserver


def _service(name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"ports": [{"name": "http", "port": 80}]},
    }


def _own_loopback_address() -> str:
    """Returns an address of 127.0.0.0/8 that is unique to this process: parallel runs use the same ports."""
    return f"127.{1 + (os.getpid() >> 16)}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"


class RealServer:
    """etcd and kube-apiserver on loopback, with one token that has all rights."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        address = _own_loopback_address()
        etcd, self.url = f"http://{address}:23790", f"https://{address}:26443"
        key = folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (folder / "tokens.csv").write_text(f"{TOKEN},admin,1,system:masters\n")
        self._start(
            "etcd",
            "--data-dir",
            str(folder / "etcd"),
            f"--listen-client-urls={etcd}",
            f"--advertise-client-urls={etcd}",
            f"--listen-peer-urls=http://{address}:23800",
        )
        self._start(
            "kube-apiserver",
            f"--etcd-servers={etcd}",
            "--secure-port=26443",
            f"--bind-address={address}",
            f"--cert-dir={folder / 'certs'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--authorization-mode=AlwaysAllow",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://test",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
        )
        self._cluster = {"insecure-skip-tls-verify": True}
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
        """Returns True if it responds and has created its own Service and the first namespaces.

        Both come from controllers that ``/readyz`` does not wait for.
        """
        made = (f"{SERVICES_OF_DEFAULT}/kubernetes", "/api/v1/namespaces/kube-system")
        try:
            return all(self.request("GET", path) for path in ("/readyz", *made))
        except OSError:
            return False

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={
                "Authorization": f"Bearer {TOKEN}",
                "Content-Type": "application/json" if method != "PATCH" else "application/merge-patch+json",
            },
        )
        with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=5) as answer:
            content: bytes = answer.read()
            return content

    def connection(self, token: str = TOKEN) -> ApiConnection:
        path = self._folder / f"config-{token}"
        return ApiConnection.from_options(kubeconfig(path, self.url, {"token": token}, **self._cluster), None)

    def create(self, name: str, **labels: str) -> None:
        self.request("POST", SERVICES_OF_DEFAULT, _service(name, labels))

    def relabel(self, name: str, **labels: str) -> None:
        patch = {"metadata": {"labels": labels}}
        self.request("PATCH", f"{SERVICES_OF_DEFAULT}/{name}", patch)

    def delete(self, name: str) -> None:
        self.request("DELETE", f"{SERVICES_OF_DEFAULT}/{name}")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)


class StandIn:
    """The same operations with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = ApiServer(tokens={TOKEN})
        self._server.__enter__()
        self.create("kubernetes")

    def connection(self, token: str = TOKEN) -> ApiConnection:
        path = self._folder / f"config-{token}"
        return ApiConnection.from_options(kubeconfig(path, self._server.url, {"token": token}), None)

    def create(self, name: str, **labels: str) -> None:
        item = objects.service(name, "10.96.0.7", namespace="default")
        item["metadata"]["labels"] = labels
        self._server.store.put("services", item)

    relabel = create

    def delete(self, name: str) -> None:
        self._server.store.delete("services", "default", name)

    def stop(self) -> None:
        self._server.stop()


Api = RealServer | StandIn


@pytest.fixture(scope="module", params=["stand-in", "kube-apiserver"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if request.param == "kube-apiserver" and not (ASSETS / "kube-apiserver").exists():
        pytest.skip("KUBEBUILDER_ASSETS names no folder with kube-apiserver and etcd")
    kind = StandIn if request.param == "stand-in" else RealServer
    made: Api = kind(tmp_path_factory.mktemp("apiserver"))
    yield made
    made.stop()


class Watch:
    """A reflector of Services and its events."""

    def __init__(self, connection: ApiConnection, *, pages: bool = False, selector: str = "") -> None:
        self.events: list[Event] = []
        self.reflector = Reflector(
            connection,
            Resource.SERVICES,
            self.events.append,
            label_selector=selector,
            timing=Timing(backoff_first=0.05, backoff_most=0.5),
        )
        self.reflector._has_streaming_list = not pages
        self.reflector.start()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, (self.events, self.reflector.status)
            time.sleep(0.02)

    def next(self, count: int) -> Event:
        self.until(lambda: len(self.events) >= count)
        return self.events[count - 1]

    def break_off(self) -> None:
        stream = self.reflector._stream
        assert stream is not None
        stream.abort()


@pytest.fixture
def watching() -> Iterator[list[Watch]]:
    """The watch is stopped at the end."""
    made: list[Watch] = []
    yield made
    for each in made:
        each.reflector.stop()


@pytest.mark.parametrize("pages", [False, True], ids=["streaming", "pages"])
def test_list_is_followed_by_changes(api: Api, watching: list[Watch], pages: bool) -> None:
    watch = Watch(api.connection(), pages=pages)
    watching.append(watch)
    first = watch.next(1)
    assert isinstance(first, Replaced)
    assert ObjectKey("default", "kubernetes") in first.objects
    key = ObjectKey("default", "a")
    api.create("a")
    change = watch.next(2)
    assert isinstance(change, Changed)
    assert change.key == key
    assert change.object.spec.cluster_ip.startswith("10.96.")  # type: ignore[attr-defined]
    api.delete("a")
    gone = watch.next(3)
    assert isinstance(gone, Deleted)
    assert gone.key == key
    assert watch.reflector.status.failures == {}
    assert watch.reflector.status.state is State.CONNECTED


def test_object_that_no_longer_matches_the_selector_is_deleted(api: Api, watching: list[Watch]) -> None:
    watch = Watch(api.connection(), selector=f"!{LABEL}")
    watching.append(watch)
    assert isinstance(watch.next(1), Replaced)
    api.create("meshed")
    assert isinstance(watch.next(2), Changed)
    api.relabel("meshed", **{LABEL: "mesh"})
    assert isinstance(watch.next(3), Deleted)
    api.delete("meshed")


def test_broken_stream_resumes_without_a_new_list(api: Api, watching: list[Watch]) -> None:
    watch = Watch(api.connection())
    watching.append(watch)
    watch.next(1)
    watch.break_off()
    api.create("meanwhile")
    change = watch.next(2)
    assert isinstance(change, Changed)
    assert change.key.name == "meanwhile"
    assert watch.reflector.status.lists == 1
    api.delete("meanwhile")


def test_wrong_credentials_are_401(api: Api, watching: list[Watch]) -> None:
    watch = Watch(api.connection("wrong"))
    watching.append(watch)
    watch.until(lambda: watch.reflector.status.failures.get("401", 0) >= 2)
    assert watch.reflector.status.state is State.FAILING
    assert not watch.events


SERVICE = Reference("Service", "default", "kubernetes")


def test_events_are_accepted_once(api: Api) -> None:
    counts: list[str] = []
    for start in range(1, 3):
        recorder = Recorder(api.connection(), "node-a", counts.append, Pace(spread=0))
        recorder.start()
        for about in (SERVICE, Reference("Node", "", "node-a")):
            recorder.record(KubeEvent(about, Level.WARNING, "Bad", "Read", "é" * 1000))
        recorder.record(KubeEvent(Reference("Service", "default", "gone"), Level.WARNING, "Bad", "Read", "x"))
        deadline = time.monotonic() + 30
        while len(counts) < 3 * start:
            assert time.monotonic() < deadline, counts
            time.sleep(0.02)
        recorder.stop()
    assert counts == ["created", "created", "gone", "exists", "exists", "gone"]


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("note", "x", 201),
        ("eventTime", None, 422),
        ("reportingController", "", 422),
        ("reportingController", "of ours", 422),
        ("reportingInstance", "", 422),
        ("reportingInstance", "x" * 129, 422),
        ("action", "", 422),
        ("reason", "x" * 129, 422),
        ("note", "é" * 513, 422),
        ("type", "Error", 422),
        ("series", {"count": 1, "lastObservedTime": "2026-11-21T10:00:00.000000Z"}, 422),
        ("series", {"count": 2, "lastObservedTime": "2026-11-21T10:00:00.000000Z"}, 201),
        ("metadata", {"name": "Upper.1", "namespace": "default"}, 422),
        ("metadata", {"name": "other.1", "namespace": "kube-system"}, 400),
    ],
)
def test_invalid_events_are_rejected(api: Api, field: str, value: object, status: int) -> None:
    now = time.time()
    occurrence = KubeEvent(SERVICE, Level.NORMAL, "Odd", "Read", f"{field} {value}")
    body = {**to_api(occurrence, Series(now, now, 1), "node-a"), field: value}
    response = api.connection().request(
        "POST",
        "/apis/events.k8s.io/v1/namespaces/default/events",
        body=json.dumps({name: each for name, each in body.items() if each is not None}).encode(),
        read_seconds=5,
    )
    assert response.status == status, response.data
