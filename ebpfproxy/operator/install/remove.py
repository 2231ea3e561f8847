"""Removes the agent from a cluster: when that is refused, what is deleted, and what stays on nodes."""

from __future__ import annotations

from collections.abc import Iterator

from ebpfproxy.operator import kube_proxy_objects, pod_status
from ebpfproxy.operator.api import RESOURCES, Api, ApiError, Object, shown
from ebpfproxy.operator.install import base, cluster_facts, node_cleanup, rollout
from ebpfproxy.operator.install.apply import name_of
from ebpfproxy.operator.install.node_cleanup import CLEANUP
from ebpfproxy.operator.install.rollout import RolloutError
from ebpfproxy.operator.names import (
    AGENT,
    AGENT_SWITCH,
    HELM_RELEASE,
    KUBE_PROXY,
    KUBE_PROXY_SWITCH,
    OFF,
    SYSTEM,
)
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.waiting import Wait

#: The status of a DaemonSet may lag behind its pods, such as after a rollback.
SETTLE_SECONDS = 5.0
_SHOWN = 5
_OFF = f"{KUBE_PROXY_SWITCH}={OFF}"
Place = tuple[str, str, str]
"""Kind, namespace and name."""


class RemoveError(Exception):
    """The removal is refused or incomplete; the message has a line for each reason."""


def find(api: Api, namespace: str) -> dict[Place, Object]:
    """Returns the objects of an installation that exist, in the order of deletion. Raises ApiError."""
    places = [("DaemonSet", namespace, CLEANUP)]
    for each in reversed(base.objects()):
        kind = each["kind"]
        places.append((kind, namespace if RESOURCES[kind][2] else "", each["metadata"]["name"]))
    return {place: item for place in places if (item := api.get(*place)) is not None}


def against(api: Api, found: dict[Place, Object]) -> Iterator[str]:
    """Yields the reasons why nobody would update the nodes' Services any more. Raises ApiError."""
    there = cluster_facts.namespace_of_agents(api)
    if there and ("ServiceAccount", there, AGENT) not in found:
        yield f"ebpfproxy is in namespace {there}, and its agents would lose their rights: -n {there}"
    for place, item in found.items():
        release = (item["metadata"].get("annotations") or {}).get(HELM_RELEASE)
        if release:
            yield f"{shown(*place)} is of the Helm release {release}: `helm uninstall {release}`"
            break
    kube_proxy = kube_proxy_objects.find(api)
    name = shown("DaemonSet", SYSTEM, KUBE_PROXY)
    if kube_proxy is None:
        yield f"there is no {name}: nobody would follow changes of Services"
        return
    off = sorted(each["metadata"]["name"] for each in api.list("Node", "", labelSelector=_OFF))
    if off:
        more = f" and {len(off) - _SHOWN} more" if len(off) > _SHOWN else ""
        yield (
            f"{name} is kept from {', '.join(off[:_SHOWN])}{more} (label {_OFF}): `ebpfproxy migrate"
            " rollback` brings it back"
        )
        return
    least = 0
    for place, item in found.items():
        if place[0] == "DaemonSet" and place[2] == AGENT:
            least = max(least, rollout.progress(item).desired)
    wait = Wait(SETTLE_SECONDS)
    for _ in wait:
        theirs = rollout.progress(kube_proxy)
        wanted = max(least, theirs.desired)
        if wanted and theirs.available >= wanted:
            return
        kube_proxy = kube_proxy_objects.find(api.within(wait)) or kube_proxy
    yield f"{name} is ready on {theirs.available} of {wanted} nodes"


def labels(api: Api, namespace: str) -> list[tuple[str, str]]:
    """Returns (node, label) for labels that nothing reads once the agent is gone. Raises ApiError.

    The label that keeps kube-proxy from a node stays while a kube-proxy exists, which would start without it.
    Agents of another namespace read all of them.
    """
    if cluster_facts.namespace_of_agents(api) not in ("", namespace):
        return []
    unread = [AGENT_SWITCH] if kube_proxy_objects.find(api) else [AGENT_SWITCH, KUBE_PROXY_SWITCH]
    return [
        (item["metadata"]["name"], label)
        for label in unread
        for item in api.list("Node", "", labelSelector=label)
    ]


def remove_labels(api: Api, found: list[tuple[str, str]], say: Say) -> None:
    """Raises RemoveError for labels that stay, and ApiError where the server cannot be reached."""
    failed = []
    for node, label in found:
        try:
            api.patch("Node", "", node, {"metadata": {"labels": {label: None}}})
        except ApiError as error:
            if error.status == 0:
                raise
            failed.append(f"label {label}: {error}")
        else:
            say(f"{shown('Node', '', node)}: label {label} removed")
    if failed:
        raise RemoveError("\n".join(failed))


def remove(api: Api, found: dict[Place, Object], seconds: float, say: Say) -> None:
    """Deletes the objects; pods are gone before what they need. Goes on after errors where it can.

    Raises RemoveError for all errors, and ApiError where the server cannot be reached.
    """
    failed: list[str] = []
    for place in found:
        try:
            if api.delete(*place):
                say(f"{shown(*place)} deleted")
        except ApiError as error:
            if error.status == 0:
                raise
            failed.append(str(error))
            if place[0] == "DaemonSet":
                # Its pods need the other objects.
                break
            continue
        if place[0] == "DaemonSet":
            failed += _wait_gone(api, place, seconds)
    if failed:
        raise RemoveError("\n".join(failed))


def _wait_gone(api: Api, place: Place, seconds: float) -> list[str]:
    """Waits until no pod is left; returns one line where some stay."""
    left: list[Object] = []
    said = ""
    wait = Wait(seconds)
    for _ in wait:
        try:
            left, said = pod_status.of_daemon_set(api.within(wait), *place[1:]), ""
        except ApiError as error:
            if not error.may_pass:
                return [str(error)]
            said = str(error)
            continue
        if not left:
            return []
    where = ", ".join(sorted(map(pod_status.node_of, left)))
    return [said or f"pods of {shown(*place)} are still on {where} after {seconds:g} s: are the nodes up?"]


def clean_nodes(api: Api, daemon_set: Object, image: str, seconds: float, say: Say) -> None:
    """Removes what is pinned on every node, by a DaemonSet, which stays for nodes that are down.

    Raises RemoveError, where some nodes were not cleaned, and ApiError.
    """
    item = node_cleanup.cleanup(daemon_set, image)
    namespace = item["metadata"]["namespace"]
    api.apply(item, force=True)
    say(f"{name_of(item)} created: it runs `ebpfproxy cleanup` on every node")
    try:
        count = rollout.wait(api, namespace, CLEANUP, seconds, say)
    except RolloutError as error:
        raise RemoveError(
            f"{error}\n{name_of(item)} stays for these; `ebpfproxy uninstall` deletes it"
        ) from error
    say(f"nothing of ebpfproxy is left on {count} nodes")
    remove(api, {("DaemonSet", namespace, CLEANUP): item}, seconds, say)
