"""Processes in a network namespace and a cgroup; nothing else of them is separate."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def read_line(process: subprocess.Popen[bytes]) -> str:
    """The next line of a process's output. Raises RuntimeError where it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}; its error output says why")
    return line.decode().rstrip("\n")


class Space:
    """A namespace by name (in /run/netns) with the cgroup that its processes belong to."""

    def __init__(self, netns: str, cgroup: Path | None) -> None:
        """Without a ``cgroup`` processes stay in the one that they come from."""
        self.netns = netns
        self._cgroup = cgroup
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def cgroup(self) -> Path:
        assert self._cgroup is not None
        return self._cgroup

    def _enter(self, *, join_cgroup: bool = True) -> None:
        """In a child: joins both. The mounts stay, so bpffs and cgroups are as outside."""
        if join_cgroup and self._cgroup is not None:
            (self._cgroup / "cgroup.procs").write_text("0")
        fd = os.open(f"/run/netns/{self.netns}", os.O_RDONLY)
        if _libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {self.netns}")
        os.close(fd)

    def popen(
        self, command: list[str], *, join_cgroup: bool = True, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Starts a process here; it is ended with the lab."""
        process = subprocess.Popen(
            command,
            preexec_fn=lambda: self._enter(join_cgroup=join_cgroup),
            start_new_session=True,
            **options,
        )
        self._children.append(process)
        return process

    def run(self, command: list[str], *, timeout: float = 60, check: bool = True) -> str:
        """Runs a command here to its end and returns what it printed."""
        done = subprocess.run(
            command,
            preexec_fn=self._enter,
            capture_output=True,
            timeout=timeout,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} failed ({done.returncode}): {done.stdout}{done.stderr}")
        return done.stdout

    def call(self, function: Callable[..., R], *args: Any, timeout: float = 60) -> R:
        """Runs a function in a forked child here; returns its result or raises its exception.

        Raises TimeoutError after ``timeout`` seconds, and RuntimeError where the child ended without an
        answer or its answer cannot be pickled.
        """
        # What is buffered now would be written by the child as well.
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reader)
                # The parent's handler (pytest-timeout has one) is not the child's.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, timeout)
                with os.fdopen(writer, "wb") as pipe:
                    pipe.write(self._answer(function, args))
                sys.stdout.flush()
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            raise TimeoutError(f"{function.__name__} in {self.netns} took longer than {timeout} s")
        if not data:
            raise RuntimeError(f"{function.__name__} in {self.netns} ended with wait status {status}")
        good, value = pickle.loads(data)
        if not good:
            raise value
        return value  # type: ignore[no-any-return]

    def _answer(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
        """In a child: the pickled result (True, value) or (False, exception)."""
        try:
            self._enter()
            return pickle.dumps((True, function(*args)))
        except BaseException as error:
            trace = traceback.format_exc()
            error.add_note(trace)
            try:
                data = pickle.dumps((False, error))
                pickle.loads(data)
            except Exception:
                return pickle.dumps((False, RuntimeError(trace)))
            return data

    def end(self) -> None:
        """Ends what was started here, and only that."""
        for process in self._children:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._children:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self._children.clear()
