"""Pins that are replaced in one step, so that one is there at every moment."""

from __future__ import annotations

from pathlib import Path

from ebpfproxy.datapath.kernel import bpf

#: The name of what is about to take a pin's place ends like this.
NEW_SUFFIX = "-new"


def beside(path: Path) -> Path:
    """Where something is pinned before it takes the place of what is pinned at ``path``."""
    return path.with_name(f"{path.name}{NEW_SUFFIX}")


def pin_over(fd: int, path: Path) -> None:
    """Pins an object in place of what is pinned there, if anything is."""
    new = beside(path)
    # An agent that was killed here has left it.
    new.unlink(missing_ok=True)
    bpf.pin(fd, new)
    new.replace(path)
