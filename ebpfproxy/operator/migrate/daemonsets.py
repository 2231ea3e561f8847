"""kube-proxy's DaemonSet, and ours: their pods on one node, switched off and on by labels of the node."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ebpfproxy.operator import kube_proxy_objects, pod_status
from ebpfproxy.operator.api import Api, ApiError, Object, Patch
from ebpfproxy.operator.kube_proxy_objects import File
from ebpfproxy.operator.migrate.switches import KUBE_PROXY, Switch
from ebpfproxy.operator.names import OFF
from ebpfproxy.operator.waiting import Wait, until

#: A patch is made so often anew where somebody else changes the same object.
_TRIES = 5
_CHANGED = frozenset({409, 422})


class DaemonSet(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of kube-proxy's DaemonSet that decide."""

    name: str
    image: str
    #: Its affinity keeps it from nodes with the label.
    avoids: bool
    #: This node has the label.
    labelled: bool
    #: Names of its pods on this node.
    pods: tuple[str, ...]


def find(api: Api, switch: Switch) -> Object | None:
    """Returns the DaemonSet; None where there is none. Raises ApiError."""
    return api.get("DaemonSet", switch.namespace, switch.name)


def install(api: Api, switch: Switch) -> list[str]:
    """Makes the switch work on all nodes; returns what was done. Restarts no pod. Raises ApiError."""
    if _change(api, switch, switch.install):
        return [
            f"gave {switch} an affinity against nodes with {switch.label}={OFF}, and updateStrategy OnDelete:"
            " no pod restarts for it"
        ]
    return []


def uninstall(api: Api, switch: Switch) -> list[str]:
    """Undoes :func:`install`, unless a node has the label. Raises ApiError."""
    if any(switch.is_off(node) for node in api.list("Node", "")):
        return []
    if find(api, switch) is not None and _change(api, switch, switch.uninstall):
        return [f"{switch} is as it was: pods that were made meanwhile restart"]
    return []


def _change(api: Api, switch: Switch, make: Callable[[Object], Patch]) -> bool:
    for left in reversed(range(_TRIES)):
        found = find(api, switch)
        if found is None:
            raise ApiError(f"there is no {switch}", 404)
        patch = make(found)
        if not patch:
            return False
        try:
            # It is sent once, since it tests the version that it was made for.
            api.patch("DaemonSet", switch.namespace, switch.name, patch, tries=1)
        except ApiError as error:
            if not left or error.status not in _CHANGED:
                raise
        else:
            return True
    raise AssertionError("unreachable")


class Daemon:
    """A DaemonSet's pod on one node. Methods raise ApiError and WaitError."""

    def __init__(self, api: Api, switch: Switch, node: str) -> None:
        self._api, self.switch, self.node = api, switch, node

    def pods(self, *, ready: bool = False, wait: Wait | None = None) -> list[str]:
        """Names of its pods; one that is about to end is not ready."""
        found = self._api.within(wait).list(
            "Pod", self.switch.namespace, fieldSelector=f"spec.nodeName={self.node}"
        )
        return [
            pod["metadata"]["name"]
            for pod in found
            if pod_status.is_owned_by(pod, self.switch.name) and (not ready or pod_status.is_ready(pod))
        ]

    def off(self, seconds: float) -> list[str]:
        """Labels the node and waits until the pod is gone. The switch has to work."""
        done = self._turn(off=True)
        what = f"{self.node}: {self.switch.name}: its pod is still there"
        wait = Wait(seconds)
        until(lambda: not self.pods(wait=wait), wait, what)
        return [*done, f"{self.switch.name}'s pod is gone"]

    def on(self, seconds: float) -> list[str]:
        """Removes the label and waits until the pod is ready."""
        done = self.allow()
        self.wait_ready(seconds, f"{self.switch.name}: its pod is not ready")
        return [*done, f"{self.switch.name}'s pod is ready"]

    def wait_ready(self, seconds: float, what: str) -> None:
        wait = Wait(seconds)
        until(lambda: bool(self.pods(ready=True, wait=wait)), wait, f"{self.node}: {what}")

    def allow(self) -> list[str]:
        """Removes the label and does not wait."""
        return self._turn(off=False)

    def _turn(self, *, off: bool) -> list[str]:
        patch = self.switch.turn(self._node(), off=off)
        if not patch:
            return []
        try:
            self._api.patch("Node", "", self.node, patch)
        except ApiError:
            # A patch that is sent again after its answer got lost is refused, but the first one has worked.
            if self.switch.turn(self._node(), off=off):
                raise
        label = self.switch.label
        return [
            f"labelled node {self.node} {label}={OFF}" if off else f"removed label {label} from {self.node}"
        ]

    @property
    def is_off(self) -> bool:
        return self.switch.is_off(self._node())

    def _node(self) -> Object:
        found = self._api.get("Node", "", self.node)
        if found is None:
            raise ApiError(f"{self._api.host}: no node {self.node}", 404)
        return found


class Cluster:
    """kube-proxy on the node that is migrated. Methods raise ApiError and WaitError."""

    def __init__(self, api: Api, node: str) -> None:
        self._api = api
        self._daemon = Daemon(api, KUBE_PROXY, node)

    def find(self) -> DaemonSet | None:
        """Returns None where the cluster has no DaemonSet of that name."""
        found = kube_proxy_objects.find(self._api)
        if found is None:
            return None
        return DaemonSet(
            name=f"{KUBE_PROXY.namespace}/{KUBE_PROXY.name}",
            image=found["spec"]["template"]["spec"]["containers"][0].get("image", ""),
            avoids=KUBE_PROXY.works(found),
            labelled=self._daemon.is_off,
            pods=tuple(self._daemon.pods()),
        )

    def configuration(self) -> File | None:
        """Returns the file that kube-proxy is configured by; None where no ConfigMap has it."""
        found = kube_proxy_objects.find(self._api)
        return kube_proxy_objects.configuration(self._api, found) if found is not None else None

    def stop(self, seconds: float) -> list[str]:
        """Keeps kube-proxy from this node, and waits until it is gone."""
        return [*install(self._api, KUBE_PROXY), *self._daemon.off(seconds)]

    def start(self, seconds: float) -> list[str]:
        """Lets kube-proxy come back to this node, and waits until it is ready."""
        return self._daemon.on(seconds)

    def tidy(self) -> list[str]:
        """Restores kube-proxy's DaemonSet once it is back on the last node."""
        return uninstall(self._api, KUBE_PROXY)
