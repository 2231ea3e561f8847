"""Cases in files (tests/cases): Kubernetes YAML as input, frontends and backends as expected output.

The first comment of each says what it shows. This node is ``node-a``. After an intended change,
``UPDATE_CASES=1 pytest tests/services/test_cases.py`` rewrites the expected files; read the diff.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from ebpfproxy.kube.manifests import parse
from ebpfproxy.kube.objects import EndpointSlice, Node, Object, Replaced, Resource, Service
from tests.recordings import RecordTracker
from tests.recordings import replaced as replaced_event
from tests.services.dump import dump

CASES = sorted((Path(__file__).parents[1] / "cases").glob("*.yaml"))
NODE = "node-a"


def replaced(objects: list[Object]) -> list[Replaced[object]]:
    kinds: list[tuple[Resource, type[Object]]] = [
        (Resource.SERVICES, Service),
        (Resource.ENDPOINTSLICES, EndpointSlice),
        (Resource.NODES, Node),
    ]
    return [replaced_event(resource, [o for o in objects if isinstance(o, kind)]) for resource, kind in kinds]


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_case(case: Path) -> None:
    objects = list(parse(case.read_text()))
    tracker = RecordTracker(NODE)
    for event in replaced(objects):
        tracker.apply(event)
    warnings = tracker.drain().warnings
    found = dump(tracker.service_ports(), warnings, tracker.health_checks)
    expected = case.with_suffix(".expected")
    if os.environ.get("UPDATE_CASES"):
        expected.write_text(found)
    assert found == expected.read_text()


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_case_in_another_order(case: Path) -> None:
    """The result depends neither on the order of lists nor on that of their objects."""
    objects = list(parse(case.read_text()))
    events = replaced(list(reversed(objects)))
    random.Random(1).shuffle(events)
    tracker = RecordTracker(NODE)
    for event in events:
        tracker.apply(event)
        tracker.drain()
    found = dump(tracker.service_ports(), (), sorted(tracker.health_checks))
    expected = case.with_suffix(".expected").read_text().splitlines(keepends=True)
    assert found == "".join(line for line in expected if not line.startswith("warning:"))


def test_there_are_enough_cases_and_each_has_a_description() -> None:
    assert len(CASES) >= 40
    for case in CASES:
        assert case.read_text().startswith("# "), case
