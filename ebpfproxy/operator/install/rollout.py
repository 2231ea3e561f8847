"""Until a DaemonSet's pods are what it says, on all nodes; and why they are not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ebpfproxy.operator.install.api import Api, ApiError, Object, shown
from ebpfproxy.operator.install.base import LABEL

Say = Callable[[str], None]
POLL_SECONDS = 1.0
_STARTING = ("ContainerCreating", "PodInitializing", "")


class RolloutError(Exception):
    """It did not come to its end; the message has a line for each node."""


class Progress(NamedTuple):
    """Nodes. ``seen``: the controller knows the DaemonSet as it is now (observedGeneration)."""

    seen: bool
    desired: int
    updated: int
    available: int

    @property
    def done(self) -> bool:
        return self.seen and self.updated >= self.desired and self.available >= self.desired


def progress(item: Object) -> Progress:
    status = item.get("status") or {}
    return Progress(
        status.get("observedGeneration", 0) >= item["metadata"].get("generation", 1),
        status.get("desiredNumberScheduled", 0),
        status.get("updatedNumberScheduled", 0),
        status.get("numberAvailable", 0),
    )


def wait(api: Api, namespace: str, name: str, seconds: float, say: Say) -> int:
    """How many nodes it runs on, once it does. ``seconds``: how long nothing may come of it.

    A rolling update goes node by node, so it is no more than that for all of them. Raises RolloutError.
    """
    what = shown("DaemonSet", namespace, name)
    best, before = (False, -1, -1), None
    deadline = time.monotonic() + seconds
    said: list[str] = []
    while True:
        try:
            item = api.get("DaemonSet", namespace, name)
            if item is None:
                raise RolloutError(f"{what} is gone")
            now = progress(item)
            if now.done:
                return now.desired
            if now.seen and now != before:
                say(f"{what}: {min(now.updated, now.available)} of {now.desired} nodes ready")
                before = now
            reached = (now.seen, now.updated, now.available)
            if reached > best:
                best, deadline = reached, time.monotonic() + seconds
        except ApiError as error:
            # The server may restart meanwhile, or be behind what is rolled out.
            if not error.passes:
                raise RolloutError(str(error)) from error
            said = [str(error)]
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_SECONDS)
    try:
        said = list(why(api, namespace, name))
    except ApiError as error:
        said.append(str(error))
    raise RolloutError("\n".join([f"{what}: nothing more became ready in {seconds:g} s", *said]))


def pods(api: Api, namespace: str, name: str) -> list[Object]:
    """Of the DaemonSet. Raises ApiError."""
    return [
        pod
        for pod in api.list("Pod", namespace, labelSelector=f"{LABEL}={name}")
        if any(
            owner.get("kind") == "DaemonSet" and owner.get("name") == name
            for owner in pod["metadata"].get("ownerReferences") or ()
        )
    ]


def why(api: Api, namespace: str, name: str) -> Iterator[str]:
    """A line for each node whose pod is not ready, and why pods cannot be made. Raises ApiError."""
    for pod in sorted(pods(api, namespace, name), key=node_of):
        if trouble := trouble_of(pod):
            yield f"  node {node_of(pod)}: {trouble}"
    selector = f"involvedObject.kind=DaemonSet,involvedObject.name={name},type=Warning"
    events = api.list("Event", namespace, fieldSelector=selector)
    if events:
        last = max(events, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""))
        yield f"  {last.get('reason')}: {' '.join(str(last.get('message')).split())}"


def node_of(pod: Object) -> str:
    """Its node; one that is not yet on any is meant for the one in its affinity."""
    spec = pod.get("spec") or {}
    if spec.get("nodeName"):
        return str(spec["nodeName"])
    try:
        (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        return str(term["matchFields"][0]["values"][0])
    except (LookupError, TypeError, ValueError):
        return "?"


def trouble_of(pod: Object) -> str:
    """Why it is not ready, in one line; empty where it is."""
    status = pod.get("status") or {}
    conditions = {each["type"]: each for each in status.get("conditions") or ()}
    if pod["metadata"].get("deletionTimestamp"):
        return "its pod is still being ended: is the node up?"
    if conditions.get("Ready", {}).get("status") == "True":
        return ""
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return f"{scheduled.get('reason', 'not scheduled')}: {scheduled.get('message', '')}".strip(": ")
    found = list(_containers(status.get("initContainerStatuses") or ()))
    found += _containers(status.get("containerStatuses") or ())
    if found:
        return found[0]
    return str(status.get("message") or status.get("reason") or "its pod is not started: is the node up?")


def _containers(statuses: Iterable[Object]) -> Iterator[str]:
    for each in statuses:
        state = each.get("state") or {}
        ended = state.get("terminated") or (each.get("lastState") or {}).get("terminated")
        waiting = state.get("waiting") or {}
        if ended and ended.get("exitCode") and not each.get("ready"):
            reason = waiting.get("reason") or "Error"
            lines = str(ended.get("message") or ended.get("reason") or "").strip().splitlines() or [""]
            yield f"container {each['name']}: {reason}, ended with {ended['exitCode']}: {lines[-1]}".strip(
                ": "
            )
        elif waiting.get("reason", "") not in _STARTING:
            yield f"container {each['name']}: {waiting['reason']}: {waiting.get('message', '')}".strip(": ")
        elif "running" in state and not each.get("ready"):
            yield f"container {each['name']}: runs, but is not ready"
