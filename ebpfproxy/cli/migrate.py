"""``ebpfproxy migrate plan|run|rollback``, and what ``run --cleanup`` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import console, emit, table
from ebpfproxy.cli.values import Seconds
from ebpfproxy.migrate import iptables, kube_proxy, leftovers, steps
from ebpfproxy.migrate.cluster import Cluster, ClusterError
from ebpfproxy.migrate.steps import MigrationError, Plan, Where
from ebpfproxy.migrate.tools import ToolError
from ebpfproxy.node.identity import NodeNameError, node_name

_SHOWN = 10


@click.group("migrate")
def command() -> None:
    """From kube-proxy to ebpfproxy on this node, and back, while connections live on."""


def _where(function: options.Decorator) -> options.Decorator:
    for each in (
        click.option("--timeout", type=Seconds(), default="60s", show_default=True, help="For each step."),
        click.option("--hostname-override", metavar="NAME", help="This node's name.  [default: the host's]"),
        click.option("--master", metavar="URL", help="API server; overrides the kubeconfig's."),
        click.option(
            "--kubeconfig",
            type=click.Path(path_type=Path),
            help="Of somebody who may patch kube-proxy's DaemonSet and this node. Without it no API server is"
            " asked, and kube-proxy is yours to stop.",
        ),
        options.cgroup_root,
        options.bpf_root,
    ):
        function = each(function)
    return function


def _at(
    *,
    bpf_root: Path,
    cgroup_root: Path | None,
    kubeconfig: Path | None,
    master: str | None,
    hostname_override: str | None,
    timeout: float,
) -> Where:
    cluster = None
    if kubeconfig is not None or master is not None:
        cluster = Cluster(kubeconfig, master, node_name(hostname_override))
    return Where(bpf_root=bpf_root, cgroup_root=cgroup_root, cluster=cluster, seconds=timeout)


@contextmanager
def _errors() -> Iterator[None]:
    try:
        with one_line():
            yield
    except (MigrationError, ToolError, ClusterError, NodeNameError) as error:
        raise click.ClickException(str(error)) from error


@command.command("plan")
@_where
@options.output_format
def plan_command(*, output: str, **where: Any) -> None:
    """Look only: kube-proxy, its rules, conflicts, what the agent serves, and what run would do.

    The agent should run already: it works beside kube-proxy. Exit code 1 where run would refuse.
    """
    with _errors():
        planned = steps.plan(_at(**where))
    emit(planned, output, _print_plan)
    if planned.blockers:
        raise SystemExit(1)


@command.command("run")
@_where
@click.option("--dry-run", is_flag=True, help="The same as plan.")
@click.option("--terminate", is_flag=True, help="Stop a kube-proxy that no DaemonSet runs: see plan.")
@click.option("--force", is_flag=True, help="Go on whatever plan says stands in the way.")
@options.output_format
@click.pass_context
def run_command(
    context: click.Context, /, *, dry_run: bool, terminate: bool, force: bool, output: str, **where: Any
) -> None:
    """Stop kube-proxy on this node and remove its rules, once the agent serves all that it serves.

    Connections that kube-proxy began live on. Run it again later: it takes away what keeps them alive once
    the last has ended.
    """
    if dry_run:
        context.invoke(plan_command, output=output, **where)
        return
    with _errors(), _said(output) as say:
        steps.run(_at(**where), say, terminate=terminate, force=force)


@command.command("rollback")
@_where
@click.option(
    "--drain",
    type=Seconds(),
    default="0s",
    show_default=True,
    help="How long connections may take to end that are translated in packets; new ones are kube-proxy's.",
)
@options.output_format
def rollback_command(*, drain: float, output: str, **where: Any) -> None:
    """Bring kube-proxy back to this node, wait until its rules serve all, then remove our programs.

    Refused while our agent runs. Connections of sockets here live on; those that were translated in packets
    (from outside the cluster) end with the programs.
    """
    with _errors(), _said(output) as say:
        steps.rollback(_at(**where), say, drain=drain)


@contextmanager
def _said(form: str) -> Iterator[steps.Say]:
    """Each step as it is done; as JSON and YAML all at the end, also where one fails."""
    lines: list[str] = []
    try:
        yield click.echo if form == "table" else lines.append
    finally:
        if form != "table":
            emit({"done": lines}, form, lambda _: None)


def cleanup_kube_proxy() -> None:
    """``run --cleanup``: removes what kube-proxy left in this network namespace, and says what."""
    with _errors():
        for process in kube_proxy.find():
            click.echo(f"kube-proxy, pid {process.pid}, runs here: it will write its rules again", err=True)
        found = leftovers.find()
        if found:
            steps.remove_leftovers(found, click.echo)
        else:
            click.echo("nothing of kube-proxy is left")


# -- tables


def _print_plan(planned: Plan) -> None:
    out = console()
    for name, value in _facts(planned):
        out.print(f"{name + ':':<18}{value}")
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
    for title, lines in (
        ("WARNINGS", planned.warnings),
        ("RUN WOULD", planned.steps),
        ("IN THE WAY", planned.blockers),
    ):
        if lines:
            out.print(f"\n{title}")
            for line in lines:
                out.print(f"  {line}")


def _facts(planned: Plan) -> Iterator[tuple[str, str]]:
    yield "kernel", planned.kernel
    yield "kube-proxy", f"mode {', '.join(planned.modes)}" if planned.modes else "no rules here"
    for process in planned.processes:
        config = f", --config {process.config}" if process.config else ""
        yield "", f"pid {process.pid}, started by: {process.started_by}, mode {process.mode}{config}"
    if planned.daemon_set is not None:
        pods = ", ".join(planned.daemon_set.pods) or "no pod on this node"
        yield "", f"DaemonSet {planned.daemon_set.name} ({planned.daemon_set.image}): {pods}"
    if planned.embedded:
        yield "", f"inside {planned.embedded}"
    yield "its frontends", f"{planned.kube_proxy_frontends}, {len(planned.differences)} not so in maps"
    yield "ours", f"{planned.agent_frontends}"
    yield "flows", f"{planned.flows} that kube-proxy began"
    if planned.kept:
        yield "kept for them", ", ".join(planned.kept)


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
