"""The cgroup that an agent attaches to, and the bpffs folder that it pins in; there is one agent for each."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

PIN_FOLDER = "ebpfproxy"
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
_MOUNT_FIELDS = 3


class RootError(Exception):
    """A root that cannot be used; the message says which and why."""


class _Mount(NamedTuple):
    point: Path
    kind: str


def _mounts(table: bytes | None = None) -> list[_Mount]:
    """Of /proc/self/mounts. Paths have any bytes: spaces and ends of lines are octal escapes (proc(5))."""
    found = []
    for line in (Path("/proc/self/mounts").read_bytes() if table is None else table).split(b"\n"):
        fields = line.split(b" ")
        if len(fields) >= _MOUNT_FIELDS:
            point = _OCTAL.sub(lambda escape: bytes([int(escape[1], 8)]), fields[1])
            found.append(_Mount(Path(os.fsdecode(point)), os.fsdecode(fields[2])))
    return found


def find_cgroup_root() -> Path:
    """The cgroup v2 mount, found by type: it may be beside v1's mounts. Raises RootError."""
    for mount in _mounts():
        if mount.kind == "cgroup2":
            return mount.point
    raise RootError("no cgroup v2 mount in /proc/self/mounts: mount one, or name a cgroup with --cgroup-root")


def is_bpffs_at(place: Path) -> bool:
    """True if a bpffs is mounted at ``place`` itself."""
    return any(mount.kind == "bpf" and mount.point == place for mount in _mounts())


def _on_bpffs(path: Path) -> bool:
    """True if ``path``, or the nearest folder above it that exists, is on a bpffs."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    return any(m.kind == "bpf" and m.point.exists() and m.point.stat().st_dev == device for m in _mounts())


def ensure_bpffs(root: Path) -> bool:
    """Makes ``root`` a folder on a bpffs, mounting one there where none is. True if it was mounted.

    Raises RootError.
    """
    if _on_bpffs(root):
        root.mkdir(parents=True, exist_ok=True)
        return False
    try:
        root.mkdir(parents=True, exist_ok=True)
        is_used = any(root.iterdir())
    except OSError as error:
        raise RootError(f"--bpf-root {root}: {error.strerror}") from error
    if is_used:
        # A bpffs over /proc or /etc takes the whole node with it.
        raise RootError(
            f"--bpf-root {root}: neither on a bpffs nor empty: one mounted there would hide the rest"
        )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(root), b"bpf", 0, b"mode=0700") != 0:
        raise RootError(f"--bpf-root {root}: cannot mount a bpffs there: {os.strerror(ctypes.get_errno())}")
    return True


def check_cgroup(root: Path) -> None:
    """Raises RootError unless ``root`` is a cgroup v2 folder."""
    if not (root / "cgroup.procs").exists() or not (root / "cgroup.controllers").exists():
        raise RootError(f"--cgroup-root {root}: not a cgroup v2 folder")


class Lock:
    """Held while an agent, or a clean-up, works on a root: flock(2) on the folder itself.

    It leaves nothing behind and ends with the process, however that ends.
    """

    def __init__(self, folders: list[tuple[str, Path]]) -> None:
        """``folders`` with the option that named each. Raises RootError where another process holds one."""
        self._fds: dict[Path, int] = {}
        for option, folder in folders:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not _try_lock(fd):
                os.close(fd)
                self.release()
                raise RootError(f"{option} {folder} is in use by another ebpfproxy agent")
            self._fds[folder] = fd

    def moved(self) -> list[tuple[Path, Path]]:
        """Folders at whose path another one is now, each with a path to the locked one.

        Somebody has mounted or unmounted something there: the open descriptor is all that keeps the old one.
        """
        return [
            (folder, Path(f"/proc/self/fd/{fd}"))
            for folder, fd in self._fds.items()
            if not _is_at(fd, folder)
        ]

    def follow(self, folder: Path) -> bool:
        """Locks what is at the path now instead. False where another process has."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not _lock_now(fd):
            os.close(fd)
            return False
        os.close(self._fds[folder])
        self._fds[folder] = fd
        return True

    def release(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


def _is_at(fd: int, folder: Path) -> bool:
    try:
        there = folder.stat()
    except OSError:
        return False
    own = os.fstat(fd)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _lock_now(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _try_lock(fd: int) -> bool:
    """Tries for half a second, since a command that checks for an agent holds the lock for a moment."""
    for _ in range(10):
        if _lock_now(fd):
            return True
        time.sleep(0.05)
    return False


def is_locked(folder: Path) -> bool:
    """True if an agent runs on this root."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def pin_folder(bpf_root: Path) -> Path:
    return bpf_root / PIN_FOLDER
