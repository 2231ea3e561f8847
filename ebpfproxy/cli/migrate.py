"""``ebpfproxy migrate plan|run|rollback`` for this node, and what ``run --cleanup`` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ebpfproxy.cli import migrate_cluster, options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.migrate_tables import print_plan, said
from ebpfproxy.cli.option_types import Seconds
from ebpfproxy.cli.output import emit
from ebpfproxy.cli.settings import Decorator
from ebpfproxy.kube.access import ConfigError
from ebpfproxy.node.identity import NodeNameError, node_name
from ebpfproxy.operator.api import Api, ApiError
from ebpfproxy.operator.migrate.daemonsets import Cluster
from ebpfproxy.operator.migrate.node import leftovers, preflight, running_kube_proxy, steps
from ebpfproxy.operator.migrate.node.preflight import Where
from ebpfproxy.operator.migrate.node.steps import MigrationError
from ebpfproxy.operator.migrate.node.tools import ToolError


@click.group("migrate")
def command() -> None:
    """From kube-proxy to ebpfproxy on this node or on many, and back, while connections live on.

    With --all-nodes, --selector or --node it is for nodes of the cluster: one after the other, each by a pod
    that calls the same command there and is gone afterwards.
    """


def _where(function: Decorator) -> Decorator:
    for each in (
        click.option("--timeout", type=Seconds(), default="60s", show_default=True, help="For each step."),
        click.option("--hostname-override", metavar="NAME", help="This node's name.  [default: the host's]"),
        click.option("--master", metavar="URL", help="API server; overrides the kubeconfig's."),
        click.option(
            "--kubeconfig",
            type=click.Path(path_type=Path),
            help="Of somebody who may patch kube-proxy's DaemonSet and nodes; for many nodes who may make"
            " pods and read their logs, too. Without it no API server is asked: kube-proxy is yours to stop.",
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
    help="Of many nodes, how many at once.",
)
_stopped: Decorator = click.option(
    "--stopped",
    is_flag=True,
    help="kube-proxy was stopped after a plan found nothing in the way: its rules may differ since. For this"
    " node only.",
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
) -> Where:
    cluster = None
    if kubeconfig is not None or master is not None:
        cluster = Cluster(Api.from_options(kubeconfig, master), node_name(hostname_override))
    return Where(
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
    """Look only: kube-proxy, its rules, conflicts, what the agent serves, and what run would do.

    The agent should run already: it works beside kube-proxy. Exit code 1 where run would refuse. Of many
    nodes, ten are looked at at once.
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
@click.option("--dry-run", is_flag=True, help="The same as plan.")
@click.option("--terminate", is_flag=True, help="Stop a kube-proxy that no DaemonSet runs: see plan.")
@click.option("--force", is_flag=True, help="Go on whatever plan says stands in the way. For this node only.")
@_parallel
@click.option("--skip-blocked", is_flag=True, help="Of many nodes, leave out those where run would refuse.")
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
    """Stop kube-proxy and remove its rules, once the agent serves all that it serves.

    Connections that kube-proxy began live on. Run it again later: it takes away what keeps them alive once
    the last has ended.

    Of many nodes all are looked at first: where one is in the way, none is touched. A node that fails is the
    last one. Called again it goes on where it stopped.
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
    help="How long connections may take to end that are translated in packets; new ones are kube-proxy's.",
)
@click.option(
    "--wait-for-agent",
    is_flag=True,
    help="Wait until the agent has ended, instead of refusing. For this node only.",
)
@_parallel
@options.output_format
def rollback_command(*, drain: float, wait_for_agent: bool, parallel: int, output: str, **given: Any) -> None:
    """Bring kube-proxy back, wait until its rules serve all, then remove our programs.

    On one node it is refused while our agent runs; of many nodes it takes the agent's pod away, by a label.
    Connections of sockets live on; those that were translated in packets (from outside the cluster) end with
    the programs.
    """
    if chosen := migrate_cluster.chosen_by(given):
        reach = migrate_cluster.reach_of(given, wait_for_agent=wait_for_agent)
        migrate_cluster.rollback(chosen, reach, output, parallel=parallel, drain=drain)
        return
    with _errors(), said(output) as say:
        steps.rollback(_at(**given), say, drain=drain, waits=wait_for_agent)


def cleanup_kube_proxy() -> None:
    """``run --cleanup``: removes what kube-proxy left in this network namespace, and says what."""
    with _errors():
        for process in running_kube_proxy.find():
            click.echo(f"kube-proxy, pid {process.pid}, runs here: it will write its rules again", err=True)
        found = leftovers.find()
        if found:
            steps.remove_leftovers(found, click.echo)
        else:
            click.echo("nothing of kube-proxy is left")
