"""One-line reasons of pods that are not ready, and completion of a rollout by the DaemonSet's status."""

from __future__ import annotations

from typing import Any

import pytest

from ebpfproxy.operator import pod_status
from ebpfproxy.operator.install import rollout

READY = {"type": "Ready", "status": "True"}


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": status}


def container(state: dict[str, Any], *, ready: bool = False, **more: Any) -> list[dict[str, Any]]:
    return [{"name": "c", "ready": ready, "state": state, **more}]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (pod(conditions=[READY]), ""),
        (pod(), "its pod is not started: is the node up?"),
        (
            pod(
                conditions=[
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}
                ]
            ),
            "Unschedulable: 0/3",
        ),
        (
            pod(containerStatuses=container({"waiting": {"reason": "ErrImagePull", "message": "no such"}})),
            "container c: ErrImagePull: no such",
        ),
        (
            pod(containerStatuses=container({"waiting": {"reason": "PodInitializing"}})),
            "its pod is not started: is the node up?",
        ),
        (
            pod(
                initContainerStatuses=container({"terminated": {"exitCode": 0}}, ready=True),
                containerStatuses=container({"running": {}}),
            ),
            "container c: runs, but is not ready",
        ),
        (
            pod(containerStatuses=container({"terminated": {"exitCode": 137, "reason": "OOMKilled"}})),
            "container c: Error, ended with 137: OOMKilled",
        ),
        (pod(phase="Failed", reason="Evicted", message="too little memory"), "too little memory"),
    ],
)
def test_reason_of_a_pod_that_is_not_ready(found: dict[str, Any], message: str) -> None:
    assert pod_status.trouble(found) == message


def test_terminating_pod_is_not_ready() -> None:
    found = pod(conditions=[READY])
    found["metadata"]["deletionTimestamp"] = "2026-11-21T10:00:00Z"
    assert "still being ended" in pod_status.trouble(found)


def test_node_of_an_unscheduled_pod_is_that_of_its_affinity() -> None:
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-z"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    assert pod_status.node_of({"spec": {"affinity": {"nodeAffinity": required}}}) == "node-z"
    assert pod_status.node_of({"spec": {}}) == "?"


@pytest.mark.parametrize(
    ("generation", "status", "done"),
    [
        (1, {}, False),
        (1, {"observedGeneration": 1}, True),
        (2, {"observedGeneration": 1}, False),
        (1, {"observedGeneration": 1, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2}, False),
        (
            1,
            {
                "observedGeneration": 1,
                "desiredNumberScheduled": 2,
                "updatedNumberScheduled": 1,
                "numberAvailable": 2,
            },
            False,
        ),
        (
            1,
            {
                "observedGeneration": 1,
                "desiredNumberScheduled": 2,
                "updatedNumberScheduled": 2,
                "numberAvailable": 2,
            },
            True,
        ),
    ],
)
def test_completion_of_a_rollout(generation: int, status: dict[str, int], done: bool) -> None:
    item = {"metadata": {"generation": generation}, "status": status}
    assert rollout.progress(item).done == done
