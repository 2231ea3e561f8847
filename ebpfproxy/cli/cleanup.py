"""``ebpfproxy cleanup``."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.datapath.kernel.roots import Lock, pin_folder
from ebpfproxy.operator.migrate.node import conntrack_hold
from ebpfproxy.operator.migrate.node.removal import remove_programs
from ebpfproxy.operator.migrate.node.tools import ToolError


@click.command("cleanup")
@options.bpf_root
@click.option(
    "--cgroup-root",
    type=click.Path(path_type=Path),
    envvar="EBPFPROXY_CGROUP_ROOT",
    show_envvar=True,
    help="The agent's; it is locked, too, so that none starts there meanwhile.",
)
def command(bpf_root: Path, cgroup_root: Path | None) -> None:
    """Remove every attachment and pin of a root, and say what was removed.

    Refused while an agent runs there. From then on no Service is translated on this node. What a migration
    keeps for connections of kube-proxy's goes, too; what kube-proxy itself has left is another thing: run
    --cleanup.
    """
    with one_line():
        pins = pin_folder(bpf_root)
        if not pins.is_dir():
            click.echo(f"nothing is pinned below {pins}")
            _end_keeper()
            return
        folders = [("--bpf-root", bpf_root)]
        if cgroup_root is not None and cgroup_root.is_dir():
            folders.append(("--cgroup-root", cgroup_root))
        lock = Lock(folders)
        try:
            removed = list(remove_programs(bpf_root))
            if not bpf_root.is_mount() and not any(bpf_root.iterdir()):
                bpf_root.rmdir()
        finally:
            lock.release()
    for line in removed:
        click.echo(line)
    click.echo(f"removed {pins}")
    _end_keeper()


def _end_keeper() -> None:
    """What a migration has left for connections that kube-proxy began."""
    try:
        for each in conntrack_hold.end():
            click.echo(f"removed {each}")
    except ToolError as error:
        click.echo(f"what a migration may have left is not known: {error}", err=True)
