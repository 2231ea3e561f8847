"""``ebpfproxy migrate plan|run|rollback`` for this node, and ``run --cleanup``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ebpfproxy.cli import cluster_access, migrate_cluster, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.migrate_tables import print_plan, said
from ebpfproxy.cli.option_types import Seconds
from ebpfproxy.cli.output import echo, emit
from ebpfproxy.cli.settings import Decorator
from ebpfproxy.kube.errors import ConfigError
from ebpfproxy.node.identity import NodeNameError, node_name
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.migrate.daemonsets import Cluster
from ebpfproxy.operator.migrate.node import leftovers, preflight, running_kube_proxy, steps
from ebpfproxy.operator.migrate.node.preflight import NodeTarget
from ebpfproxy.operator.migrate.node.steps import MigrationError
from ebpfproxy.operator.migrate.node.tools import ToolError


@click.group("migrate")
def command() -> None:
    """Migrate nodes from kube-proxy to ebpfproxy and back. Connections are kept.

    With --all-nodes, --selector or --node it works on nodes of the cluster, one after the other, each with a
    temporary pod that runs the same command there.
    """


def _where(function: Decorator) -> Decorator:
    for each in (
        click.option(
            "--timeout",
            type=Seconds(),
            default="60s",
            show_default=True,
            help="Limit for each step, and for an API server that does not answer.",
        ),
        click.option(
            "--hostname-override", metavar="NAME", help="Name of this node.  [default: the host's name]"
        ),
        cluster_access.master,
        click.option(
            "--kubeconfig",
            type=click.Path(path_type=Path),
            help="Kubeconfig that may patch kube-proxy's DaemonSet and nodes, and for many nodes create pods"
            " and read their logs. Without it no API server is contacted, and you stop kube-proxy yourself.",
        ),
        options.cgroup_root,
        options.bpf_root,
    ):
        function = each(function)
    return function


_parallel: Decorator = click.option(
    "--parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of nodes at once.",
)
_stopped: Decorator = click.option(
    "--stopped",
    is_flag=True,
    help="kube-proxy was stopped after a plan without blockers: its rules may be outdated. For this node"
    " only.",
)


def _at(
    *,
    bpf_root: Path,
    cgroup_root: Path | None,
    kubeconfig: Path | None,
    master: str | None,
    hostname_override: str | None,
    timeout: float,
    stopped: bool = False,
) -> NodeTarget:
    cluster = None
    if kubeconfig is not None or master is not None:
        cluster = Cluster(Api.from_options(kubeconfig, master, seconds=timeout), node_name(hostname_override))
    return NodeTarget(
        bpf_root=bpf_root, cgroup_root=cgroup_root, cluster=cluster, seconds=timeout, stopped=stopped
    )


@contextmanager
def _errors() -> Iterator[None]:
    try:
        with one_line():
            yield
    except (MigrationError, ToolError, ApiError, ConfigError, NodeNameError) as error:
        raise click.ClickException(str(error)) from error


@command.command("plan")
@migrate_cluster.choice
@_where
@_stopped
@click.option("--brief", is_flag=True, help="Counts instead of names. For this node only.")
@options.output_format
def plan_command(*, output: str, brief: bool, stopped: bool, **given: Any) -> None:
    """Show kube-proxy, its rules, conflicts, what the agent serves, and the planned steps of run.

    The agent should run already; it works beside kube-proxy. The exit code is 1 if run would refuse. With
    many nodes, ten are inspected at once.
    """
    if chosen := migrate_cluster.chosen_by(given):
        reach = migrate_cluster.reach_of(given, brief=brief, stopped=stopped)
        migrate_cluster.plan(chosen, reach, output)
        return
    with _errors():
        planned = preflight.plan(_at(stopped=stopped, **given))
    if brief:
        emit(preflight.brief(planned), "yaml" if output == "table" else output, print)
    else:
        emit(planned, output, print_plan)
    if planned.blockers:
        raise SystemExit(1)


@command.command("run")
@migrate_cluster.choice
@_where
@_stopped
@click.option("--dry-run", is_flag=True, help="Same as plan.")
@click.option("--terminate", is_flag=True, help="Stop a kube-proxy process that no DaemonSet owns, see plan.")
@click.option("--force", is_flag=True, help="Continue despite blockers. For this node only.")
@_parallel
@click.option("--skip-blocked", is_flag=True, help="Skip nodes with blockers.")
@options.output_format
@click.pass_context
def run_command(
    context: click.Context,
    /,
    *,
    dry_run: bool,
    terminate: bool,
    force: bool,
    stopped: bool,
    parallel: int,
    skip_blocked: bool,
    output: str,
    **given: Any,
) -> None:
    """Stop kube-proxy and remove its rules, once the agent serves the same frontends.

    Connections through kube-proxy are kept. Run the command again after the last of them has ended, to remove
    what kept them alive.

    With many nodes all are inspected first; if one has blockers, none is changed. The first failure stops the
    migration, and running the command again continues it.
    """
    if dry_run:
        context.invoke(plan_command, output=output, stopped=stopped, **given)
        return
    if chosen := migrate_cluster.chosen_by(given):
        reach = migrate_cluster.reach_of(given, terminate=terminate, force=force, stopped=stopped)
        migrate_cluster.run(chosen, reach, output, parallel=parallel, skip_blocked=skip_blocked)
        return
    with _errors(), said(output) as say:
        steps.run(_at(stopped=stopped, **given), say, terminate=terminate, force=force)


@command.command("rollback")
@migrate_cluster.choice
@_where
@click.option(
    "--drain",
    type=Seconds(),
    default="0s",
    show_default=True,
    help="Time for connections of the packet path to end; kube-proxy gets the new ones.",
)
@click.option(
    "--wait-for-agent",
    is_flag=True,
    help="Wait until the agent has exited, instead of refusing. For this node only.",
)
@_parallel
@options.output_format
def rollback_command(*, drain: float, wait_for_agent: bool, parallel: int, output: str, **given: Any) -> None:
    """Start kube-proxy again, wait for its rules, then remove the programs of ebpfproxy.

    On one node it refuses while the agent runs; with many nodes it removes the agent's pod by a label.
    Connections that were translated at the socket are kept; those of the packet path, from outside the
    cluster, end with the programs.
    """
    if chosen := migrate_cluster.chosen_by(given):
        reach = migrate_cluster.reach_of(given, wait_for_agent=wait_for_agent)
        migrate_cluster.rollback(chosen, reach, output, parallel=parallel, drain=drain)
        return
    with _errors(), said(output) as say:
        steps.rollback(_at(**given), say, drain=drain, waits=wait_for_agent)


def cleanup_kube_proxy() -> None:
    """``run --cleanup``: removes kube-proxy's rules in this network namespace, and prints them."""
    with _errors():
        for process in running_kube_proxy.find():
            echo(f"kube-proxy runs with pid {process.pid} and will write its rules again", err=True)
        found = leftovers.find()
        if found:
            steps.remove_leftovers(found, echo)
        else:
            echo("nothing of kube-proxy is left")
