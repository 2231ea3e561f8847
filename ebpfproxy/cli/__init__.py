"""The commands, one module per group: they print what other packages return and contain no rules.

Modules are imported when their command is called, so that ``service list`` does not wait for the
Kubernetes client to be imported.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import threading
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

import ebpfproxy
from ebpfproxy.cli.plain_errors import PlainErrorsGroup

#: The names of commands and of their modules, with one line of help each.
COMMANDS = {
    "run": "Run the agent of this node.",
    "status": "Show what runs on this node: programs, maps, watches, health.",
    "explain": "Say what happens to a connection to a Service, and why.",
    "test": "Test that Services work, in a cluster or on this node.",
    "check": "Compare this node with what it should be, and repair it.",
    "service": "Show Services as they are in the maps.",
    "backend": "Show and drain backends.",
    "affinity": "Show and flush session affinity.",
    "trace": "Show each decision as it is made: the backend, or why there is none.",
    "top": "Show Services and backends by new connections, live, and what is refused.",
    "ui": "Serve a page about this node, to look at with a browser.",
    "conntrack": "Show and flush flows of the packet path.",
    "sysdump": "Collect everything about this node, or of all, for a bug report.",
    "config": "Check the configuration file, show defaults and what the agent uses.",
    "install": "Install the agent in a cluster.",
    "uninstall": "Remove the agent from a cluster.",
    "migrate": "Migrate nodes from kube-proxy to ebpfproxy and back.",
    "cleanup": "Remove all programs and maps from this node.",
    "completion": "Print the completion script for bash, zsh or fish.",
}


class _LazyGroup(PlainErrorsGroup):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        if cmd_name == "run":
            # The agent's modules stay: a tenth of their import is the search for garbage among them.
            gc.disable()
        command: click.Command = importlib.import_module(f"ebpfproxy.cli.{cmd_name}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes command names without importing the commands, which click's own method does."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ebpfproxy.__version__, prog_name="ebpfproxy")
@click.option(
    "--end-with-input",
    is_flag=True,
    help="End the command when standard input ends, as it does with the connection of `kubectl exec -i`.",
)
def main(end_with_input: bool) -> None:
    """An eBPF kube-proxy replacement that works beside the CNI of the cluster.

    Exit code 0: done; 1: an error, or the answer "no" of a command that has one; 2: the command line is
    wrong, such a command has no answer, or the output cannot be written; 130: interrupted, if it does not run
    until then; 141: nobody reads the output any more. An error is on standard error, in whatever format the
    output is.
    """
    if end_with_input:
        threading.Thread(target=_end_with_input, daemon=True).start()


def _end_with_input() -> None:
    """A command in a container would go on without anybody who reads what it prints."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
