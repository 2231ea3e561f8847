"""plan, run and rollback for one node: what is looked at, and what is done in which order.

run: nothing is stopped before the agent serves all that kube-proxy serves, and no rule goes before kube-proxy
has ended: it would write it again. rollback: none of our programs goes before kube-proxy's rules serve all
that the maps serve.
"""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from ebpfproxy.datapath.cleanup import remove_everything
from ebpfproxy.datapath.dump import FrontendRow, open_maps
from ebpfproxy.datapath.packets import begin_nothing
from ebpfproxy.datapath.probe import UnsupportedKernelError, probe
from ebpfproxy.datapath.roots import Lock, pin_folder
from ebpfproxy.migrate import (
    agent,
    conflicts,
    flows,
    frontends,
    iptables,
    keeper,
    kube_proxy,
    leftovers,
    nftables,
    tools,
)
from ebpfproxy.migrate.cluster import Cluster, ClusterError, DaemonSet
from ebpfproxy.migrate.conflicts import Conflict, Severity
from ebpfproxy.migrate.kube_proxy import Process
from ebpfproxy.migrate.leftovers import Leftovers

Say = Callable[[str], None]
_POLL_SECONDS = 0.25
_NODE_PORT = "NodePort"


class MigrationError(Exception):
    """It cannot go on; the message says why, and what was done is still right."""


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """This node, as options name it. ``cluster`` is None where no API server is to be asked."""

    bpf_root: Path
    cgroup_root: Path | None = None
    cluster: Cluster | None = None
    seconds: float = 60.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of ``ebpfproxy migrate plan``: these names stay."""

    node: str
    kernel: str
    #: kube-proxy's modes by what is on the node.
    modes: tuple[str, ...]
    processes: tuple[Process, ...]
    #: A distribution that runs kube-proxy in its own process.
    embedded: str
    daemon_set: DaemonSet | None
    #: How many frontends kube-proxy's rules and the agent's maps have.
    kube_proxy_frontends: int
    agent_frontends: int
    #: By frontend: what kube-proxy serves and the maps do not.
    differences: dict[str, str]
    #: Connections and UDP flows that live on by netfilter's conntrack.
    flows: int
    leftovers: Leftovers
    #: What keeps conntrack going after an earlier run.
    kept: tuple[str, ...]
    conflicts: tuple[Conflict, ...]
    #: Why run would refuse.
    blockers: tuple[str, ...]
    #: What is worth knowing before.
    warnings: tuple[str, ...]
    #: What run would do, and what it leaves to you.
    steps: tuple[str, ...]


# -- looking


def rules_serve() -> frontends.Frontends:
    """What kube-proxy's rules of all kinds serve here. Raises ToolError."""
    found: frontends.Frontends = {}
    texts = [frontends.of_iptables(tool.saved()) for tool in iptables.installed()]
    texts += [
        frontends.of_nftables(tools.run("nft", "-j", "list", "table", *name.split()))
        for name in nftables.find()
    ]
    for each in texts:
        for frontend, endpoints in each.items():
            found[frontend] = found.get(frontend, frozenset()) | endpoints
    return found


def plan(where: Where) -> Plan:
    """Looks only. Raises ToolError."""
    facts = conflicts.look()
    checked = agent.check(where.bpf_root)
    found = leftovers.find()
    processes, embedded = kube_proxy.find(), kube_proxy.embedded()
    theirs, ours = rules_serve(), frontends.of_maps(checked.rows)
    daemon_set, cluster_problems = None, []
    warnings: list[str] = [problem for each in processes for problem in each.problems]
    if where.cluster is not None:
        try:
            daemon_set = where.cluster.find()
            if config := where.cluster.config():
                _, problems = kube_proxy.check_config(config, "ConfigMap kube-system/kube-proxy")
                warnings += problems
        except ClusterError as error:
            cluster_problems.append(str(error))
    cluster_ips = {row.frontend.rpartition(":")[0].strip("[]") for row in checked.rows}
    standing = conflicts.find(facts, cluster_ips)
    differences = frontends.missing(theirs, ours)
    if len(processes) > 1:
        warnings.append(f"{len(processes)} kube-proxies run here: each is stopped")
    if found.ipvs:
        active = sum(server.active for server in found.ipvs)
        warnings.append(
            f"IPVS: its {active} open connections end with its virtual servers; those of iptables live on"
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
        blockers.append(f"{len(differences)} of {len(theirs)} frontends differ between kube-proxy and maps")
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
        flows=len(flows.find()),
        leftovers=found,
        kept=tuple(keeper.find()),
        conflicts=tuple(standing),
        blockers=tuple(blockers),
        warnings=tuple(warnings),
        steps=tuple(_steps(where, daemon_set, processes, embedded, found)),
    )


def _kernel() -> list[str]:
    try:
        probe()
    except UnsupportedKernelError as error:
        return [str(error)]
    return []


def _steps(
    where: Where,
    daemon_set: DaemonSet | None,
    processes: Iterable[Process],
    embedded: str,
    found: Leftovers,
) -> Iterable[str]:
    if daemon_set is not None and daemon_set.pods:
        if not daemon_set.avoids:
            yield f"give DaemonSet {daemon_set.name} an affinity against labelled nodes (its pods restart)"
        yield f"label this node, and wait until {', '.join(daemon_set.pods)} is gone"
    else:
        for process in processes:
            yield by_hand(process, asked=where.cluster is not None)
    if embedded:
        yield f"left to you: {embedded} runs kube-proxy itself, restart it with its option to disable it"
    if found.iptables or found.nftables:
        yield "keep conntrack and NAT going for connections that live on"
        yield "remove kube-proxy's chains, tables, sets and counters"
    if found.ipvs or found.ipvs_device:
        yield "remove its virtual servers and device"


def by_hand(process: Process, *, asked: bool) -> str:
    """What is left to the operator for a kube-proxy that no DaemonSet of the API server explains."""
    if process.started_by == "pod":
        how = "it is no pod of kube-system's DaemonSet: a static pod?" if asked else "name a --kubeconfig"
        return f"left to you: kube-proxy, pid {process.pid}, runs in a pod: {how}"
    if process.started_by == "process":
        return f"with --terminate: SIGTERM to kube-proxy, pid {process.pid}"
    return f"with --terminate: systemctl disable --now {process.started_by}"


# -- going over


def run(where: Where, say: Say, *, terminate: bool = False, force: bool = False) -> None:
    """Raises MigrationError and ToolError."""
    _wait_equal(where)
    planned = plan(where)
    if planned.blockers and not force:
        raise MigrationError("; ".join(planned.blockers))
    if planned.kube_proxy_frontends:
        say(f"the agent's maps serve all {planned.kube_proxy_frontends} frontends of kube-proxy's rules")
    _stop(where, planned, say, terminate=terminate)
    before = leftovers.find()
    if not before:
        say("nothing of kube-proxy is left")
        end_keeper(say)
        return
    remove_leftovers(before, say)
    ended = flows.remove(stale_datagrams(agent.check(where.bpf_root).rows))
    if ended:
        say(f"ended {ended} UDP flows to endpoints that are not their Service's any more")
    living = len(flows.find())
    say(f"flows that kube-proxy began and that live on: {living}")


def _wait_equal(where: Where) -> None:
    """Both follow the same changes, one a moment after the other."""
    deadline = time.monotonic() + min(where.seconds, 10.0)
    while time.monotonic() < deadline:
        rows = agent.check(where.bpf_root).rows
        if not rows or not frontends.missing(rules_serve(), frontends.of_maps(rows)):
            return
        time.sleep(_POLL_SECONDS)


def _stop(where: Where, planned: Plan, say: Say, *, terminate: bool) -> None:
    if planned.embedded:
        raise MigrationError(f"{planned.embedded} runs kube-proxy in its own process: disable it there first")
    if where.cluster is not None and planned.daemon_set is not None:
        try:
            for line in where.cluster.stop(where.seconds):
                say(line)
        except ClusterError as error:
            raise MigrationError(str(error)) from error
        kube_proxy.wait_gone(where.seconds)
    for process in kube_proxy.find():
        if process.started_by == "pod" or not terminate:
            raise MigrationError(by_hand(process, asked=where.cluster is not None))
        if process.started_by != "process":
            tools.run("systemctl", "disable", "--now", process.started_by)
            say(f"stopped and disabled {process.started_by}")
        elif not kube_proxy.end(process, where.seconds):
            raise MigrationError(f"kube-proxy, pid {process.pid}, did not end in {where.seconds:g} s")
        else:
            say(f"kube-proxy, pid {process.pid}, ended by SIGTERM")
    if not kube_proxy.wait_gone(where.seconds):
        raise MigrationError("kube-proxy still runs: its rules would come back")


def remove_leftovers(found: Leftovers, say: Say) -> None:
    """And looks again. Raises MigrationError and ToolError."""
    removed = leftovers.remove(found)
    for line in removed.done:
        say(line)
    if removed.failed:
        raise MigrationError("; ".join(removed.failed))
    if again := leftovers.find():
        raise MigrationError(f"rules of kube-proxy are there again ({', '.join(again.modes)}): it still runs")


def end_keeper(say: Say) -> None:
    """Once no flow of kube-proxy's lives."""
    kept = keeper.find()
    if not kept:
        return
    if living := len(flows.find()):
        say(f"{living} translated flows still live: {', '.join(kept)} stays, run this again later")
        return
    for each in keeper.end():
        say(f"no flow of kube-proxy's lives any more: removed {each}")


def stale_datagrams(rows: Iterable[FrontendRow]) -> Callable[[flows.Flow], bool]:
    """Of UDP flows through these frontends, those whose endpoint is not the Service's.

    kube-proxy ends them at each sync (pkg/proxy/conntrack/cleanup.go); from now on nobody would. A frontend
    without endpoints ends none.
    """
    by_address: dict[tuple[str, int], set[str]] = {}
    by_port: dict[int, set[str]] = {}
    for row in rows:
        address, _, port = row.frontend.removesuffix("/UDP").rpartition(":")
        if row.frontend.endswith("/UDP") and row.backends:
            served = {backend.address for backend in row.backends}
            if row.type == _NODE_PORT:
                by_port.setdefault(int(port), set()).update(served)
            else:
                by_address.setdefault((address.strip("[]"), int(port)), set()).update(served)

    def is_stale(flow: flows.Flow) -> bool:
        if flow.protocol != socket.IPPROTO_UDP:
            return False
        serving = by_address.get(flow.asked) or by_port.get(flow.asked[1])
        host, port = flow.answering
        return (
            serving is not None and (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") not in serving
        )

    return is_stale


# -- going back


def rollback(where: Where, say: Say, *, drain: float = 0.0) -> None:
    """``drain``: how many seconds connections may take to end that packets' programs translate.

    Raises MigrationError, ToolError, RootError while our agent runs.
    """
    if where.cluster is not None:
        try:
            for line in where.cluster.start(where.seconds):
                say(line)
        except ClusterError as error:
            raise MigrationError(str(error)) from error
    checked = agent.check(where.bpf_root)
    serving = _wait_rules(checked.rows, where.seconds)
    say(f"kube-proxy's rules serve all {serving} frontends of the maps")
    pins = pin_folder(where.bpf_root)
    if not pins.is_dir():
        say(f"nothing is pinned below {pins}")
    else:
        _remove_programs(where, pins, drain, say)
    # kube-proxy's rules ask for conntrack again.
    for each in keeper.end():
        say(f"removed {each}")


def _wait_rules(rows: Iterable[FrontendRow], seconds: float) -> int:
    """Until rules serve every frontend of the maps; how many there are."""
    ours = frontends.of_maps(rows)
    deadline = time.monotonic() + seconds
    while True:
        theirs = rules_serve()
        lacking = frontends.unserved(ours, theirs)
        if theirs and not lacking:
            return len(ours)
        if time.monotonic() >= deadline:
            first = next(iter(lacking), "any")
            raise MigrationError(
                f"kube-proxy's rules do not serve {first} ({len(lacking)} of {len(ours)} frontends): start"
                " kube-proxy, then call this again; our programs stay"
            )
        time.sleep(_POLL_SECONDS)


def _remove_programs(where: Where, pins: Path, drain: float, say: Say) -> None:
    folders = [("--bpf-root", where.bpf_root)]
    if where.cgroup_root is not None and where.cgroup_root.is_dir():
        folders.append(("--cgroup-root", where.cgroup_root))
    lock = Lock(folders)
    try:
        maps = open_maps(where.bpf_root)
        begin_nothing(maps)
        deadline = time.monotonic() + drain
        while (living := agent.forget_ended(maps)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if living:
            say(f"{living} connections that were translated in packets, not at a socket, end now")
        for line in remove_everything(pins):
            say(line)
    finally:
        lock.release()
