"""Attachments: one pinned cgroup link for each hook, besides those of others, replaced in one step.

Links (Linux 5.7) attach with the multi-program flag and are detached by nobody but their holder: the pin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.hooks import FORMER_HOOKS, OPTIONAL_HOOKS, RECORD_READERS, SOCKET_HOOKS, Hook
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.pins import beside, pin_over

LINKS = "links"


class Attachment(msgspec.Struct, frozen=True):
    """A hook as the kernel has it now. ``program_id`` is None where we are not attached."""

    hook: str
    program_id: int | None
    cgroup_id: int = 0

    @property
    def alive(self) -> bool:
        return self.program_id is not None and self.cgroup_id != 0


def attach_all(
    pins: Path,
    programs: Path,
    cgroup_root: Path,
    optional: tuple[Hook, ...] = (),
    *,
    has_other_maps: bool = False,
) -> list[str]:
    """Brings every hook's link to the program in ``programs``. Returns what changed, a phrase for each.

    ``optional``: those of OPTIONAL_HOOKS that are wanted.
    ``has_other_maps``: what is attached has recorded sockets in other maps. The programs that read records
    stay, with ours behind them, until :func:`drop_former`: a socket is found in either, also for as long as
    the next agent takes where this one is killed in between.
    A hook that has a link keeps having one at every moment; links of hooks that these options, or this
    version, do not have are taken away. Raises BpfError.
    """
    hooks = optional + SOCKET_HOOKS
    unwanted = {*FORMER_HOOKS, *(hook.name for hook in OPTIONAL_HOOKS)} - {hook.name for hook in hooks}
    (pins / LINKS).mkdir(parents=True, exist_ok=True)
    cgroup = os.open(cgroup_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        changed = []
        for hook in hooks:
            stays = has_other_maps and hook in RECORD_READERS
            what = _attach(hook, pins / LINKS / hook.name, programs / hook.name, cgroup, stays=stays)
            if what:
                changed.append(f"{hook.name} {what}")
    finally:
        os.close(cgroup)
    return changed + [f"{name} detached" for name in sorted(unwanted) if detach(pins / LINKS / name)]


def detach(link: Path) -> bool:
    """Detaches a program by removing its link's last holder, the pin. Returns False if there was none."""
    try:
        link.unlink()
    except FileNotFoundError:
        return False
    return True


def drop_former(pins: Path, programs: Path) -> None:
    """Detaches what :func:`attach_all` has left beside ``programs``, by this agent or one that was killed."""
    for hook in RECORD_READERS:
        path = pins / LINKS / hook.name
        new = beside(path)
        with bpf.pinned(new) as link:
            found = int(bpf.cgroup_link_info(link).prog_id) if link is not None else None
        if found is None:
            continue
        if found == program_id(programs / hook.name):
            new.replace(path)
        else:
            detach(new)


def _attach(hook: Hook, link_path: Path, program_path: Path, cgroup: int, *, stays: bool = False) -> str:
    """``stays``: also what is attached there now."""
    with bpf.opened(program_path) as program, bpf.pinned(link_path) as link:
        if link is not None:
            info = bpf.cgroup_link_info(link)
            if info.cgroup_id == os.fstat(cgroup).st_ino:
                if info.prog_id == bpf.prog_info(program).id:
                    return ""
                if stays:
                    _attach(hook, beside(link_path), program_path, cgroup)
                else:
                    bpf.link_update(link, program)
                return "replaced"
        # Attached to another cgroup, or to one that is gone: the new link comes first.
        fresh = bpf.link_create(program, cgroup, hook.attach_type)
        try:
            if link is None:
                bpf.pin(fresh, link_path)
            else:
                pin_over(fresh, link_path)
        finally:
            os.close(fresh)
        return "attached" if link is None else "moved"


class Drifted(NamedTuple):
    """A program that somebody has detached or replaced, or another has come before.

    ``at``: a hook, or a device and a direction.
    """

    at: str
    kind: str


DETACHED, REPLACED, OVERTAKEN = "detached", "replaced", "overtaken"


def drift(at: str, there: int | None, wanted: int | None) -> Iterator[Drifted]:
    """Compares ids of programs: the one that is there, if any, and ours."""
    if there != wanted:
        yield Drifted(at, DETACHED if there is None else REPLACED)


def drifted(pins: Path, programs: Path, cgroup_root: Path, optional: tuple[Hook, ...] = ()) -> list[Drifted]:
    """The hooks that have another program than the one in ``programs``, or none."""
    cgroup_id = cgroup_root.stat().st_ino
    found: list[Drifted] = []
    for hook in SOCKET_HOOKS + optional:
        with bpf.pinned(pins / LINKS / hook.name) as link:
            info = bpf.cgroup_link_info(link) if link is not None else None
        there = int(info.prog_id) if info is not None and info.cgroup_id == cgroup_id else None
        found += drift(hook.name, there, program_id(programs / hook.name))
    return found


def program_id(path: Path) -> int | None:
    """The id of the pinned program, None if there is none."""
    with bpf.pinned(path) as fd:
        return int(bpf.prog_info(fd).id) if fd is not None else None


def attachments(pins: Path) -> list[Attachment]:
    """The programs that run at every hook, as the kernel says: not what was once attached.

    Optional hooks are among them only where they have been attached.
    """
    found = []
    for hook in SOCKET_HOOKS + OPTIONAL_HOOKS:
        with bpf.pinned(pins / LINKS / hook.name) as link:
            if link is not None:
                info = bpf.cgroup_link_info(link)
                found.append(Attachment(hook.name, info.prog_id, info.cgroup_id))
            elif hook in SOCKET_HOOKS:
                found.append(Attachment(hook.name, None))
    return found
