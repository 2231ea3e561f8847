"""kube-proxy's DaemonSet, and ours: their pods on one node, switched off and on by labels of the node."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec

from ebpfproxy.operator.migrate.api import Api, ClusterError, NotFoundError, Object, Patch
from ebpfproxy.operator.migrate.switches import KUBE_PROXY, OFF, Switch, is_ready

_POLL_SECONDS = 0.5
#: Of a patch, where somebody else changes the same object.
_TRIES = 5
_CHANGED = frozenset({409, 422})


class DaemonSet(msgspec.Struct, frozen=True, kw_only=True):
    """What of kube-proxy's DaemonSet matters here."""

    name: str
    image: str
    #: Kept away from nodes with the label already.
    avoids: bool
    #: Of this node: it has the label.
    labelled: bool
    #: kube-proxy pods on this node, by name.
    pods: tuple[str, ...]


def install(api: Api, switch: Switch) -> list[str]:
    """Makes the switch work on all nodes; says what was done. Restarts no pod. Raises ClusterError."""
    if _change(api, switch, switch.install):
        return [
            f"gave {switch} an affinity against nodes with {switch.label}={OFF}, and updateStrategy OnDelete:"
            " no pod restarts for it"
        ]
    return []


def uninstall(api: Api, switch: Switch) -> list[str]:
    """Takes that back where no node has the label any more. Raises ClusterError."""
    if any(switch.is_off(node) for node in api.nodes()):
        return []
    with contextlib.suppress(NotFoundError):
        if _change(api, switch, switch.uninstall):
            return [f"{switch} is as it was: pods that were made meanwhile restart"]
    return []


def _change(api: Api, switch: Switch, make: Callable[[Object], Patch]) -> bool:
    for left in reversed(range(_TRIES)):
        patch = make(api.daemon_set(switch.namespace, switch.name))
        if not patch:
            return False
        try:
            api.patch_daemon_set(switch.namespace, switch.name, patch)
        except ClusterError as error:
            if not left or error.status not in _CHANGED:
                raise
        else:
            return True
    raise AssertionError("unreachable")


class Daemon:
    """A DaemonSet's pod on one node. Methods raise ClusterError."""

    def __init__(self, api: Api, switch: Switch, node: str) -> None:
        self._api, self.switch, self.node = api, switch, node

    def pods(self, *, ready: bool = False) -> list[str]:
        """By name; one that is about to end is there, and not ready."""
        return [
            pod["metadata"]["name"]
            for pod in self._api.pods(self.switch.namespace, self.node)
            if self.switch.owns(pod) and (not ready or is_ready(pod))
        ]

    def off(self, seconds: float) -> list[str]:
        """Labels the node and waits until the pod is gone. The switch has to work."""
        done = self._turn(off=True)
        wait(lambda: not self.pods(), seconds, f"{self.node}: {self.switch.name}: its pod is still there")
        return [*done, f"{self.switch.name}'s pod is gone"]

    def on(self, seconds: float) -> list[str]:
        """Takes the label away and waits until the pod is ready."""
        done = self.allow()
        wait(
            lambda: bool(self.pods(ready=True)),
            seconds,
            f"{self.node}: {self.switch.name}: its pod is not ready",
        )
        return [*done, f"{self.switch.name}'s pod is ready"]

    def allow(self) -> list[str]:
        """Takes the label away and waits for nothing."""
        return self._turn(off=False)

    def _turn(self, *, off: bool) -> list[str]:
        patch = self.switch.turn(self._node(), off=off)
        if not patch:
            return []
        try:
            self._api.patch_node(self.node, patch)
        except ClusterError:
            # Sent again after an answer that got lost, it is refused: what it was to do is done.
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
        try:
            return self._api.node(self.node)
        except NotFoundError as error:
            raise ClusterError(f"{self._api.host}: no node {self.node}") from error


def wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises ClusterError with ``what`` where it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            raise ClusterError(f"{what} after {seconds:g} s")
        time.sleep(_POLL_SECONDS)


class Cluster:
    """kube-proxy on the node that is migrated. Methods raise ClusterError."""

    def __init__(self, api: Api, node: str) -> None:
        self._api = api
        self._daemon = Daemon(api, KUBE_PROXY, node)

    def find(self) -> DaemonSet | None:
        """None where the cluster has no DaemonSet of that name."""
        try:
            found = self._api.daemon_set(KUBE_PROXY.namespace, KUBE_PROXY.name)
        except NotFoundError:
            return None
        return DaemonSet(
            name=f"{KUBE_PROXY.namespace}/{KUBE_PROXY.name}",
            image=found["spec"]["template"]["spec"]["containers"][0].get("image", ""),
            avoids=KUBE_PROXY.works(found),
            labelled=self._daemon.is_off,
            pods=tuple(self._daemon.pods()),
        )

    def config(self) -> str:
        """The configuration that kubeadm gives kube-proxy; empty without one."""
        return config(self._api)

    def stop(self, seconds: float) -> list[str]:
        """Keeps kube-proxy from this node, and waits until it is gone."""
        return [*install(self._api, KUBE_PROXY), *self._daemon.off(seconds)]

    def start(self, seconds: float) -> list[str]:
        """Lets kube-proxy come back to this node, and waits until it is ready."""
        return self._daemon.on(seconds)

    def tidy(self) -> list[str]:
        """Once kube-proxy is back: its DaemonSet as it was, if this was the last node."""
        return uninstall(self._api, KUBE_PROXY)


def config(api: Api) -> str:
    """kubeadm's, of kube-proxy. Raises ClusterError."""
    return api.config_map(KUBE_PROXY.namespace, KUBE_PROXY.name).get("config.conf", "")
