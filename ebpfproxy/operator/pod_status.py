"""What a pod's status says: its node, whether it is ready, and why it does not start, or has failed."""

from __future__ import annotations

from collections.abc import Iterator

from ebpfproxy.operator.api import Api, Object
from ebpfproxy.operator.names import APP

#: A container that starts as it should waits for these; any other reason is an error's.
_STARTING = frozenset({"", "ContainerCreating", "PodInitializing"})


def is_owned_by(pod: Object, daemon_set: str) -> bool:
    return any(
        owner.get("kind") == "DaemonSet" and owner.get("name") == daemon_set
        for owner in pod["metadata"].get("ownerReferences") or ()
    )


def of_daemon_set(api: Api, namespace: str, name: str) -> list[Object]:
    """Returns the DaemonSet's pods. Raises ApiError."""
    found = api.list("Pod", namespace, labelSelector=f"{APP}={name}")
    return [pod for pod in found if is_owned_by(pod, name)]


def has_restarted(pod: Object, container: str) -> bool:
    """The kubelet has the log of the container before this one."""
    return any(each.get("restartCount") for each in _containers(pod) if each.get("name") == container)


def is_ready(pod: Object) -> bool:
    """Ready, and not about to end."""
    return not _is_ending(pod) and _conditions(pod).get("Ready", {}).get("status") == "True"


def node_of(pod: Object) -> str:
    """Returns its node; for a pod that is not yet on any, the one in its affinity."""
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


def last_warning(api: Api, namespace: str, kind: str, name: str) -> str:
    """Returns reason and message of the latest Event of type Warning; empty without one. Raises ApiError."""
    selector = f"involvedObject.kind={kind},involvedObject.name={name},type=Warning"
    found = api.list("Event", namespace, fieldSelector=selector)
    if not found:
        return ""
    return _words(max(found, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or "")))


# -- a pod that should run for ever


def trouble(pod: Object) -> str:
    """Returns in one line why it is not ready; empty where it is."""
    status = pod.get("status") or {}
    if _is_ending(pod):
        return "its pod is still being ended: is the node up?"
    if is_ready(pod):
        return ""
    scheduled = _conditions(pod).get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _words({"reason": "not scheduled", **scheduled})
    for each in _containers(pod):
        if found := _container_trouble(each):
            return f"container {each['name']}: {found}"
    return str(status.get("message") or status.get("reason") or "its pod is not started: is the node up?")


def _container_trouble(container: Object) -> str:
    state = container.get("state") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated")
    if ended and ended.get("exitCode") and not container.get("ready"):
        reason = (state.get("waiting") or {}).get("reason") or "Error"
        lines = str(ended.get("message") or ended.get("reason") or "").strip().splitlines() or [""]
        return f"{reason}, ended with {ended['exitCode']}: {lines[-1]}".strip(": ")
    if found := _waiting(container):
        return found
    return "runs, but is not ready" if "running" in state and not container.get("ready") else ""


# -- a pod that runs one command to its end


def has_ended(pod: Object) -> bool:
    return _phase(pod) in ("Succeeded", "Failed")


def has_started(pod: Object) -> bool:
    return has_ended(pod) or any({"running", "terminated"} & {*_state(each)} for each in _containers(pod))


def cannot_start(pod: Object) -> str:
    """Returns in the kubelet's words why its container will not start; empty while it may."""
    return next((found for each in _containers(pod) if (found := _waiting(each))), "")


def failure(pod: Object) -> str:
    """Returns why a pod that has ended failed; empty where its command ended with 0.

    What the command itself printed is in its log.
    """
    if _phase(pod) == "Succeeded":
        return ""
    ended = _terminated(pod)
    if ended is None:
        return _words(pod["status"]) or "it failed"
    if ended.get("reason") not in ("Error", "Completed"):
        return f"its container ended: {_words(ended)}"
    return f"its command ended with exit code {ended.get('exitCode')}"


def exit_code(pod: Object) -> int | None:
    """Returns None where no command ran to its end."""
    ended = _terminated(pod)
    return None if ended is None else int(ended["exitCode"])


def message(pod: Object) -> str:
    """Returns the end of what its command wrote, as the kubelet keeps it for a command that failed."""
    return str((_terminated(pod) or {}).get("message", ""))


# -- parts of the status


def _phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _is_ending(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _conditions(pod: Object) -> dict[str, Object]:
    return {each["type"]: each for each in (pod.get("status") or {}).get("conditions") or ()}


def _containers(pod: Object) -> Iterator[Object]:
    """Statuses, in the order in which containers start."""
    status = pod.get("status") or {}
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()


def _state(container: Object) -> Object:
    return container.get("state") or {}


def _terminated(pod: Object) -> Object | None:
    return next((s["terminated"] for each in _containers(pod) if "terminated" in (s := _state(each))), None)


def _waiting(container: Object) -> str:
    """Returns what a container waits for in vain, in the kubelet's words."""
    waiting = _state(container).get("waiting") or {}
    return "" if waiting.get("reason", "") in _STARTING else _words(waiting)


def _words(of: Object) -> str:
    """Reason and message in one line."""
    parts = (str(of.get("reason") or ""), " ".join(str(of.get("message") or "").split()))
    return ": ".join(part for part in parts if part)
