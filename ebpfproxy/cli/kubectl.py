"""``kubectl ebpfproxy``: commands of the agent's, in its pod on the right node.

kubectl finds the program by its name, ``kubectl-ebpfproxy``. The command line is checked here, and then runs
in the pod as it is: what it prints, and its exit code, are the command's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click

import ebpfproxy
from ebpfproxy.cli import COMMANDS, cluster_access, kubectl_streams, kubectl_top, sysdump_cluster
from ebpfproxy.cli.cluster_access import access, cluster_errors
from ebpfproxy.cli.errors import UnansweredError, answers
from ebpfproxy.cli.plain_errors import PlainErrorsGroup
from ebpfproxy.operator.agents import Agents
from ebpfproxy.operator.api import Api

_PROGRAM = "kubectl ebpfproxy"


class _Remote(NamedTuple):
    """``client``: the pod that a command line names, by the command's own parameters; its node is meant.

    ``by_address``: the option that takes its address, by which the agent knows every pod. ``all_nodes``: it
    may run on all nodes, and how that is shown.
    """

    client: Callable[[Mapping[str, Any]], str | None]
    by_address: str = ""
    all_nodes: str = ""
    #: Exit code 1 is an answer of the command.
    has_answer: bool = False


def _traced(params: Mapping[str, Any]) -> str | None:
    pod, namespace = params["pod"], params["namespace"]
    return f"{namespace}/{pod}" if pod and namespace and "/" not in pod else pod


def _explained(params: Mapping[str, Any]) -> str | None:
    return None if params["source"] == "host" else params["source"]


def _nobody(_: Mapping[str, Any]) -> None:
    return None


_REMOTE = {
    "trace": _Remote(_traced, by_address="--pod", all_nodes="All nodes, with the node's name in each line."),
    "explain": _Remote(_explained, has_answer=True),
    "top": _Remote(_nobody, all_nodes="All nodes: in a terminal their sums, else their names in each line."),
    "status": _Remote(_nobody),
    "check": _Remote(_nobody, has_answer=True),
}


class _Remotes(PlainErrorsGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_REMOTE, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if (remote := _REMOTE.get(cmd_name)) is not None:
            return _command(cmd_name, remote)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Remotes, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ebpfproxy.__version__, prog_name="kubectl-ebpfproxy")
def main() -> None:
    """Run ebpfproxy's commands in the agent's pod on the right node.

    The node is that of --node, or of the pod that the command line names, or the only one. Your credentials
    have to allow listing pods, and to get and create pods/exec in the agents' namespace.
    """


class _Command(click.Command):
    """Its help has the options of the command in the pod, too."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        assert self.name is not None
        with formatter.section(f"Options of ebpfproxy {self.name}"):
            records = (each.get_help_record(ctx) for each in _local(self.name).params)
            formatter.write_dl([record for record in records if record is not None])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        assert self.name is not None
        return _local(self.name).collect_usage_pieces(ctx)


def _local(name: str) -> click.Command:
    command: click.Command = importlib.import_module(f"ebpfproxy.cli.{name}").command
    return command


def _command(name: str, remote: _Remote) -> click.Command:
    @click.command(
        name,
        cls=_Command,
        short_help=COMMANDS[name],
        help=f"{COMMANDS[name]}\n\nThis runs `ebpfproxy {name}` in the agent's pod of a node.",
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("words", nargs=-1, type=click.UNPROCESSED)
    @click.option(
        "--node",
        metavar="NAME",
        help="The node.  [default: that of the pod in the arguments, else the only one]",
    )
    @cluster_access.daemon_set
    @access
    @click.pass_context
    def command(ctx: click.Context, /, **given: Any) -> None:
        ctx.exit(_start(name, remote, **given))

    if remote.all_nodes:
        command.params.append(click.Option(["--all-nodes"], is_flag=True, help=remote.all_nodes))
    return command


def _start(
    name: str,
    remote: _Remote,
    *,
    words: tuple[str, ...],
    node: str | None,
    daemonset: str,
    kubeconfig: str,
    context: str | None,
    master: str | None,
    all_nodes: bool = False,
) -> int:
    # Wrong options are found here, before anything is started.
    with _local(name).make_context(f"{_PROGRAM} {name}", list(words)) as parsed:
        client = remote.client(parsed.params)
    if node is not None and all_nodes:
        raise click.UsageError("--all-nodes and --node exclude each other")
    with answers() if remote.has_answer else nullcontext(), cluster_errors():
        agents = Agents(Api.from_kubeconfigs(kubeconfig, context, master), daemonset)
        arguments = [name, *words]
        nodes = [node] if node is not None else agents.chosen(()) if all_nodes else []
        if not nodes and client is not None:
            found = agents.client(client)
            nodes = [found.node]
            if remote.by_address and found.address:
                arguments += [remote.by_address, found.address]
        nodes = agents.chosen(nodes or [agents.only()])
        if name == "top" and kubectl_top.is_wanted(parsed.params):
            return kubectl_top.run(agents, nodes, arguments, parsed.params)
        failed = UnansweredError.exit_code if remote.has_answer else 1
        return kubectl_streams.run(agents, nodes, arguments, named=all_nodes, failed=failed)


@main.command("sysdump")
@sysdump_cluster.file_argument
@cluster_access.nodes
@cluster_access.daemon_set
@access
def dump(
    *,
    file: Path,
    nodes: tuple[str, ...],
    daemonset: str,
    kubeconfig: str,
    context: str | None,
    master: str | None,
) -> None:
    """Collect everything about the nodes in an archive, for a bug report: see `ebpfproxy sysdump`."""
    with cluster_errors():
        api = Api.from_kubeconfigs(kubeconfig, context, master)
        sysdump_cluster.of_cluster(api, file, nodes, daemonset, kubeconfig)
