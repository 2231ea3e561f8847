"""Processes of each worker that fork children: one of 9 MB that calls clients, and one that has imported commands.

A fork copies the page tables of its parent, and both take a page fault for each page that they write to: a worker of
pytest has 140 MB, and for a client that sends one packet this would be most of the time. A new interpreter takes 0.3 s of
processor time to import the agent, and a forked child has its modules.

A server gets requests and, with each, a pipe for the result and the streams of the child. It has exited when the process
that uses it has: that end of the socket is closed then.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.lab.spaces import Space

#: Modules without state, which import little. Other functions might depend on what a test has changed in its process.
_MODULES = {
    "tests.e2e.connection_load",
    "tests.lab.choices",
    "tests.lab.clients",
    "tests.lab.holders",
    "tests.lab.servers",
    "tests.operator.migrate.traffic",
}
_PLAIN = {bool, float, int, str}
#: The length of a process id or a wait status in a pipe.
_NUMBER_BYTES = 4
#: The longest request, which has the caller's environment.
_MOST = 1 << 17


def can_call(function: Callable[..., object], args: tuple[Any, ...]) -> bool:
    """True if the function and its arguments are the same in a server as in this process."""
    return function.__module__ in _MODULES and all(map(_is_same, args))


def _is_same(value: object) -> bool:
    if type(value) in {list, tuple}:
        return all(map(_is_same, value))  # type: ignore[call-overload]
    return type(value) in _PLAIN or getattr(value, "__module__", None) in _MODULES


class ForkServer:
    """This process's end of a server, which is started on first use."""

    def __init__(self) -> None:
        #: The sockets of processes: a forked child has closed that of its parent, or is not to use it.
        self._started: dict[int, socket.socket] = {}
        self._lock = threading.Lock()

    def call(
        self,
        space: Space,
        function: Callable[..., object],
        args: tuple[Any, ...],
        timeout: float,
        imports: Iterable[str] = (),
        sockets: Iterable[int] = (),
    ) -> tuple[bytes, int]:
        """Calls the function in a child; returns the pickled result and the child's wait status.

        The server imports ``imports`` before. ``sockets`` precede the arguments, as sockets of the child.
        """
        streams = (0, 1, 2, *sockets)
        with os.fdopen(self._send(space, function, args, timeout, imports, streams), "rb") as pipe:
            data = pipe.read()
        if len(data) < _NUMBER_BYTES:
            raise ForkServerError
        return data[:-_NUMBER_BYTES], int.from_bytes(data[-_NUMBER_BYTES:])

    def start(
        self,
        space: Space,
        function: Callable[..., object],
        args: tuple[Any, ...],
        imports: Iterable[str],
        streams: tuple[int, int, int],
    ) -> tuple[int, int]:
        """Starts a process that calls the function, in its own session: its id, and a pipe for :func:`read_status`."""
        pipe = self._send(space, function, args, None, imports, streams)
        data = os.read(pipe, _NUMBER_BYTES)
        if not data:
            os.close(pipe)
            raise ForkServerError
        return int.from_bytes(data), pipe

    def _send(
        self,
        space: Space,
        function: Callable[..., object],
        args: tuple[Any, ...],
        timeout: float | None,
        imports: Iterable[str],
        streams: tuple[int, ...],
    ) -> int:
        """Sends a request; returns the pipe that the reply comes from."""
        reader, writer = os.pipe()
        try:
            request = pickle.dumps((space, function, args, timeout, tuple(imports)))
            socket.send_fds(self._control(), [request], [writer, *streams])
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return reader

    def _control(self) -> socket.socket:
        me = os.getpid()
        with self._lock:
            if me not in self._started:
                here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with there:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "tests.lab.fork_server", str(there.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[there.fileno()],
                        cwd=Path(__file__).parents[2],
                    )
                self._started[me] = here
                atexit.register(_end, here, process)
            return self._started[me]


#: Calls clients.
CLIENTS = ForkServer()
#: Has the modules of commands.
COMMANDS = ForkServer()


class ForkServerError(RuntimeError):
    def __init__(self) -> None:
        super().__init__("the fork server has exited; its error output says why")


def read_status(pipe: int) -> int:
    """The wait status of a started process; waits until it has ended."""
    data = os.read(pipe, _NUMBER_BYTES)
    if not data:
        raise ForkServerError
    return int.from_bytes(data)


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    # Also if a child has the descriptor, too.
    control.shutdown(socket.SHUT_RDWR)
    process.wait()


# -- the server


def main() -> None:
    # It ends with the process that uses it, which may still need it after an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What is collected would be copied to each child.
    gc.disable()
    process = _serve(socket.socket(fileno=int(sys.argv[1])))
    if process is not None:
        process()


def _serve(control: socket.socket) -> Callable[[], object] | None:
    """Returns None at the end of the input. In a child it returns what a process is to do."""
    #: The child and the pipe of each request, by the file descriptor that tells its end.
    children: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                os.close(fd)
                pid, writer = children.pop(fd)
                _, status = os.waitpid(pid, 0)
                # The one who called may have been interrupted.
                with suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
                    pipe.write(status.to_bytes(_NUMBER_BYTES))
                continue
            request, descriptors, _, _ = socket.recv_fds(control, _MOST, 5)
            if not request:
                return None
            # This imports the function's module, and each child would.
            space, function, args, timeout, imports = pickle.loads(request)
            for name in imports:
                importlib.import_module(name)
            gc.freeze()
            writer, *streams = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                # A child that keeps another one's pipe open keeps that one's result from ending.
                for other in (*children, *(pipe for _, pipe in children.values())):
                    os.close(other)
                sockets = [socket.socket(fileno=each) for each in streams[3:]]
                _take(streams[:3])
                if timeout is None:
                    # Whoever knows its id may signal its group.
                    os.setsid()
                    os.write(writer, os.getpid().to_bytes(_NUMBER_BYTES))
                    os.close(writer)
                    return lambda: _run(space, function, args)
                _answer(space, writer, function, (*sockets, *args), timeout)
            child = os.pidfd_open(pid)
            poll.register(child, select.POLLIN)
            children[child] = pid, writer
            for stream in streams:
                os.close(stream)


def _take(streams: list[int]) -> None:
    """In a child: these are the standard streams, and signals and garbage collection are as in a new interpreter."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()


def _answer(
    space: Space, writer: int, function: Callable[..., object], args: tuple[Any, ...], timeout: float
) -> None:
    """In a child: calls the function and exits."""
    try:
        space.answer(writer, function, args, timeout)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _run(space: Space, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    """In a child, which exits as every interpreter does once this returns or raises an exception."""
    space.enter()
    function(*args)


if __name__ == "__main__":
    main()
