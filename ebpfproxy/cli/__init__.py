"""The commands, one module a group: they print what other parts say and know no rules themselves.

Modules are imported when their command is called, so that ``service list`` does not wait for the
Kubernetes client to be imported. May import every package.
"""

from __future__ import annotations

import importlib

import click
from click.shell_completion import CompletionItem

import ebpfproxy

_COMMANDS = {
    "run": "Run the agent of this node.",
    "status": "What runs on this node: programs, maps, watches, health.",
    "service": "Services as the maps hold them.",
    "backend": "Backends as the maps hold them.",
    "affinity": "Clients that stay with their backend.",
    "conntrack": "Flows that the packet path translates.",
    "config": "The configuration file: check it, show defaults and what the agent uses.",
    "install": "Put the agent into a cluster, from a kubeconfig.",
    "uninstall": "Take the agent out of a cluster.",
    "migrate": "From kube-proxy to ebpfproxy and back: this node, or many.",
    "cleanup": "Remove every attachment and pin of a root.",
    "completion": "Completion of commands and names for bash, zsh or fish.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"ebpfproxy.cli.{cmd_name}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Without importing the commands, as click's own would."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text) for name, text in _COMMANDS.items() if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ebpfproxy.__version__, prog_name="ebpfproxy")
def main() -> None:
    """An eBPF kube-proxy replacement: Kubernetes Services on any CNI, at the socket and in packets."""
