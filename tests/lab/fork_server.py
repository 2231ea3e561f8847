"""A process of each worker that forks children to call clients: it has 9 MB, and a worker of pytest 140.

A fork copies the page tables of its parent, and both take a page fault for each page that they write to. For a client that
sends one packet this is most of the time.

The server gets requests and, with each, a pipe for the result and the output streams of the moment. It has exited when
the process that uses it has: that end of the socket is closed then.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.lab.spaces import Space

#: Modules without state, which import little. Other functions might depend on what a test has changed in its process.
_MODULES = {"tests.lab.clients", "tests.lab.choices"}
_PLAIN = {bool, float, int, str}
_STATUS_BYTES = 4

#: The sockets of processes: a forked child has closed that of its parent, or is not to use it.
_started: dict[int, socket.socket] = {}


def can_call(function: Callable[..., object], args: tuple[Any, ...]) -> bool:
    """True if the function and its arguments are the same in the server as in this process."""
    return function.__module__ in _MODULES and all(
        type(each) in _PLAIN or getattr(each, "__module__", None) in _MODULES for each in args
    )


def call(
    space: Space, function: Callable[..., object], args: tuple[Any, ...], timeout: float
) -> tuple[bytes, int]:
    """Calls the function in a child of the server; returns the pickled result and the child's wait status."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe:
        try:
            request = pickle.dumps((space, function, args, timeout))
            socket.send_fds(_control(), [request], [writer, 1, 2])
        finally:
            os.close(writer)
        data = pipe.read()
    if len(data) < _STATUS_BYTES:
        raise RuntimeError("the fork server has exited; its error output says why")
    return data[:-_STATUS_BYTES], int.from_bytes(data[-_STATUS_BYTES:])


def _control() -> socket.socket:
    me = os.getpid()
    if me not in _started:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.lab.fork_server", str(there.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                cwd=Path(__file__).parents[2],
            )
        _started[me] = here
        atexit.register(_end, here, process)
    return _started[me]


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    # Also if a child has the descriptor, too.
    control.shutdown(socket.SHUT_RDWR)
    process.wait()


def main() -> None:
    # Each child would import them.
    for name in (*_MODULES, "tests.lab.spaces"):
        importlib.import_module(name)
    # It ends with the process that uses it, which may still need it after an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    #: The child and the pipe of each call, by the file descriptor that tells its end.
    calls: dict[int, tuple[int, int]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in calls:
                poll.unregister(fd)
                os.close(fd)
                pid, writer = calls.pop(fd)
                _, status = os.waitpid(pid, 0)
                # The one who called may have been interrupted.
                with suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
                    pipe.write(status.to_bytes(_STATUS_BYTES))
                continue
            request, descriptors, _, _ = socket.recv_fds(control, 65536, 3)
            if not request:
                return
            pid = os.fork()
            if pid == 0:
                # A child that keeps another one's pipe open keeps that one's result from ending.
                for other in (control.fileno(), *calls, *(pipe for _, pipe in calls.values())):
                    os.close(other)
                _answer(request, *descriptors)
            child = os.pidfd_open(pid)
            poll.register(child, select.POLLIN)
            calls[child] = pid, descriptors[0]
            for stream in descriptors[1:]:
                os.close(stream)


def _answer(request: bytes, writer: int, *streams: int) -> None:
    """In a child: calls the function and exits."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream, number)
            os.close(stream)
        space, function, args, timeout = pickle.loads(request)
        space.answer(writer, function, args, timeout)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
