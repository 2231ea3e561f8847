"""Processes of the tests: children of this one, and those that a fork server has started."""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from tests.lab.fork_server import ForkServer, read_status

if TYPE_CHECKING:
    from tests.lab.spaces import Space

#: A stream as subprocess.Popen takes it: a file, a descriptor, PIPE, DEVNULL, or None for this process's own.
Stream = IO[bytes] | int | None


class Forked:
    """A process that runs a function of the tests, with the part of subprocess.Popen's interface that they use."""

    def __init__(self, name: str, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.args, self.pid, self.stdin, self.stdout = name, pid, stdin, stdout
        self.stderr: IO[bytes] | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        self._wait(os.WNOHANG)
        return self.returncode

    def wait(self) -> int:
        while self.returncode is None:
            self._wait(0)
        return self.returncode

    def _wait(self, options: int) -> None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Served:
    """A process with the part of subprocess.Popen's interface that tests use.

    It is a child of the server, which reports its end.
    """

    def __init__(
        self,
        server: ForkServer,
        space: Space,
        function: Callable[..., object],
        *args: Any,
        name: object = None,
        imports: tuple[str, ...] = (),
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> None:
        """``name``: what the process is called in messages, instead of the function."""
        self.args = name or f"{function.__module__}.{function.__name__}"
        self.returncode: int | None = None
        self._lock = threading.Lock()
        theirs: list[int] = []
        #: These descriptors are closed here once the process has them.
        opened: list[int] = []
        ours: list[IO[bytes] | None] = []
        try:
            for number, stream in enumerate((stdin, stdout, stderr)):
                ours.append(None)
                if stream is None:
                    theirs.append(number)
                elif stream == subprocess.DEVNULL:
                    opened.append(os.open(os.devnull, os.O_RDWR))
                    theirs.append(opened[-1])
                elif stream == subprocess.PIPE:
                    reader, writer = os.pipe()
                    near, far = (writer, reader) if number == 0 else (reader, writer)
                    ours[-1] = os.fdopen(near, "wb" if number == 0 else "rb")
                    opened.append(far)
                    theirs.append(far)
                else:
                    theirs.append(stream if isinstance(stream, int) else stream.fileno())
            stdin_, stdout_, stderr_ = theirs
            self.pid, self._status = server.start(space, function, args, imports, (stdin_, stdout_, stderr_))
        finally:
            for each in opened:
                os.close(each)
        #: Each is None where the stream is no pipe, as with Popen.
        self.stdin: Any
        self.stdout: Any
        self.stderr: Any
        self.stdin, self.stdout, self.stderr = ours

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and self._is_readable(0):
                self.returncode = os.waitstatus_to_exitcode(read_status(self._status))
                os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = _until(deadline)
            if left == 0:
                raise subprocess.TimeoutExpired(str(self.args), timeout or 0)
            # Another thread may see the end first.
            self._is_readable(1 if left is None else min(left, 1))
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Closes standard input, reads the other streams to their ends, and waits. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            with suppress(BrokenPipeError):
                self.stdin.close()
        found: dict[Any, bytes] = {each: b"" for each in (self.stdout, self.stderr) if each is not None}
        with selectors.DefaultSelector() as selector:
            for each in found:
                selector.register(each, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(_until(deadline))
                if not ready and deadline is not None and time.monotonic() >= deadline:
                    raise subprocess.TimeoutExpired(str(self.args), timeout or 0)
                for key, _ in ready:
                    # read1() first returns what a read of a line has left in the buffer.
                    pipe: Any = key.fileobj
                    data = pipe.read1(1 << 16)
                    found[pipe] += data
                    if not data:
                        selector.unregister(pipe)
                        pipe.close()
        self.wait(_until(deadline))
        return found.get(self.stdout), found.get(self.stderr)

    def send_signal(self, number: int) -> None:
        # It may end at any time.
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _is_readable(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        return bool(poll.poll(seconds * 1000))


def _until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


Child = Forked | Served
Process = subprocess.Popen[bytes] | Child


def read_line(process: Process) -> str:
    """The next line of a process's output. Raises RuntimeError if it has exited."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}; its error output says why")
    return line.decode().rstrip("\n")
