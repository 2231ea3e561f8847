"""Waits until a DaemonSet's pods run on all nodes, and says why they do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ebpfproxy.operator import pod_status
from ebpfproxy.operator.api import Api, ApiError, Object, shown
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.waiting import Wait


class RolloutError(Exception):
    """The rollout did not complete; the message has a line for each node."""


class Progress(NamedTuple):
    """Counts nodes. ``seen``: the controller has read the current DaemonSet (observedGeneration)."""

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
    """Returns on how many nodes it runs, once it does. ``seconds`` count anew with each further node.

    A rolling update goes node by node, so it is no more than that for all of them. Raises RolloutError.
    """
    what = shown("DaemonSet", namespace, name)
    best, before = (False, -1, -1), None
    said: list[str] = []
    unanswered = False
    waiting = Wait(seconds)
    for _ in waiting:
        try:
            item = api.within(waiting).get("DaemonSet", namespace, name)
        except ApiError as error:
            # The server may restart meanwhile, or be reached through what is rolled out.
            if not error.may_pass:
                raise RolloutError(str(error)) from error
            said, unanswered = [str(error)], error.status == 0
            continue
        unanswered = False
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
            best = reached
            waiting.renew()
    # A server that cannot be reached is not asked for more.
    if not unanswered:
        try:
            said = list(why(api.within(waiting), namespace, name))
        except ApiError as error:
            said.append(str(error))
    raise RolloutError("\n".join([f"{what}: nothing more became ready in {seconds:g} s", *said]))


def why(api: Api, namespace: str, name: str) -> Iterator[str]:
    """Yields a line for each node whose pod is not ready, and why pods cannot be created. Raises ApiError."""
    for pod in sorted(pod_status.of_daemon_set(api, namespace, name), key=pod_status.node_of):
        if trouble := pod_status.trouble(pod):
            yield f"  node {pod_status.node_of(pod)}: {trouble}"
    if warning := pod_status.last_warning(api, namespace, "DaemonSet", name):
        yield f"  {warning}"
