"""Pins of a bpffs that somebody has unmounted, while a process has a folder of it open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError


def pin_below(new: Path, old: Path) -> int:
    """Pins what is pinned below ``old`` at the same place below ``new``, unless there is something.

    Attachments, programs and maps stay what they are. Returns how many were pinned. Raises OSError.
    """
    pinned = 0
    new.mkdir(parents=True, exist_ok=True)
    for folder, _, names in os.walk(old):
        there = new / Path(folder).relative_to(old)
        there.mkdir(exist_ok=True)
        for name in names:
            with bpf.opened(Path(folder) / name) as fd:
                try:
                    bpf.pin(fd, there / name)
                except BpfError as error:
                    if error.errno != errno.EEXIST:
                        raise
                else:
                    pinned += 1
    return pinned
