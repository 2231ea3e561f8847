"""What is on this node, and what :mod:`steps` would do; nothing is changed."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import msgspec

from ebpfproxy.datapath.kernel.probe import UnsupportedKernelError, probe
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.api import ApiError
from ebpfproxy.operator.migrate.daemonsets import Cluster, DaemonSet
from ebpfproxy.operator.migrate.node import (
    conntrack_hold,
    iptables,
    ipvs,
    kube_proxy_frontends,
    leftovers,
    nftables,
    obstacles,
    running_kube_proxy,
    takeover,
    tools,
)
from ebpfproxy.operator.migrate.node.leftovers import Leftovers
from ebpfproxy.operator.migrate.node.obstacles import Conflict, Severity
from ebpfproxy.operator.migrate.node.running_kube_proxy import Process
from ebpfproxy.operator.waiting import NODE_SECONDS, Wait


class NodeTarget(msgspec.Struct, frozen=True, kw_only=True):
    """The node to migrate, as options name it. ``cluster`` is None without an API server."""

    bpf_root: Path
    cgroup_root: Path | None = None
    cluster: Cluster | None = None
    seconds: float = 60.0
    #: kube-proxy was stopped after a plan had found no blockers: its rules may be outdated.
    stopped: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy migrate plan``: these names stay."""

    node: str
    kernel: str
    #: kube-proxy's modes, told from what is on the node.
    modes: tuple[str, ...]
    processes: tuple[Process, ...]
    #: The distribution that runs kube-proxy in its own process; empty for none.
    embedded: str
    daemon_set: DaemonSet | None
    #: Numbers of frontends in kube-proxy's rules and in the agent's maps.
    kube_proxy_frontends: int
    agent_frontends: int
    #: Frontends that kube-proxy serves and the maps do not, or with other endpoints, and how they differ.
    differences: dict[str, str]
    #: The number of connections and UDP flows that netfilter translates.
    flows: int
    leftovers: Leftovers
    #: Objects that keep conntrack enabled after an earlier run.
    kept: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    #: The reasons why run would refuse.
    blockers: tuple[str, ...]
    #: The operator should know this before a run.
    warnings: tuple[str, ...]
    #: The steps of a run, and what is left to the operator.
    steps: tuple[str, ...]


_SHOWN = 10
#: kube-proxy may be so much behind: it writes its rules once a second, or as seldom as it takes.
_EQUAL_SECONDS = 10.0


class Brief(msgspec.Struct, frozen=True, kw_only=True):
    """A plan's summary, of bounded length. The JSON of ``migrate plan --brief``."""

    node: str
    kernel: str
    modes: tuple[str, ...]
    #: How each process was started, by pid.
    processes: dict[str, str]
    embedded: str
    kube_proxy_frontends: int
    agent_frontends: int
    differences: int
    #: The first of them.
    differing: dict[str, str]
    flows: int
    #: True if rules, sets or devices of kube-proxy are left.
    has_leftovers: bool
    kept: tuple[str, ...]
    blockers: tuple[str, ...]
    warnings: tuple[str, ...]


def brief(planned: Plan) -> Brief:
    return Brief(
        node=planned.node,
        kernel=planned.kernel,
        modes=planned.modes,
        processes={str(each.pid): each.started_by for each in planned.processes},
        embedded=planned.embedded,
        kube_proxy_frontends=planned.kube_proxy_frontends,
        agent_frontends=planned.agent_frontends,
        differences=len(planned.differences),
        differing=dict(list(planned.differences.items())[:_SHOWN]),
        flows=planned.flows,
        has_leftovers=bool(planned.leftovers),
        kept=planned.kept,
        blockers=planned.blockers,
        warnings=(
            *planned.warnings,
            *(f"{c.what}: {c.advice}" for c in planned.conflicts if c.severity is Severity.WARNS),
        ),
    )


def rules_serve() -> kube_proxy_frontends.Frontends:
    """Returns the frontends of kube-proxy's rules, of all modes. Raises ToolError."""
    found: kube_proxy_frontends.Frontends = {}
    texts = [
        kube_proxy_frontends.of_iptables(tool.saved(), is_ipv6=tool.is_ipv6) for tool in iptables.installed()
    ]
    texts += [
        kube_proxy_frontends.of_nftables(tools.run("nft", "-j", "list", "table", *name.split()))
        for name in nftables.find()
    ]
    texts.append(kube_proxy_frontends.of_ipvs(ipvs.serving()))
    for each in texts:
        for frontend, endpoints in each.items():
            found[frontend] = found.get(frontend, frozenset()) | endpoints
    return found


def _wait_equal(target: NodeTarget) -> None:
    """Waits until the maps have what kube-proxy's rules have: both follow the same changes."""
    for _ in Wait(min(target.seconds, _EQUAL_SECONDS), NODE_SECONDS):
        checked = takeover.check(target.bpf_root)
        rows = checked.rows
        if not checked.starting and (
            not rows or not kube_proxy_frontends.missing(rules_serve(), kube_proxy_frontends.of_maps(rows))
        ):
            return


def plan(target: NodeTarget) -> Plan:
    """Changes nothing. Raises ToolError."""
    if not target.stopped:
        _wait_equal(target)
    facts = obstacles.look(obstacles.bpffs_of(target.bpf_root))
    checked = takeover.check(target.bpf_root)
    found = leftovers.find()
    processes, embedded = running_kube_proxy.find(), running_kube_proxy.embedded()
    theirs, ours = rules_serve(), kube_proxy_frontends.of_maps(checked.rows)
    daemon_set, cluster_problems = None, []
    warnings: list[str] = [problem for each in processes for problem in each.problems]
    if target.cluster is not None:
        try:
            daemon_set = target.cluster.find()
            if file := target.cluster.configuration():
                warnings += running_kube_proxy.check_config(*file)[1]
        except ApiError as error:
            cluster_problems.append(str(error))
    standing = obstacles.find(facts)
    differences = kube_proxy_frontends.missing(theirs, ours)
    if len(processes) > 1:
        warnings.append(f"{len(processes)} kube-proxies run here: each is stopped")
    if found.ipvs:
        carried = sum(server.connections for server in found.ipvs)
        warnings.append(
            f"IPVS: what carries its {carried} connections stays until run is called after they have ended"
        )
        warnings.append(
            "IPVS: for two minutes after the agent's start a new connection fails that takes, by chance, the"
            " port of an earlier one of the same client to the same endpoint"
        )
    warnings += [
        f"{each.tool}, table {table.table}: {kept.chain} stays: {kept.because}"
        for each in found.iptables
        for table in each.tables
        for kept in table.kept
    ]
    blockers = [*_kernel(), *checked.problems, *cluster_problems]
    blockers += [f"{each.what}: {each.advice}" for each in standing if each.severity is Severity.BLOCKS]
    if differences:
        differ = f"{len(differences)} of {len(theirs)} frontends differ between kube-proxy and maps"
        if not processes and (target.stopped or _is_stopped(daemon_set)):
            warnings.append(f"{differ}: kube-proxy is stopped, and its rules are as they were then")
        else:
            blockers.append(differ)
    return Plan(
        node=checked.node,
        kernel=platform.release(),
        modes=found.modes,
        processes=tuple(processes),
        embedded=embedded,
        daemon_set=daemon_set,
        kube_proxy_frontends=len(theirs),
        agent_frontends=len(ours),
        differences=differences,
        flows=len(ctnetlink.find()),
        leftovers=found,
        kept=tuple(conntrack_hold.find()),
        conflicts=tuple(standing),
        blockers=tuple(blockers),
        warnings=tuple(warnings),
        steps=tuple(_steps(target, daemon_set, processes, embedded, found)),
    )


def _is_stopped(daemon_set: DaemonSet | None) -> bool:
    """True if an earlier run, which had compared all frontends, has stopped it."""
    return daemon_set is not None and daemon_set.avoids and daemon_set.labelled and not daemon_set.pods


def _kernel() -> list[str]:
    try:
        probe()
    except UnsupportedKernelError as error:
        return [str(error)]
    return []


def _steps(
    target: NodeTarget,
    daemon_set: DaemonSet | None,
    processes: Iterable[Process],
    embedded: str,
    found: Leftovers,
) -> Iterable[str]:
    if daemon_set is not None and daemon_set.pods:
        if not daemon_set.avoids:
            yield f"give DaemonSet {daemon_set.name} an affinity against labelled nodes (no pod restarts)"
        yield f"label this node, and wait until {', '.join(daemon_set.pods)} is gone"
    else:
        for process in processes:
            yield by_hand(process, asked=target.cluster is not None)
    if embedded:
        yield f"left to you: {embedded} runs kube-proxy itself, restart it with its option to disable it"
    if found.iptables or found.nftables:
        yield "keep conntrack and NAT enabled for established connections"
        yield "remove kube-proxy's chains, tables, sets and counters"
    if found.ipvs or found.ipvs_device:
        yield "remove its virtual servers and device, except those with connections"


def by_hand(process: Process, *, asked: bool) -> str:
    """Says what the operator has to do about a kube-proxy of no DaemonSet."""
    if process.started_by == "pod":
        how = "it is no pod of kube-system's DaemonSet: a static pod?" if asked else "name a --kubeconfig"
        return f"left to you: kube-proxy, pid {process.pid}, runs in a pod: {how}"
    if process.started_by == "process":
        return f"with --terminate: SIGTERM to kube-proxy, pid {process.pid}"
    return f"with --terminate: systemctl disable --now {process.started_by}"
