"""plan, run and rollback of many nodes: requests are sent from here, the rest runs in pods.

No pod gets credentials of the API, and no two steps of one node overlap. Whatever fails, a node is left with
an agent or a kube-proxy that serves it; calling again goes on from what labels and the node itself say.
"""

from __future__ import annotations

import contextlib
import enum
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from ebpfproxy.operator import kube_proxy_objects, printing
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.migrate import daemonsets
from ebpfproxy.operator.migrate.cluster.jobs import Done, JobError, Jobs
from ebpfproxy.operator.migrate.cluster.selection import Node
from ebpfproxy.operator.migrate.daemonsets import Daemon
from ebpfproxy.operator.migrate.node import running_kube_proxy
from ebpfproxy.operator.migrate.node.preflight import Brief
from ebpfproxy.operator.migrate.node.steps import WAITS
from ebpfproxy.operator.migrate.switches import AGENT, KUBE_PROXY, Switch, owner
from ebpfproxy.operator.names import KUBEADM_CONFIG, SYSTEM
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.waiting import WaitError

#: How many pods plan at the same time.
AT_ONCE = 10
#: A run on a node with very many rules may take as long.
_RUN_SECONDS = 600.0

FOR_GOOD = (
    "left to you, once no node is to go back: kubectl -n kube-system delete daemonset/kube-proxy"
    " configmap/kube-proxy"
)


class State(enum.StrEnum):
    """What is to be done on a node."""

    TODO = "to do"
    DONE = "done"
    BLOCKED = "blocked"
    NOT_READY = "not ready"
    UNKNOWN = "unknown"


class NodePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One node's plan. The JSON of ``migrate plan --all-nodes``: these names stay."""

    node: str
    state: State
    #: The reasons why it is not to be migrated, or why its state is not known.
    blockers: tuple[str, ...] = ()
    #: It is None where no pod has planned.
    found: Brief | None = None


class ClusterPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``migrate plan --all-nodes``: these names stay."""

    nodes: tuple[NodePlan, ...]
    warnings: tuple[str, ...]
    steps: tuple[str, ...]

    def those(self, *states: State) -> list[NodePlan]:
        return [each for each in self.nodes if each.state in states]


class FleetError(Exception):
    """It stopped; the message says at which node, why, and what to do."""


#: These end the work on one node.
_FAILED = (ApiError, WaitError, JobError, FleetError)


class Fleet:
    """Works on the nodes that were chosen."""

    def __init__(
        self, api: Api, jobs: Jobs, nodes: Iterable[Node], seconds: float, agent: Switch = AGENT
    ) -> None:
        """``seconds`` bound each wait; ``agent`` is our DaemonSet."""
        self._api, self._jobs, self._nodes, self._seconds = api, jobs, list(nodes), seconds
        self._agent = agent

    # -- plan

    def plan(self) -> ClusterPlan:
        """Changes nothing. Raises ApiError."""
        warnings = self._warnings()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                nodes = tuple(pool.map(self._plan_node, self._nodes))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
        return ClusterPlan(nodes=nodes, warnings=tuple(warnings), steps=tuple(_steps(nodes)))

    def _warnings(self) -> Iterable[str]:
        found = []
        daemon_set = kube_proxy_objects.find(self._api)
        if daemon_set is None:
            return [f"there is no {KUBE_PROXY}: what runs kube-proxy elsewhere is yours to stop"]
        if who := owner(daemon_set):
            found.append(
                f"{KUBE_PROXY} seems to be {who}'s, which may write it back: kube-proxy would return to all"
                f" nodes. Give it the affinity there: {KUBE_PROXY.label} NotIn [off]"
            )
        if self._api.get("ConfigMap", SYSTEM, KUBEADM_CONFIG):
            found.append(
                "kubeadm upgrade writes kube-proxy's DaemonSet anew: from 1.32 on call it with"
                " --skip-phases=addon/kube-proxy, before finish this first (it leaves alone what has no"
                " ConfigMap kube-proxy)"
            )
        if file := kube_proxy_objects.configuration(self._api, daemon_set):
            found += running_kube_proxy.check_config(*file)[1]
        return found

    def _plan_node(self, node: Node) -> NodePlan:
        """Never raises: a failure of one node must not end the plan of others."""
        if not node.ready:
            return NodePlan(node=node.name, state=State.NOT_READY, blockers=("the node is not Ready",))
        arguments = ["plan", "--brief", "-o", "json", *(["--stopped"] if node.kube_proxy_off else [])]
        try:
            done = self._jobs.run(node.name, arguments, most=self._seconds, good=(0, 1))
            found = brief_of(done)
            pods = Daemon(self._api, KUBE_PROXY, node.name).pods()
        except _FAILED as error:
            return NodePlan(node=node.name, state=State.UNKNOWN, blockers=(str(error),))
        return judge(node, found, pods)

    # -- run

    def run(self, say: Say, *, parallel: int, skip_blocked: bool) -> None:
        """Raises ApiError, WaitError and FleetError."""
        if self._has(self._agent):
            self._nodes = [self._with_agent(node, say) for node in self._nodes]
        planned = self.plan()
        bad = planned.those(State.BLOCKED, State.UNKNOWN)
        for each in [*bad, *planned.those(State.NOT_READY)]:
            say(f"{each.node}: {each.state}: {'; '.join(each.blockers)}")
        if bad and not skip_blocked:
            raise FleetError(
                f"{len(bad)} of {len(planned.nodes)} nodes are blocked: nothing was changed. Resolve their"
                " blockers, name other nodes with --node, or leave these out with --skip-blocked"
            )
        for each in planned.those(State.DONE):
            say(f"{each.node}: done already")
        wanted = {each.node for each in planned.those(State.TODO)}
        todo = [node for node in self._nodes if node.name in wanted]
        if todo and self._has(KUBE_PROXY):
            printing.each(daemonsets.install(self._api, KUBE_PROXY), say)
        self._each(todo, self._run_node, say, parallel)
        if todo and self._has(self._agent):
            printing.each(daemonsets.uninstall(self._api, self._agent), say)
        self._report(planned, len(todo), say)

    def _report(self, planned: ClusterPlan, count: int, say: Say) -> None:
        left = len(planned.nodes) - len(planned.those(State.DONE)) - count
        if left:
            raise FleetError(f"{left} nodes were left unchanged: see above")
        say(f"all {len(planned.nodes)} chosen nodes are without kube-proxy")
        if self._has(KUBE_PROXY) and all(map(KUBE_PROXY.is_off, self._api.list("Node", ""))):
            say(FOR_GOOD)

    def _with_agent(self, node: Node, say: Say) -> Node:
        """Brings the agent back first, after a rollback."""
        if not node.agent_off or not node.ready:
            return node
        for line in Daemon(self._api, self._agent, node.name).on(self._seconds):
            say(f"{node.name}: {line}")
        return msgspec.structs.replace(node, agent_off=False)

    def _run_node(self, node: Node, say: Say) -> None:
        # The node may have changed since all nodes were planned.
        planned = self._plan_node(node)
        if planned.state is State.DONE:
            return
        if planned.state is not State.TODO:
            raise FleetError(f"left unchanged: {'; '.join(planned.blockers)}")
        if self._has(KUBE_PROXY):
            self._check_switch()
            printing.each(Daemon(self._api, KUBE_PROXY, node.name).off(self._seconds), say)
        try:
            done = self._jobs.run(node.name, ["run", "--stopped"], most=_RUN_SECONDS)
            printing.each(done.lines, say)
            if self._has(self._agent):
                agent = Daemon(self._api, self._agent, node.name)
                agent.wait_ready(self._seconds, "the agent's pod is not ready")
        except _FAILED as error:
            raise FleetError(
                f"{error}. kube-proxy is stopped there, and the agent serves what it served: call this again,"
                f" or migrate rollback --node {node.name}"
            ) from error

    def _check_switch(self) -> None:
        daemon_set = kube_proxy_objects.find(self._api)
        if daemon_set is None or not KUBE_PROXY.works(daemon_set):
            raise FleetError(
                f"{KUBE_PROXY} has lost its affinity: somebody writes it back, and kube-proxy returns to"
                f" nodes. Give it there: {KUBE_PROXY.label} NotIn [off]"
            )

    # -- rollback

    def rollback(self, say: Say, *, parallel: int, drain: float) -> None:
        """Raises ApiError, WaitError and FleetError."""
        absent = [node for node in self._nodes if not node.ready]
        for node in absent:
            say(f"{node.name}: {State.NOT_READY}: left unchanged")
        if not self._has(KUBE_PROXY):
            raise FleetError(
                f"there is no {KUBE_PROXY} to come back: kubeadm init phase addon kube-proxy, or your"
                " distribution, makes one"
            )
        if self._has(self._agent):
            printing.each(daemonsets.install(self._api, self._agent), say)

        def one(node: Node, say: Say) -> None:
            self._rollback_node(node, say, drain)

        self._each([node for node in self._nodes if node.ready], one, say, parallel)
        printing.each(daemonsets.uninstall(self._api, KUBE_PROXY), say)
        if absent:
            raise FleetError(f"{len(absent)} nodes were left unchanged: see above")
        say(f"kube-proxy serves all {len(self._nodes)} nodes")

    def _rollback_node(self, node: Node, say: Say, drain: float) -> None:
        printing.each(Daemon(self._api, KUBE_PROXY, node.name).on(self._seconds), say)
        agent = Daemon(self._api, self._agent, node.name)
        has_agent = self._has(self._agent)
        # An agent that works goes last: once the pod has found that kube-proxy's rules serve everything.
        waits = has_agent and bool(agent.pods(ready=True))
        left = threading.Event()

        def leave(log: str = WAITS) -> None:
            if WAITS in log and not left.is_set():
                left.set()
                printing.each(agent.off(self._seconds), say)

        if has_agent and not waits:
            leave()
        arguments = ["rollback", "--wait-for-agent", "--drain", f"{drain:g}s"]
        try:
            done = self._jobs.run(
                node.name, arguments, most=_RUN_SECONDS + drain, looks=leave if waits else None
            )
            if waits and not left.is_set():
                # The agent had ended by itself: programs may have come back since.
                leave()
                done = self._jobs.run(node.name, arguments, most=_RUN_SECONDS + drain)
        except _FAILED as error:
            if has_agent:
                # The agent goes on beside kube-proxy: its programs must not stay without it.
                with contextlib.suppress(ApiError):
                    agent.allow()
            raise FleetError(
                f"{error}. kube-proxy runs there again, and the agent goes on beside it: call this again"
            ) from error
        printing.each(done.lines, say)

    # -- all

    def _has(self, switch: Switch) -> bool:
        return daemonsets.find(self._api, switch) is not None

    def _each(self, nodes: list[Node], do: Callable[[Node, Say], None], say: Say, parallel: int) -> None:
        """Works on so many at once. After a failure or an interrupt, no further node begins.

        Raises FleetError.
        """
        stop, lock = threading.Event(), threading.Lock()
        failed: list[str] = []
        done: list[str] = []

        def one(node: Node) -> None:
            if stop.is_set():
                return
            try:
                do(node, printing.prefixed(say, f"{node.name}: ", lock))
                done.append(node.name)
            except _FAILED as error:
                stop.set()
                failed.append(f"{node.name}: {str(error).removeprefix(f'{node.name}: ')}")

        with ThreadPoolExecutor(parallel) as pool:
            try:
                for _ in pool.map(one, nodes):
                    pass
            except KeyboardInterrupt:
                stop.set()
                failed.append("interrupted")
        if failed:
            raise FleetError(
                "\n".join([*failed, f"done: {len(done)} of {len(nodes)} nodes; called again, it goes on"])
            )


def brief_of(done: Done) -> Brief:
    """Reads the plan that a command has printed, after warnings of libraries perhaps. Raises JobError."""
    at = done.text.find("{\n")
    try:
        found, _ = json.JSONDecoder().raw_decode(done.text[at:] if at >= 0 else "")
    except (ValueError, RecursionError) as error:
        raise JobError(done.words) from error
    try:
        return msgspec.convert(found, Brief)
    except ValueError as error:
        raise JobError(f"its image has another version of ebpfproxy: {error}") from error


def judge(node: Node, found: Brief, pods: Iterable[str]) -> NodePlan:
    """``pods`` are kube-proxy's on the node."""
    pods = list(pods)
    if node.agent_off:
        words = ("the agent is switched off here since a rollback: run brings it back first",)
        return NodePlan(node=node.name, state=State.TODO, blockers=words, found=found)
    blockers = list(found.blockers)
    if found.embedded:
        blockers.append(f"{found.embedded} runs kube-proxy in its own process: disable it there")
    if not pods:
        blockers += [
            f"kube-proxy, pid {pid}, is not of {KUBE_PROXY}: it is yours to stop, started by: {how}"
            for pid, how in found.processes.items()
        ]
    if blockers:
        state = State.BLOCKED
    elif pods or found.has_leftovers or (found.kept and not found.flows):
        state = State.TODO
    else:
        state = State.DONE
    return NodePlan(node=node.name, state=state, blockers=tuple(blockers), found=found)


def _steps(nodes: Iterable[NodePlan]) -> Iterable[str]:
    if any(each.state is State.TODO for each in nodes):
        yield f"give {KUBE_PROXY} an affinity against nodes with {KUBE_PROXY.label}=off (no pod restarts)"
        yield "on one node after the other: label it, wait until kube-proxy's pod is gone, remove its rules"
    if any(each.state in (State.TODO, State.DONE) for each in nodes):
        yield FOR_GOOD
