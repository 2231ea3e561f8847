"""run and rollback for one node: the steps, in an order in which Services are always served.

run: nothing is stopped before the agent serves all that kube-proxy serves, and no rule goes before kube-proxy
has ended: it would write it again. rollback: none of our programs goes before kube-proxy's rules serve all
that the maps serve.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ebpfproxy.datapath.dump import FrontendRow
from ebpfproxy.datapath.kernel.roots import Lock, RootError, is_locked, pin_folder
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator import printing
from ebpfproxy.operator.api import ApiError
from ebpfproxy.operator.migrate.node import (
    conntrack_hold,
    kube_proxy_frontends,
    leftovers,
    running_kube_proxy,
    takeover,
    tools,
)
from ebpfproxy.operator.migrate.node.leftovers import Leftovers
from ebpfproxy.operator.migrate.node.preflight import NodeTarget, Plan, by_hand, plan, rules_serve
from ebpfproxy.operator.migrate.node.removal import remove_programs
from ebpfproxy.operator.printing import Say
from ebpfproxy.operator.waiting import NODE_SECONDS, Wait, WaitError, until

_NODE_PORT = "NodePort"


class MigrationError(Exception):
    """It cannot go on; the message says why. What was done so far is consistent."""


# -- run


def run(target: NodeTarget, say: Say, *, terminate: bool = False, force: bool = False) -> None:
    """Raises MigrationError and ToolError."""
    planned = plan(target)
    if planned.blockers and not force:
        raise MigrationError("; ".join(planned.blockers))
    if planned.kube_proxy_frontends and not planned.differences:
        say(f"the agent's maps serve all {planned.kube_proxy_frontends} frontends of kube-proxy's rules")
    _stop(target, planned, say, terminate=terminate)
    before = leftovers.find()
    if not before:
        say("nothing of kube-proxy is left")
        release_conntrack_hold(say)
        return
    remove_leftovers(before, say)
    checked = takeover.check(target.bpf_root)
    if checked.problems and not force:
        raise MigrationError(f"kube-proxy's rules are removed, but {'; '.join(checked.problems)}")
    ended = ctnetlink.remove(stale_datagrams(checked.rows))
    if ended:
        say(f"ended {ended} UDP flows to endpoints that their Services no longer have")
    living = len(ctnetlink.find())
    say(f"established flows of kube-proxy, left to netfilter: {living}")


def _stop(target: NodeTarget, planned: Plan, say: Say, *, terminate: bool) -> None:
    if planned.embedded:
        raise MigrationError(f"{planned.embedded} runs kube-proxy in its own process: disable it there first")
    if target.cluster is not None and planned.daemon_set is not None:
        with _as_migration():
            printing.each(target.cluster.stop(target.seconds), say)
        running_kube_proxy.wait_gone(target.seconds)
    for process in running_kube_proxy.find():
        if process.started_by == "pod" or not terminate:
            raise MigrationError(by_hand(process, asked=target.cluster is not None))
        if process.started_by != "process":
            tools.run("systemctl", "disable", "--now", process.started_by)
            say(f"stopped and disabled {process.started_by}")
        elif not running_kube_proxy.end(process, target.seconds):
            raise MigrationError(f"kube-proxy, pid {process.pid}, did not end in {target.seconds:g} s")
        else:
            say(f"kube-proxy, pid {process.pid}, ended by SIGTERM")
    if not running_kube_proxy.wait_gone(target.seconds):
        raise MigrationError("kube-proxy still runs: its rules would come back")


def remove_leftovers(found: Leftovers, say: Say) -> None:
    """Removes them, and checks that none is back. Raises MigrationError and ToolError."""
    removed = leftovers.remove(found)
    printing.each(removed.done, say)
    if removed.failed:
        raise MigrationError("; ".join(removed.failed))
    if again := leftovers.find():
        raise MigrationError(f"kube-proxy's rules are back ({', '.join(again.modes)}): it still runs")


def release_conntrack_hold(say: Say) -> None:
    """Removes what keeps conntrack enabled, once no flow of kube-proxy is left."""
    kept = conntrack_hold.find()
    if not kept:
        return
    if living := len(ctnetlink.find()):
        say(f"{living} translated flows are still established: {', '.join(kept)} stays, run this again later")
        return
    for each in conntrack_hold.end():
        say(f"no flow of kube-proxy is left: removed {each}")


def stale_datagrams(rows: Iterable[FrontendRow]) -> Callable[[ctnetlink.Flow], bool]:
    """Returns a test for UDP flows through these frontends whose endpoint is not the Service's any more.

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

    def is_stale(flow: ctnetlink.Flow) -> bool:
        if flow.protocol != socket.IPPROTO_UDP:
            return False
        serving = by_address.get(flow.asked) or by_port.get(flow.asked[1])
        host, port = flow.answering
        return (
            serving is not None and (f"[{host}]:{port}" if ":" in host else f"{host}:{port}") not in serving
        )

    return is_stale


# -- rollback


#: Rollback prints this line when only the running agent keeps it waiting; ``fleet`` looks for it.
WAITS = "waiting for the agent to end"


def rollback(target: NodeTarget, say: Say, *, drain: float = 0.0, waits: bool = False) -> None:
    """Connections that packet programs translate may take ``drain`` seconds to end. ``waits``: for the agent
    to end, once kube-proxy's rules serve all.

    Raises MigrationError, ToolError, and RootError while our agent runs.
    """
    if target.cluster is not None:
        with _as_migration():
            printing.each(target.cluster.start(target.seconds), say)
    pins = pin_folder(target.bpf_root)
    _say_served(target, say)
    if waits and pins.is_dir():
        _wait_agent(target, say)
        # Services may have changed since: both followed the same changes.
        _say_served(target, say)
    if not pins.is_dir():
        say(f"nothing is pinned below {pins}")
    else:
        _remove_programs(target, drain, say)
    # kube-proxy's rules enable conntrack again.
    for each in conntrack_hold.end():
        say(f"removed {each}")
    if target.cluster is not None:
        with _as_migration():
            printing.each(target.cluster.tidy(), say)


@contextmanager
def _as_migration() -> Iterator[None]:
    try:
        yield
    except (ApiError, WaitError) as error:
        raise MigrationError(str(error)) from error


def _wait_agent(target: NodeTarget, say: Say) -> None:
    if not is_locked(target.bpf_root):
        return
    say(WAITS)
    try:
        until(
            lambda: not is_locked(target.bpf_root),
            Wait(target.seconds, NODE_SECONDS),
            f"--bpf-root {target.bpf_root}: the agent still runs",
        )
    except WaitError as error:
        raise RootError(str(error)) from error


def _say_served(target: NodeTarget, say: Say) -> None:
    """Waits until kube-proxy's rules serve all."""
    serving = _wait_rules(takeover.check(target.bpf_root).rows, target.seconds)
    say(f"kube-proxy's rules serve all {serving} frontends of the maps")


def _wait_rules(rows: Iterable[FrontendRow], seconds: float) -> int:
    """Waits until rules serve every frontend of the maps; returns their number."""
    ours = kube_proxy_frontends.of_maps(rows)
    lacking: list[str] = []
    for _ in Wait(seconds, NODE_SECONDS):
        theirs = rules_serve()
        lacking = kube_proxy_frontends.unserved(ours, theirs)
        if theirs and not lacking:
            return len(ours)
    raise MigrationError(
        f"kube-proxy's rules do not serve {next(iter(lacking), 'any')} ({len(lacking)} of {len(ours)}"
        " frontends): start kube-proxy, then call this again; our programs stay"
    )


def _remove_programs(target: NodeTarget, drain: float, say: Say) -> None:
    folders = [("--bpf-root", target.bpf_root)]
    if target.cgroup_root is not None and target.cgroup_root.is_dir():
        folders.append(("--cgroup-root", target.cgroup_root))
    lock = Lock(folders)
    try:
        printing.each(remove_programs(target.bpf_root, drain), say)
    finally:
        lock.release()
