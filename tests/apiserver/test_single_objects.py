"""Single objects: server-side apply, managed fields and errors, as on a real server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.apiserver import ApiServer

MAPS = "/api/v1/namespaces/default/configmaps"
SETS = "/apis/apps/v1/namespaces/default/daemonsets"
APPLY = "application/apply-patch+yaml"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


def ask(
    server: ApiServer, method: str, path: str, body: Any = None, kind: str = "application/json"
) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        server.url + path,
        method=method,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": kind, "User-Agent": "curl/8"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def config_map(**data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": data}


def daemon_set(*containers: dict[str, Any]) -> dict[str, Any]:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [*containers]}}
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "a"}, "spec": spec}


def apply(
    server: ApiServer, item: dict[str, Any], manager: str, query: str = ""
) -> tuple[int, dict[str, Any]]:
    path = MAPS if item["kind"] == "ConfigMap" else SETS
    return ask(server, "PATCH", f"{path}/a?fieldManager={manager}{query}", item, APPLY)


def owners(item: dict[str, Any]) -> dict[str, Any]:
    return {each["manager"]: each["fieldsV1"] for each in item["metadata"]["managedFields"]}


def test_repeated_apply_changes_nothing(server: ApiServer) -> None:
    code, first = apply(server, config_map(x="1"), "me")
    assert code == 201
    assert owners(first) == {"me": {"f:data": {"f:x": {}}}}
    code, second = apply(server, config_map(x="1"), "me")
    assert (code, second) == (200, first), "the same resourceVersion"
    code, third = apply(server, config_map(x="2"), "me")
    assert (code, third["data"]) == (200, {"x": "2"})
    assert third["metadata"]["resourceVersion"] > first["metadata"]["resourceVersion"]


def test_conflict_names_manager_and_fields(server: ApiServer) -> None:
    apply(server, config_map(x="1", y="1", z="1"), "me")
    ask(server, "PATCH", f"{MAPS}/a", {"data": {"x": "2", "y": "2"}}, "application/merge-patch+json")
    code, found = apply(server, config_map(x="1", y="2", z="1"), "me")
    assert (code, found["reason"]) == (409, "Conflict")
    assert found["message"] == 'Apply failed with 1 conflict: conflict with "curl" using v1: .data.x'
    assert found["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "curl" using v1', "field": ".data.x"}
    ]
    code, found = apply(server, config_map(x="1", y="1", z="1"), "me")
    assert found["message"] == (
        'Apply failed with 2 conflicts: conflicts with "curl" using v1:\n- .data.x\n- .data.y'
    )
    code, found = apply(server, config_map(x="1", y="1", z="1"), "me", "&force=true")
    assert (code, found["data"]) == (200, {"x": "1", "y": "1", "z": "1"})
    assert set(owners(found)) == {"me"}


def test_shared_field_is_removed_with_its_last_manager(server: ApiServer) -> None:
    apply(server, config_map(x="1", y="1"), "me")
    _, found = apply(server, config_map(x="1"), "you")
    assert owners(found)["you"] == {"f:data": {"f:x": {}}}
    _, found = apply(server, config_map(), "me")
    assert found["data"] == {"x": "1"}, "y had no other manager"
    _, found = apply(server, config_map(), "you")
    assert not found.get("data")


def test_items_of_keyed_lists_are_fields(server: ApiServer) -> None:
    one, two = {"name": "one", "image": "i:1"}, {"name": "two", "image": "i:1"}
    apply(server, daemon_set(one), "me")
    code, found = apply(server, daemon_set(two), "you")
    assert code == 200
    assert found["spec"]["template"]["spec"]["containers"] == [one, two]
    code, found = apply(server, daemon_set({**one, "image": "i:2"}), "you")
    assert code == 409
    assert found["message"].endswith(': .spec.template.spec.containers[name="one"].image')
    _, found = apply(server, daemon_set(), "you")
    assert found["spec"]["template"]["spec"]["containers"] == [one]


def test_generation_counts_changes_of_the_spec_and_a_selector_is_immutable(server: ApiServer) -> None:
    _, found = apply(server, daemon_set({"name": "one", "image": "i:1"}), "me")
    assert found["metadata"]["generation"] == 1
    status = {"status": {"observedGeneration": 1}}
    _, found = ask(server, "PATCH", f"{SETS}/a/status", status, "application/merge-patch+json")
    assert (found["metadata"]["generation"], found["status"]) == (1, {"observedGeneration": 1})
    _, found = apply(server, daemon_set({"name": "one", "image": "i:2"}), "me")
    assert (found["metadata"]["generation"], found["status"]) == (2, {"observedGeneration": 1})
    item = daemon_set({"name": "one", "image": "i:2"})
    item["spec"]["selector"] = {"matchLabels": {"c": "d"}}
    code, found = apply(server, item, "me")
    assert (code, found["reason"]) == (422, "Invalid")
    assert found["message"].startswith('DaemonSet.apps "a" is invalid: spec.selector: Invalid value: ')


def test_a_dry_run_writes_nothing(server: ApiServer) -> None:
    assert apply(server, config_map(x="1"), "me", "&dryRun=All")[0] == 201
    assert ask(server, "GET", f"{MAPS}/a")[0] == 404


def test_errors_equal_those_of_a_real_server(server: ApiServer) -> None:
    code, found = ask(server, "GET", f"{SETS}/a")
    assert (code, found["message"]) == (404, 'daemonsets.apps "a" not found')
    code, found = ask(server, "PATCH", f"{MAPS}/a", config_map(), APPLY)
    assert (code, found["reason"]) == (422, "Invalid")
    assert "fieldManager: Required value: is required for apply patch" in found["message"]
    code, found = ask(server, "POST", "/api/v1/namespaces/no/configmaps", config_map())
    assert (code, found["message"]) == (404, 'namespaces "no" not found')
    assert ask(server, "POST", MAPS, config_map())[0] == 201
    code, found = ask(server, "POST", MAPS, config_map())
    assert (code, found["message"]) == (409, 'configmaps "a" already exists')
    assert ask(server, "DELETE", f"{MAPS}/a")[0] == 200
    assert ask(server, "DELETE", f"{MAPS}/a")[0] == 404
    server.denied.add("patch daemonsets")
    code, found = apply(server, daemon_set(), "me")
    assert (code, found["message"]) == (
        403,
        'daemonsets.apps "a" is forbidden: User "test" cannot patch resource "daemonsets" in API group "apps" in'
        ' the namespace "default"',
    )


def test_lists_are_selected_by_labels_and_fields(server: ApiServer) -> None:
    for name, node in (("p", "n1"), ("q", "n2")):
        meta = {"name": name, "labels": {"app": name}}
        item = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"nodeName": node}}
        assert ask(server, "POST", "/api/v1/namespaces/default/pods", item)[0] == 201
    for query, expected in (
        ("", ["p", "q"]),
        ("labelSelector=app%3Dq", ["q"]),
        ("fieldSelector=spec.nodeName%3Dn1", ["p"]),
    ):
        _, found = ask(server, "GET", f"/api/v1/namespaces/default/pods?{query}")
        assert [each["metadata"]["name"] for each in found["items"]] == expected
    assert ask(server, "GET", "/api/v1/pods")[1]["items"]
    assert ask(server, "GET", "/api/v1/namespaces/kube-system/pods")[1]["items"] == []
