"""What else runs on this machine and would change what tests see."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from ebpfproxy.datapath.kernel.roots import find_cgroup_root

#: bpf_attach_type as bpftool prints it: of sockets. Those of packets (egress) and devices are systemd's.
_SOCKET_HOOKS = ("cgroup_inet", "cgroup_udp", "cgroup_unix")


class ForeignProgramsError(Exception):
    """Programs of another owner translate the sockets of every test."""


def socket_programs(cgroup: Path) -> list[str]:
    """Name and hook of the programs that are attached to a cgroup (not to those above) and see its sockets."""
    shown = subprocess.run(
        ["bpftool", "-j", "cgroup", "show", str(cgroup)], capture_output=True, text=True, check=True
    ).stdout
    return [
        f"{each['name'] or each['id']} ({each['attach_type']})"
        for each in json.loads(shown.strip() or "[]")
        if str(each["attach_type"]).startswith(_SOCKET_HOOKS)
    ]


@functools.cache
def check_cgroup_root() -> None:
    """Raises ForeignProgramsError where the cgroup v2 root has socket hooks: a lab's sockets pass them as well."""
    root = find_cgroup_root()
    if found := socket_programs(root):
        raise ForeignProgramsError(
            f"the socket programs at the cgroup root {root} see every test's sockets: {', '.join(found)};"
            " detach them (bpftool cgroup detach), or run the tests on another machine"
        )
