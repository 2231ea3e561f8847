"""The stand-in responds as the recorded real server and injects faults on request."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpfproxy.kube.objects import Resource
from tests import recordings
from tests.apiserver import ApiServer, objects
from tests.apiserver.certificates import Authority
from tests.data import RECORDINGS

SERVICES = "/api/v1/services"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        for i in range(5):
            made.store.put("services", objects.service(f"s-{i}", f"10.96.0.{i + 1}"))
        yield made


def get(server: ApiServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def page(server: ApiServer, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(server, path)[2])
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [each["metadata"]["name"] for each in found["items"]]


def events(server: ApiServer, query: str) -> list[tuple[str, str]]:
    """Returns type and name of the events of a watch of one second."""
    _, _, body = get(server, f"{SERVICES}?watch=true&timeoutSeconds=1&{query}")
    lines = [json.loads(line) for line in body.splitlines()]
    return [(line["type"], line["object"]["metadata"].get("name", "")) for line in lines]


def shape(value: Any) -> Any:
    """Returns keys and types at all levels."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    return type(value).__name__


@pytest.mark.parametrize(
    "what",
    ["first page", "no credentials", "wrong credentials", "unknown resource", "too old", "ends by its own"],
)
def test_responses_have_the_structure_of_a_real_servers(server: ApiServer, what: str) -> None:
    real = next(
        each for each in json.loads((RECORDINGS / "responses.json").read_text()) if what in each["what"]
    )
    headers = {}
    if what in ("no credentials", "wrong credentials"):
        server.tokens = {"good"}
        headers = {"Authorization": "Bearer bad"} if what == "wrong credentials" else {}
    if what == "too old":
        server.store.compact()
    path = real["request"].removeprefix("GET ").replace("limit=5", "limit=2")
    status, answered, body = get(server, path, **headers)
    assert status == real["status"]
    for header in ("Content-Type", "Cache-Control", "Transfer-Encoding"):
        assert answered.get(header) == real["headers"].get(header)
    assert bool(body) == bool(real["body"])
    if body:
        mine, recorded = json.loads(body), json.loads(real["body"])
        if "items" in recorded:
            mine["items"] = recorded["items"] = []
        assert shape(mine) == shape(recorded)
        for part in (mine, mine.get("object", {})):
            if part.get("kind") == "Status":
                of_real = recorded if part is mine else recorded["object"]
                assert (part["code"], part["reason"]) == (of_real["code"], of_real["reason"])


def test_streaming_list_ends_with_the_bookmark_of_a_real_server(server: ApiServer) -> None:
    real = next(
        each["body"]
        for each in json.loads((RECORDINGS / "responses.json").read_text())
        if "streaming list" in each["what"]
    )
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    _, _, body = get(server, f"/apis/discovery.k8s.io/v1/endpointslices?{query}&timeoutSeconds=1")
    mine, recorded = json.loads(body.splitlines()[-1]), json.loads(real.splitlines()[-1])
    assert shape(mine) == shape(recorded)


def test_generated_objects_are_as_large_as_real_ones() -> None:
    def size(item: dict[str, Any]) -> int:
        return len(json.dumps(item, separators=(",", ":")))

    for line in map(json.loads, (line for _, line in recordings.watch_lines())):
        if len(line["object"].get("endpoints") or ()) == 10:
            recorded = size(line["object"])
            break
    made = [objects.endpoint(f"10.244.1.{i}", "node-a1") for i in range(10)]
    assert size(objects.endpoint_slice("orders-api", made)) == pytest.approx(recorded, rel=0.1)
    real = recordings.lists("final")[Resource.SERVICES]
    cart = next(each for each in real if each["metadata"]["name"] == "cart")
    assert size(objects.service("cart", "10.96.66.245")) == pytest.approx(size(cart), rel=0.1)


def test_pages_of_a_list_are_one_snapshot(server: ApiServer) -> None:
    first = page(server, f"{SERVICES}?limit=2")
    assert first["metadata"]["remainingItemCount"] == 3
    server.store.delete("services", "load", "s-3")
    server.store.put("services", objects.service("s-9", "10.96.0.9"))
    server.store.put("services", objects.service("s-4", "10.96.0.44"))
    second = page(server, f"{SERVICES}?limit=9&continue={first['metadata']['continue']}")
    assert names(first) + names(second) == [f"s-{i}" for i in range(5)]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert second["items"][2]["spec"]["clusterIP"] == "10.96.0.5"
    assert names(page(server, SERVICES)) == ["s-0", "s-1", "s-2", "s-4", "s-9"]


def test_continue_token_older_than_a_compaction_is_410(server: ApiServer) -> None:
    token = page(server, f"{SERVICES}?limit=2")["metadata"]["continue"]
    server.store.put("services", objects.service("s-9", "10.96.0.9"))
    server.store.compact()
    status, _, body = get(server, f"{SERVICES}?limit=2&continue={token}")
    assert (status, json.loads(body)["reason"]) == (410, "Expired")


def test_watch_reports_objects_that_begin_or_cease_to_match_its_selector(server: ApiServer) -> None:
    version = server.store.version
    for labels in ({"mesh": "yes"}, {"mesh": "no"}, {}, {"mesh": "yes"}):
        item = objects.service("s-0", "10.96.0.1")
        item["metadata"]["labels"] = labels
        server.store.put("services", item)
    server.store.delete("services", "load", "s-0")
    query = f"resourceVersion={version}&labelSelector="
    kinds = [kind for kind, _ in events(server, query + "mesh")]
    assert kinds == ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"]
    assert [k for k, _ in events(server, query + "!mesh")] == ["DELETED", "ADDED", "DELETED"]
    assert [k for k, _ in events(server, query + "mesh=yes")] == ["ADDED", "DELETED", "ADDED", "DELETED"]
    assert [k for k, _ in events(server, query + "mesh!=yes")] == ["DELETED", "ADDED", "MODIFIED", "DELETED"]


def test_field_selector_selects_by_name(server: ApiServer) -> None:
    assert names(page(server, f"{SERVICES}?fieldSelector=metadata.name=s-3")) == ["s-3"]
    assert names(page(server, f"{SERVICES}?fieldSelector=metadata.namespace=other")) == []


def test_watch_without_a_resource_version_begins_with_existing_objects(server: ApiServer) -> None:
    assert events(server, "") == [("ADDED", f"s-{i}") for i in range(5)]


def test_watch_from_a_future_resource_version_receives_nothing(server: ApiServer) -> None:
    server.bookmark_seconds = 0.1
    assert events(server, "resourceVersion=9999&allowWatchBookmarks=true") == []
    assert ("BOOKMARK", "") in events(
        server, f"resourceVersion={server.store.version}&allowWatchBookmarks=true"
    )


def test_store_that_is_rewound_has_what_there_was(server: ApiServer) -> None:
    """As from a backup: later objects are gone, numbers are given again, and who knows a later one hears nothing."""
    before = server.store.version
    server.store.put("services", objects.service("later", "10.96.0.9"))
    server.store.put("services", objects.service("s-0", "10.96.0.8"))
    server.store.delete("services", "load", "s-1")
    known = server.store.version
    server.store.rewind(before)
    found = page(server, SERVICES)
    assert found["metadata"]["resourceVersion"] == str(before)
    assert names(found) == [f"s-{i}" for i in range(5)]
    assert found["items"][0]["spec"]["clusterIP"] == "10.96.0.1"
    server.store.put("services", objects.service("s-2", "10.96.0.7"))
    assert events(server, f"resourceVersion={known}") == []
    assert events(server, f"resourceVersion={before}") == [("MODIFIED", "s-2")]


def test_client_certificate_is_a_credential(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.pair("server"))
    context.load_verify_locations(authority.path)
    context.verify_mode = ssl.CERT_OPTIONAL
    with ApiServer(tls=context, tokens={"token"}) as server:
        for with_certificate, status in ((True, 200), (False, 403)):
            client = ssl.create_default_context(cafile=str(authority.path))
            if with_certificate:
                client.load_cert_chain(*authority.pair("client"))
            connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=client, timeout=5)
            connection.request("GET", SERVICES)
            assert connection.getresponse().status == status


def test_watch_receives_all_of_a_thousand_changes(server: ApiServer) -> None:
    """They are counted, not timed: all arrive in order by one stream."""
    version = server.store.version
    for i in range(1000):
        server.store.put("services", objects.service("s-0", f"10.97.{i // 250}.{i % 250}"))
    assert len(events(server, f"resourceVersion={version}")) == 1000


def post(url: str, body: object = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body is not None else b""
    request = urllib.request.Request(url, data=data, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        found = json.loads(error.read())
    return found


@pytest.fixture
def command(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yields the URL of a stand-in in its own process."""
    arguments = [sys.executable, "-m", "tests.apiserver", *request.param]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    yield process.stdout.readline().decode().strip()
    process.kill()
    process.wait()
    process.stdout.close()


def status_of(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("command", [["--services", "3"]], indirect=True)
def test_separate_process_is_controlled_over_http(command: str) -> None:
    control, services = f"{command}/control", f"{command}{SERVICES}"
    assert post(f"{control}/put?resource=services", objects.service("more", "10.96.9.9"))["resourceVersion"]
    with urllib.request.urlopen(services) as answer:
        assert names(json.load(answer)) == ["load-0", "load-1", "load-2", "more"]
    post(f"{control}/delete?resource=services&namespace=load&name=more")
    with urllib.request.urlopen(services) as answer:
        assert names(json.load(answer)) == ["load-0", "load-1", "load-2"]
    post(f"{control}/fault?kind=429&times=2&retry_after=1")
    assert [status_of(services) for _ in range(3)] == [429, 429, 200]
    post(f"{control}/fault?kind=500&times=99")
    post(f"{control}/heal")
    assert status_of(services) == 200
    post(f"{control}/tokens?accept=good")
    assert status_of(services) == 403
    assert status_of(services, Authorization="Bearer good") == 200
    assert post(f"{control}/churn?rate=200&seconds=0.2")["changes"] == 40
    post(f"{control}/compact")
    old = f"{services}?watch=true&resourceVersion=101&timeoutSeconds=1"
    with urllib.request.urlopen(
        urllib.request.Request(old, headers={"Authorization": "Bearer good"})
    ) as answer:
        assert json.load(answer)["object"]["code"] == 410
    assert "no fault 'nonsense'" in post(f"{control}/fault?kind=nonsense")["error"]
    assert "/control/ has put" in post(f"{control}/unknown")["error"]


@pytest.mark.parametrize("command", [["--recordings", str(RECORDINGS), "--pages"]], indirect=True)
def test_recorded_cluster_is_replayed(command: str) -> None:
    began = time.monotonic()
    assert post(f"{command}/control/replay")["changes"] == 361
    with urllib.request.urlopen(f"{command}/api/v1/services") as answer:
        replayed = sorted(names(json.load(answer)))
    real = recordings.lists("final")[Resource.SERVICES]
    assert replayed == sorted(each["metadata"]["name"] for each in real)
    assert time.monotonic() - began < 60, "not at the recorded speed"
    assert status_of(f"{command}/api/v1/services?watch=true&sendInitialEvents=true") == 422
