"""Options that several commands share."""

from __future__ import annotations

import click

from ebpfproxy.cli.settings import Decorator, setting

bpf_root = setting("bpfRoot", envvar="EBPFPROXY_BPF_ROOT", show_envvar=True, show_default=True)

cgroup_root = setting("cgroupRoot", envvar="EBPFPROXY_CGROUP_ROOT", show_envvar=True)

output_format: Decorator = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    default="table",
    show_default=True,
    help="Output format.",
)

watch: Decorator = click.option(
    "-w", "--watch", is_flag=True, help="Print again at every change, until interrupted."
)
