"""``kubectl ebpfproxy``: commands of the agent's, in its pod on the right node.

kubectl finds the program by its name, ``kubectl-ebpfproxy``. The command line is checked here, and then runs
in the pod as it is: what it prints, and its exit code, are the command's own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

import ebpfproxy
from ebpfproxy.cli import COMMANDS, sysdump_cluster
from ebpfproxy.cli.install import access, errors
from ebpfproxy.kube.exec import Channel, Exec
from ebpfproxy.kube.failures import Failure
from ebpfproxy.operator.agents import Agents
from ebpfproxy.operator.api import Api, ApiError

_PROGRAM = "kubectl ebpfproxy"


class _Remote(NamedTuple):
    """``client``: the pod that a command line names, by the command's own parameters; its node is meant.

    ``by_address``: the option that takes its address, by which the agent knows every pod. ``merges``: it
    prints lines until it is interrupted, which may come of all nodes.
    """

    client: Callable[[Mapping[str, Any]], str | None]
    by_address: str = ""
    merges: bool = False


def _traced(params: Mapping[str, Any]) -> str | None:
    pod, namespace = params["pod"], params["namespace"]
    return f"{namespace}/{pod}" if pod and namespace and "/" not in pod else pod


def _explained(params: Mapping[str, Any]) -> str | None:
    return None if params["source"] == "host" else params["source"]


def _nobody(_: Mapping[str, Any]) -> None:
    return None


_REMOTE = {
    "trace": _Remote(_traced, by_address="--pod", merges=True),
    "explain": _Remote(_explained),
    "status": _Remote(_nobody),
    "check": _Remote(_nobody),
}


class _Remotes(click.Group):
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
    @sysdump_cluster.daemon_set_option
    @access
    @click.pass_context
    def command(ctx: click.Context, /, **given: Any) -> None:
        ctx.exit(_start(name, remote, **given))

    if remote.merges:
        text = "All nodes, with the node's name in each line."
        command.params.append(click.Option(["--all-nodes"], is_flag=True, help=text))
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
    with errors():
        agents = Agents(Api.from_kubeconfigs(kubeconfig, context, master), daemonset)
        arguments = [name, *words]
        nodes = [node] if node is not None else agents.chosen(()) if all_nodes else []
        if not nodes and client is not None:
            found = agents.client(client)
            nodes = [found.node]
            if remote.by_address and found.address:
                arguments += [remote.by_address, found.address]
        return _run(agents, agents.chosen(nodes or [agents.only()]), arguments, named=all_nodes)


@main.command("sysdump")
@sysdump_cluster.file_argument
@sysdump_cluster.nodes_option
@sysdump_cluster.daemon_set_option
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
    with errors():
        api = Api.from_kubeconfigs(kubeconfig, context, master)
        sysdump_cluster.of_cluster(api, file, nodes, daemonset, kubeconfig)


# -- commands in pods


def _run(agents: Agents, nodes: Sequence[str], arguments: Sequence[str], *, named: bool) -> int:
    """Returns the command's exit code, the highest of several."""
    lock, width = threading.Lock(), max(map(len, nodes))
    signal.signal(signal.SIGTERM, _interrupt)
    streams = [_Stream(agents, node, arguments, f"{node:<{width}}" if named else "", lock) for node in nodes]
    for each in streams:
        each.start()
    try:
        _wait(streams)
    except KeyboardInterrupt:
        for each in streams:
            each.end()
        # What is on its way is still printed; who interrupts again does not want it.
        _wait(streams)
    return max(each.code for each in streams)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(streams: Sequence[_Stream]) -> None:
    """Python 3.11 takes a thread for ended whose join() is interrupted."""
    for each in streams:
        each.done.wait()


class _Stream(threading.Thread):
    """Prints what the command on one node does; ``name`` begins its lines, where it is one of several."""

    def __init__(
        self, agents: Agents, node: str, arguments: Sequence[str], name: str, lock: threading.Lock
    ) -> None:
        super().__init__(daemon=True)
        self._agents, self._node, self._arguments = agents, node, arguments
        self._name, self._lock = name, lock
        self._running: Exec | None = None
        self._rest: dict[Channel, bytes] = {}
        self._ended = False
        self.code = 1
        self.done = threading.Event()

    def end(self) -> None:
        """Ends the command, which ends with its standard input."""
        self._ended = True
        if self._running is not None:
            self._running.end_input()

    def run(self) -> None:
        try:
            self._running = self._agents.start(self._node, self._arguments)
            if self._ended:
                self.end()
            self._follow(self._running)
        except ApiError as error:
            self._say(str(error))
        except Failure as failure:
            self._say(self._agents.told(self._node, failure))
        finally:
            self.done.set()

    def _follow(self, running: Exec) -> None:
        try:
            for channel, data in running.output():
                self._print(channel, data)
            for channel, rest in list(self._rest.items()):
                if rest:
                    self._print(channel, b"\n")
        except BrokenPipeError:
            # Nobody reads on, as after `| head`; the interpreter would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.end()
        if running.code is not None:
            self.code = running.code
        elif self._ended:
            self.code = 0
        else:
            self._say("the connection was lost")

    def _say(self, text: str) -> None:
        with self._lock:
            click.echo(f"Error: {self._node}: {text}", err=True)

    def _print(self, channel: Channel, data: bytes) -> None:
        if not self._name:
            self._write(channel, data)
            return
        *lines, self._rest[channel] = (self._rest.get(channel, b"") + data).split(b"\n")
        self._write(channel, b"".join(self._named(line) for line in lines))

    def _named(self, line: bytes) -> bytes:
        if line.startswith(b"{"):
            return b'{"node":"%s",%s\n' % (self._node.encode(), line[1:])
        return b"%s  %s\n" % (self._name.encode(), line)

    def _write(self, channel: Channel, data: bytes) -> None:
        out = sys.stderr if channel is Channel.STDERR else sys.stdout
        with self._lock:
            out.buffer.write(data)
            out.buffer.flush()
