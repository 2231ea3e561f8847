"""A node: processes with their own root, PID namespace, cgroup subtree and network.

The node's programs see a separate machine: ``/proc/1`` is the node's first process, ``/sys/fs/bpf`` its own
bpffs, ``/sys/fs/cgroup`` shows its subtree as the whole. So an agent that attaches to the root of the cgroup hierarchy
attaches to the node's subtree, and nothing else on this machine is translated.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.cluster.init import hierarchies

_INIT = Path(__file__).with_name("init.py")
_CGROUPS = Path("/sys/fs/cgroup")
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup")


class Machine:
    """``netns`` names a network namespace that is there already; ``folder`` becomes the node's disk.

    ``group`` is the name of the cgroup subtree, in every hierarchy. ``shown``: folders of this machine that the node
    sees at the places that are named.
    """

    def __init__(self, name: str, netns: str, folder: Path, group: str, shown: dict[Path, str]) -> None:
        self.name = name
        self.netns = netns
        self.folder = folder
        self._group = group
        self._shown = {str(source): place for source, place in shown.items()}
        self._init: subprocess.Popen[str] | None = None
        self._processes: list[subprocess.Popen[Any]] = []
        self._upper = folder / "memory"
        self._upper.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "memory", str(self._upper)], check=True)

    # -- power

    def boot(self, bpffs: Path | None = None) -> None:
        """``bpffs``: one that outlives the boot is shown instead of a new one, to stand for a node that only lost
        its processes.
        """
        for each in self._groups():
            each.mkdir(exist_ok=True)
            # A cpuset without processors accepts no process.
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (each / file).exists():
                    (each / file).write_text((each.parent / file).read_text())
        told = {
            "name": self.name,
            "store": str(self.folder / "disk"),
            "upper": str(self._upper),
            "bpffs": str(bpffs) if bpffs else None,
            "shown": self._shown,
        }
        unshare = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
        enter = ["nsenter", f"--net=/run/netns/{self.netns}"]
        self._init = subprocess.Popen(
            [*enter, *unshare, "--propagation", "private", sys.executable, str(_INIT), json.dumps(told)],
            preexec_fn=self._join,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._init.stdout is not None
        line = self._init.stdout.readline()
        if line != "booted\n":
            raise RuntimeError(f"{self.name} does not boot: its first process printed {line!r}")

    def power_off(self) -> None:
        """Ends all processes of the node at once, as at a reset; its disk and its network remain."""
        if self._init is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._init.wait()
        if self._init.stdout:
            self._init.stdout.close()
        self._init = None
        for process in self._processes:
            process.wait()
        self._processes.clear()
        self._remove_groups()

    def remove(self) -> None:
        self.power_off()
        subprocess.run(["umount", "-R", str(self._upper)], check=True)

    @property
    def pid(self) -> int:
        """Returns the first process of the node, with its PID on this machine."""
        assert self._init is not None
        own = Path("/proc/self/ns/pid").readlink()
        # nsenter becomes unshare, whose child is the first process.
        for task in children(self._init.pid):
            if Path(f"/proc/{task}/ns/pid").readlink() != own:
                return task
        raise RuntimeError(f"{self.name} has no first process")

    # -- processes

    def popen(self, command: list[str], log: Path | None = None, **options: Any) -> subprocess.Popen[Any]:
        """Starts a process on the node; it ends with the node. ``log`` gets its output.

        ``options`` are Popen's, such as pipes.
        """
        file = log.open("ab") if log else subprocess.DEVNULL
        streams = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(
            [*self._enter(), *command],
            preexec_fn=self._join,
            start_new_session=True,
            **{**streams, **options},
        )
        if log:
            file.close()  # type: ignore[union-attr]
        self._processes.append(process)
        return process

    def run(
        self, command: Iterable[str], *, timeout: float = 120, check: bool = True, stdin: str | None = None
    ) -> str:
        """Runs a command on the node to its end; returns what it printed.

        Raises RuntimeError with its output where it fails, TimeoutExpired after ``timeout`` seconds.
        """
        command = [*command]
        done = subprocess.run(
            [*self._enter(), *command],
            preexec_fn=self._join,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: {' '.join(command)} failed: {done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout

    def path(self, inside: str) -> Path:
        """Returns the path by which this process opens a file of the node."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.pid), *_NAMESPACES, "--"]

    # -- cgroups

    def _groups(self) -> list[Path]:
        return [_CGROUPS / folder / self._group for folder, _, _ in hierarchies()]

    def _join(self) -> None:
        for each in self._groups():
            (each / "cgroup.procs").write_text("0")

    def _remove_groups(self) -> None:
        """Removes every cgroup below the node's, deepest first; dying processes leave them a moment later."""
        deadline = time.monotonic() + 10
        for top in self._groups():
            if not top.exists():
                continue
            folders = sorted((Path(each) for each, _, _ in os.walk(top)), reverse=True)
            for folder in folders:
                while True:
                    try:
                        folder.rmdir()
                        break
                    except FileNotFoundError:
                        break
                    except OSError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Returns the children of a single-threaded process."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
