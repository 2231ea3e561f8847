"""``ebpfproxy cleanup``."""

from __future__ import annotations

from pathlib import Path

import click

from ebpfproxy.cli import options
from ebpfproxy.cli.errors import one_line
from ebpfproxy.cli.output import echo
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
    help="The agent's cgroup root. It is locked, so that no agent starts there meanwhile.",
)
def command(bpf_root: Path, cgroup_root: Path | None) -> None:
    """Remove all programs and maps from this node, and print what was removed.

    It refuses while an agent runs. Afterwards no Service is translated on this node. Rules that a migration
    kept for connections of kube-proxy are removed, too. For rules of kube-proxy itself see `ebpfproxy run
    --cleanup`.
    """
    with one_line():
        pins = pin_folder(bpf_root)
        if not pins.is_dir():
            echo(f"nothing is pinned below {pins}")
            _end_conntrack_hold()
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
        echo(line)
    echo(f"removed {pins}")
    _end_conntrack_hold()


def _end_conntrack_hold() -> None:
    """Removes what a migration left for connections that kube-proxy began."""
    try:
        for each in conntrack_hold.end():
            echo(f"removed {each}")
    except ToolError as error:
        echo(f"rules that a migration may have left cannot be listed: {error}", err=True)
