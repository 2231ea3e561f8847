"""Follows what is mounted at the agent's folders: somebody may unmount the bpffs, or mount another one."""

from __future__ import annotations

from pathlib import Path

from ebpfproxy.datapath.kernel import moved_pins, roots
from ebpfproxy.logs import get_logger

log = get_logger(__name__)


class MountFollower:
    def __init__(self, lock: roots.Lock, bpf_root: Path) -> None:
        self._lock, self._bpf_root = lock, bpf_root
        self._problem = ""

    def follow(self) -> None:
        """Pins and locks everything in the folders that are at the paths now."""
        root = self._bpf_root
        for folder, old in self._lock.moved():
            try:
                if folder == root:
                    roots.ensure_bpffs(root)
                    pinned = moved_pins.pin_below(roots.pin_folder(root), roots.pin_folder(old))
                    log.warning("another folder is at --bpf-root, pinned all again", pins=pinned)
                is_locked = self._lock.follow(folder)
            except (OSError, roots.RootError) as error:
                self._tell(folder, str(error))
            else:
                self._tell(folder, "" if is_locked else "another process has locked it")

    def _tell(self, folder: Path, problem: str) -> None:
        if problem and problem != self._problem:
            log.error("cannot use what is mounted now", path=str(folder), error=problem)
        self._problem = problem
