"""A fleet of nodes whose work pods do as a script says, for tests of `ebpfproxy migrate`."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
from click.testing import CliRunner, Result

from ebpfproxy.cli.migrate import command
from ebpfproxy.operator.migrate.cluster import work_pod
from ebpfproxy.operator.migrate.node.preflight import Brief
from ebpfproxy.operator.migrate.node.steps import WAITS
from tests.lab import waiting
from tests.operator.migrate.control_plane import ControlPlane, Item

NODES = ("node-a", "node-b", "node-c")
BEFORE = Brief(
    node="",
    kernel="6.1",
    modes=("iptables",),
    processes={"7": "pod"},
    embedded="",
    kube_proxy_frontends=20,
    agent_frontends=21,
    differences=0,
    differing={},
    flows=3,
    has_leftovers=True,
    kept=(),
    blockers=(),
    warnings=("something",),
)
AFTER = msgspec.structs.replace(
    BEFORE, modes=(), processes={}, kube_proxy_frontends=0, has_leftovers=False, kept=("table",)
)
READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


class Scripted:
    """Pods of DaemonSets are ready at once; a work pod's command does what the one-node command would do.

    ``instead``: by node and command, a pod's status or (exit code, log) instead of that.
    """

    def __init__(self) -> None:
        self.instead: dict[tuple[str, str], Item | tuple[int, str]] = {}
        #: Nodes that have kube-proxy's rules.
        self.ruled = set(NODES)
        #: Events in order.
        self.log: list[str] = []
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def start(self, pod: Item, plane: ControlPlane) -> None:
        where = pod["spec"]["nodeName"]
        container = pod["spec"]["containers"][0]
        if container["name"] != work_pod.CONTAINER:
            self.log.append(f"{where}: {container['name']} starts")
            if container["name"] == "kube-proxy":
                self.ruled.add(where)
            plane.report(pod, **READY)
            return
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        what = container["args"][0]
        self.log.append(f"{where}: {what}")
        found = self.instead.get((where, what)) or self._do(where, what, pod, plane)
        with self._lock:
            self.at_once -= 1
        if isinstance(found, tuple):
            code, output = found
            plane.logs[pod["metadata"]["name"]] = output
            found = ended(code)
        plane.report(pod, **found)

    def _do(self, where: str, what: str, pod: Item, plane: ControlPlane) -> tuple[int, str]:
        if what == "plan":
            brief = msgspec.structs.replace(BEFORE if where in self.ruled else AFTER, node=where)
            if not plane.pods("kube-proxy", where):
                brief = msgspec.structs.replace(brief, processes={})
            return (
                0,
                f"warning: noise\n{msgspec.json.format(msgspec.json.encode(brief), indent=2).decode()}\n",
            )
        if what == "run":
            assert not plane.pods("kube-proxy", where)
            self.ruled.discard(where)
            return 0, "removed 7 chains\n"
        assert plane.pods("kube-proxy", where)
        if plane.pods("ebpfproxy", where):
            plane.logs[pod["metadata"]["name"]] = f"kube-proxy's rules serve all\n{WAITS}\n"
            plane.report(pod, phase="Running", containerStatuses=[{"state": {"running": {}}}])
            waiting.until(lambda: not plane.pods("ebpfproxy", where))
        return 0, "detached connect4\n"

    def stop(self, pod: Item) -> None:
        name = pod["spec"]["containers"][0]["name"]
        if name != work_pod.CONTAINER:
            self.log.append(f"{pod['spec']['nodeName']}: {name} ends")


def ended(code: int, reason: str = "", message: str = "") -> Item:
    state = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": message}
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "containerStatuses": [{"state": {"terminated": state}}]}


def stuck(reason: str, message: str) -> Item:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"phase": "Pending", "containerStatuses": [{"state": state}]}


class Fleet:
    def __init__(self, url: str, plane: ControlPlane, kubelet: Scripted, folder: Path) -> None:
        self.plane, self.kubelet = plane, kubelet
        self._url = url

    def call(self, *arguments: str, timeout: str = "5s") -> Result:
        return CliRunner().invoke(command, [*arguments, "--master", self._url, "--timeout", timeout])

    def good(self, *arguments: str) -> str:
        result = self.call(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def bad(self, *arguments: str, timeout: str = "5s") -> str:
        result = self.call(*arguments, timeout=timeout)
        assert result.exit_code == 1, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.output

    def happened(self) -> list[str]:
        found, self.kubelet.log = self.kubelet.log, []
        return found

    def work_pods(self) -> list[str]:
        return [name for _, name in self.plane.objects["Pod"] if name.startswith("ebpfproxy-migrate")]


def until_ready(plane: ControlPlane) -> None:
    waiting.until(lambda: all(pod["status"] == READY for pod in list(plane.objects["Pod"].values())))
