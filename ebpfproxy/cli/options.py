"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ebpfproxy.config.datapath import BPFFS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

bpf_root: Decorator = click.option(
    "--bpf-root",
    # Whoever asks a cluster about all nodes, from anywhere, need not be able to read this.
    type=click.Path(path_type=Path, readable=False),
    default=BPFFS,
    show_default=True,
    envvar="EBPFPROXY_BPF_ROOT",
    show_envvar=True,
    help="Folder on a bpffs below which maps, programs and attachments are pinned.",
)

cgroup_root: Decorator = click.option(
    "--cgroup-root",
    type=click.Path(path_type=Path),
    default=None,
    envvar="EBPFPROXY_CGROUP_ROOT",
    show_envvar=True,
    help="cgroup v2 folder whose processes are served.  [default: the cgroup v2 mount]",
)

output_format: Decorator = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="How to print.",
)

watch: Decorator = click.option(
    "-w", "--watch", is_flag=True, help="Print again whenever something changed, until interrupted."
)
