"""Checks for programs of others on this machine that would affect tests."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path

from ebpfproxy.datapath.kernel.roots import find_cgroup_root

#: Prefixes of attach types of socket hooks, as bpftool prints them. systemd attaches programs of other types.
_SOCKET_HOOKS = ("cgroup_inet", "cgroup_udp", "cgroup_unix")


class ForeignProgramsError(Exception):
    """Programs of others would translate the sockets of all tests."""


def socket_programs(cgroup: Path) -> list[str]:
    """Name and attach type of socket programs that are attached to this cgroup itself."""
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
    """Raises ForeignProgramsError if the cgroup root has socket programs: they see a lab's sockets, too."""
    root = find_cgroup_root()
    if found := socket_programs(root):
        raise ForeignProgramsError(
            f"the socket programs at the cgroup root {root} see every test's sockets: {', '.join(found)};"
            " detach them (bpftool cgroup detach), or run the tests on another machine"
        )
