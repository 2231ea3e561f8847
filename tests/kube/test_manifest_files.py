"""Manifest files are read and watched, and errors in them are reported."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpfproxy.kube.errors import ManifestError
from ebpfproxy.kube.manifests import ManifestSource, parse
from ebpfproxy.kube.objects import Event, ObjectKey, Replaced, Resource, key_of
from ebpfproxy.kube.source_status import State

SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: NAME, namespace: shop, creationTimestamp: 2026-11-20T23:45:46Z}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
"""


def service(name: str) -> str:
    return SERVICE.replace("NAME", name)


class Follower:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[Resource, set[str]] = {}
        self.events = 0
        self.source = ManifestSource(folder, self._tell, node_name="node-a")

    def _tell(self, event: Event) -> None:
        assert isinstance(event, Replaced)
        self.known[event.resource] = {str(key) for key in event.objects}
        self.events += 1

    @property
    def services(self) -> set[str]:
        return self.known[Resource.SERVICES]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.known
            time.sleep(0.01)


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    (tmp_path / "a.yaml").write_text(service("a"))
    made = Follower(tmp_path)
    made.source.start()
    time.sleep(0.2)
    yield made
    made.source.stop()


def test_all_files_are_read_before_start_returns(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"{service('a')}---\n{service('b')}---\n")
    (tmp_path / "c.json").write_text('{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}')
    (tmp_path / "d.yml").write_text("{apiVersion: v1, kind: Node, metadata: {name: node-b}}")
    (tmp_path / "notes.txt").write_text("not a manifest")
    (tmp_path / ".hidden.yaml").write_text(service("hidden"))
    made = Follower(tmp_path)
    made.source.start()
    assert made.known == {
        Resource.SERVICES: {"shop/a", "shop/b"},
        Resource.ENDPOINTSLICES: set(),
        Resource.NODES: {"node-a"},
        Resource.SERVICECIDRS: set(),
    }
    made.source.stop()


def test_lists_of_kubectl_are_read_and_other_kinds_skipped() -> None:
    text = f"""
apiVersion: v1
kind: List
metadata: {{resourceVersion: ""}}
items:
- {{apiVersion: v1, kind: ConfigMap, metadata: {{name: c}}}}
- {{apiVersion: serving.knative.dev/v1, kind: Service, metadata: {{name: other}}, spec: {{}}}}
- {{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {{clusterIP: 10.96.0.1}}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSliceList
items:
- {{metadata: {{name: a-1}}, addressType: IPv4, endpoints: null, ports: null}}
---
{service("b")}
"""
    assert [key_of(each) for each in parse(text)] == [
        ObjectKey("default", "a"),
        ObjectKey("default", "a-1"),
        ObjectKey("shop", "b"),
    ]


@pytest.mark.parametrize(
    ("least", "field"),
    [
        (least, field)
        for least, fields in (
            (
                "{apiVersion: v1, kind: Service, metadata: {name: a@}, spec: {ports: [{port: 80$}]#}}",
                (
                    *("@namespace", "@resourceVersion", "@creationTimestamp", "@labels", "@annotations"),
                    *(
                        "$name",
                        "$protocol",
                        "$nodePort",
                        "#type",
                        "#clusterIP",
                        "#clusterIPs",
                        "#externalIPs",
                    ),
                    *("#sessionAffinity", "#sessionAffinityConfig", "#healthCheckNodePort"),
                    *("#internalTrafficPolicy", "#externalTrafficPolicy", "#loadBalancerSourceRanges"),
                ),
            ),
            (
                "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: a@}, addressType: IPv4,"
                " endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod%}$}], ports: [{port: 80#}]}",
                ("@namespace", "$conditions", "$nodeName", "$zone", "$hints", "%name", "#name", "#protocol"),
            ),
            (
                "{apiVersion: v1, kind: Node, metadata: {name: a@}, status: {addresses: [{type: InternalIP$}]}}",
                ("@resourceVersion", "@deletionTimestamp", "$address"),
            ),
        )
        for field in fields
    ],
)
def test_null_is_an_absent_field(least: str, field: str) -> None:
    """So the API takes manifests that name every field, as templates and converters write them."""

    def filled(place: str, added: str) -> str:
        return re.sub("[@#$%]", lambda found: added if found[0] == place else "", least)

    (expected,) = parse(filled("", ""))
    (found,) = parse(filled(field[0], f", {field[1:]}: null"))
    assert found == expected


@pytest.mark.parametrize("null", ["metadata: {name: null}, spec: {}", "metadata: {name: a}, spec: null"])
def test_null_of_a_required_field_is_an_error(null: str) -> None:
    with pytest.raises(ManifestError, match="Object missing required field"):
        list(parse(f"{{apiVersion: v1, kind: Service, {null}}}"))


def test_object_that_contains_itself_is_an_error() -> None:
    text = "{apiVersion: v1, kind: Service, metadata: &m {name: null, annotations: *m}, spec: {}}"
    with pytest.raises(ManifestError, match="contains itself"):
        list(parse(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "mapping values are not allowed"),
        ("- 1", "document 1: not an object"),
        ("{apiVersion: v1, kind: [Service]}", "document 1: kind: not a string"),
        (
            service("a") + "---\n" + service("b").replace("80", "eighty"),
            "document 2, Service b: spec.ports[0].port",
        ),
        (
            service("a").replace("ports: [{name: http, port: 80}]", "ports: [{}]"),
            "spec.ports[0]: Object missing",
        ),
        ("{apiVersion: v1, kind: List, items: 3}", "document 1: items: not a list"),
        ("{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Node}]}", "items[0], Node (no name): "),
        (
            "{apiVersion: discovery.k8s.io/v1beta1, kind: EndpointSlice}",
            "apiVersion: 'discovery.k8s.io/v1beta1'",
        ),
    ],
)
def test_errors_name_document_object_and_field(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as error:
        list(parse(text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "- ? " * 100_000,
        "".join(" " * n + "a:\n" for n in range(2000)),
        "[" * 200 + "]" * 200,
    ],
    ids=["[", "{", "-", "?", "- ?", "a:", "[ 200"],
)
def test_deep_nesting_is_an_error_and_does_not_end_the_process(text: str) -> None:
    with pytest.raises(ManifestError, match="nested more than 100 deep"):
        list(parse(text))


def test_added_changed_and_deleted_files_are_followed(follower: Follower) -> None:
    (follower.folder / "b.yaml").write_text(service("b"))
    follower.until(lambda: follower.services == {"shop/a", "shop/b"})
    (follower.folder / "b.yaml").write_text(service("c"))
    follower.until(lambda: follower.services == {"shop/a", "shop/c"})
    (follower.folder / "a.yaml").unlink()
    follower.until(lambda: follower.services == {"shop/c"})


def test_files_replaced_by_rename_and_by_a_config_map_update(tmp_path: Path) -> None:
    """Files of a mounted ConfigMap are links into ..data, a link that an update replaces."""
    for version in ("one", "two"):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "a.yaml").write_text(service(version))
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    made = Follower(tmp_path)
    made.source.start()
    assert made.services == {"shop/one"}
    time.sleep(0.2)
    (tmp_path / "..data_tmp").symlink_to("..two")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    made.until(lambda: made.services == {"shop/two"})
    made.source.stop()


def test_invalid_file_keeps_its_last_valid_objects_and_others_are_updated(
    follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    (follower.folder / "a.yaml").write_text("{")
    (follower.folder / "b.yaml").write_text(service("b"))
    follower.until(lambda: follower.services == {"shop/a", "shop/b"})
    follower.until(lambda: follower.source.statuses[0].state is State.FAILING)
    assert "a.yaml" in (follower.source.statuses[0].error or "")
    (follower.folder / "b.yaml").write_text(service("c"))
    follower.until(lambda: follower.services == {"shop/a", "shop/c"})
    (follower.folder / "a.yaml").write_text(service("a2"))
    follower.until(lambda: follower.services == {"shop/a2", "shop/c"})
    assert follower.source.statuses[0].state is State.CONNECTED
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "cannot read manifest, keeping its last good state"
    ]


def test_first_file_wins_for_an_object_in_two_files(
    follower: Follower, caplog: pytest.LogCaptureFixture
) -> None:
    (follower.folder / "b.yaml").write_text(service("a"))
    follower.until(lambda: any("two manifests" in r.getMessage() for r in caplog.records))
    assert follower.services == {"shop/a"}


def test_headless_slices_are_filtered(tmp_path: Path) -> None:
    """The selectors are those of the watches: no Service is left out, and of slices the headless alone."""
    for name, label in (("a", "headless"), ("b", "service-proxy-name")):
        labels = f"namespace: shop, labels: {{service.kubernetes.io/{label}: mesh}}"
        piece = f"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, {labels}}}"
        made = service(name).replace("namespace: shop", labels)
        (tmp_path / f"{name}.yaml").write_text(f"{made}\n---\n{piece}\naddressType: IPv4\n")
    found = Follower(tmp_path)
    found.source.read()
    assert found.services == {"shop/a", "shop/b"}
    assert found.known[Resource.ENDPOINTSLICES] == {"shop/b"}


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_service_cidrs_are_read_from_files(tmp_path: Path, version: str) -> None:
    kind = f"{{apiVersion: networking.k8s.io/{version}, kind: ServiceCIDR"
    (tmp_path / "a.yaml").write_text(
        f'{kind}, metadata: {{name: kubernetes}}, spec: {{cidrs: ["10.96.0.0/12"]}}}}'
    )
    made = Follower(tmp_path)
    made.source.read()
    assert made.known[Resource.SERVICECIDRS] == {"kubernetes"}


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not a folder"):
        Follower(tmp_path / "nothing").source.start()
