"""The output of ``ebpfproxy migrate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ebpfproxy.cli.output import console, echo, emit, table
from ebpfproxy.operator.migrate.cluster.fleet import ClusterPlan
from ebpfproxy.operator.migrate.node import iptables
from ebpfproxy.operator.migrate.node.preflight import Plan

_SHOWN = 10


@contextmanager
def said(form: str) -> Iterator[Callable[[str], None]]:
    """Prints each step when it is done; JSON and YAML follow at the end, also after a failure."""
    lines: list[str] = []
    try:
        yield echo if form == "table" else lines.append
    finally:
        if form != "table":
            emit({"done": lines}, form, lambda _: None)


def print_plan(planned: Plan) -> None:
    out = console()
    for name, value in _facts(planned):
        out.print(f"{name + ':' if name else '':<22}{value}")
    if planned.leftovers:
        out.print()
        out.print(_leftovers(planned))
    if planned.differences:
        out.print()
        printed = table("frontend", "difference")
        for frontend, what in list(planned.differences.items())[:_SHOWN]:
            printed.add_row(frontend, what)
        out.print(printed)
    if planned.conflicts:
        out.print()
        printed = table("conflict", "what", "advice")
        for each in planned.conflicts:
            printed.add_row(str(each.severity), each.what, each.advice)
        out.print(printed)
    _print_lines(planned.warnings, planned.steps, planned.blockers)


def _print_lines(warnings: Iterable[str], steps: Iterable[str], blockers: Iterable[str]) -> None:
    out = console()
    for title, lines in (("WARNINGS", warnings), ("PLANNED STEPS", steps), ("BLOCKERS", blockers)):
        if lines:
            out.print(f"\n{title}")
            for line in lines:
                out.print(f"  {line}")


def _facts(planned: Plan) -> Iterator[tuple[str, str]]:
    yield "kernel", planned.kernel
    yield "kube-proxy", f"mode {', '.join(planned.modes)}" if planned.modes else "no rules"
    for process in planned.processes:
        config = f", --config {process.config}" if process.config else ""
        yield "", f"pid {process.pid}, started by: {process.started_by}, mode {process.mode}{config}"
    if planned.daemon_set is not None:
        pods = ", ".join(planned.daemon_set.pods) or "no pod on this node"
        yield "", f"DaemonSet {planned.daemon_set.name} ({planned.daemon_set.image}): {pods}"
    if planned.embedded:
        yield "", f"inside {planned.embedded}"
    missing = len(planned.differences)
    yield "kube-proxy frontends", f"{planned.kube_proxy_frontends} ({missing} missing from maps)"
    yield "agent frontends", f"{planned.agent_frontends}"
    yield "flows", f"{planned.flows} through kube-proxy"
    if planned.kept:
        yield "kept for flows", ", ".join(planned.kept)


def _leftovers(planned: Plan) -> object:
    printed = table("where", "what")
    for each in planned.leftovers.iptables:
        chains, rules = iptables.count(each.tables)
        printed.add_row(each.tool, f"{chains} chains, {rules} rules")
    for name in planned.leftovers.nftables:
        printed.add_row("nftables", f"table {name}")
    if planned.leftovers.ipvs or planned.leftovers.ipvs_device:
        printed.add_row("ipvs", f"{len(planned.leftovers.ipvs)} virtual servers")
    for kind, names in (("ipset", planned.leftovers.ipsets), ("nfacct", planned.leftovers.accounts)):
        if names:
            printed.add_row(kind, ", ".join(names))
    return printed


# -- many nodes


def print_cluster(planned: ClusterPlan) -> None:
    out = console()
    printed = table("node", "state", "kube-proxy", "frontends", "ebpfproxy", "missing", "flows")
    for each in planned.nodes:
        found = each.found
        facts = ["", "", "", "", ""]
        if found is not None:
            mode = ", ".join(found.modes) or "no rules"
            facts = [mode if found.processes else f"{mode}, stopped"]
            counts = (found.kube_proxy_frontends, found.agent_frontends, found.differences, found.flows)
            facts += map(str, counts)
        printed.add_row(each.node, str(each.state), *facts)
    out.print(printed)
    blockers = [f"{each.node}: {line}" for each in planned.nodes for line in each.blockers]
    _print_lines([*planned.warnings, *_common(planned)], planned.steps, blockers)


def _common(planned: ClusterPlan) -> Iterator[str]:
    """Each warning once, with the nodes that have it."""
    where: dict[str, list[str]] = {}
    for each in planned.nodes:
        for line in each.found.warnings if each.found is not None else ():
            where.setdefault(line, []).append(each.node)
    for line, names in where.items():
        count = len(names)
        yield f"{names[0] if count == 1 else f'{names[0]} and {count - 1} more'}: {line}"
