"""Processes in a network namespace and a cgroup, without other isolation."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tests.lab import fork_server
from tests.lab.processes import Child, Forked, Process, Served, Stream

if TYPE_CHECKING:
    from tests.lab.command import Done

R = TypeVar("R")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

#: A lab has no addresses of a family that the kernel does not know, and its servers listen on the other.
HAS_IPV6 = Path("/proc/net/if_inet6").exists()

#: Moves a process into a cgroup, whose file is the first argument, before it runs the command in the others.
_JOIN = 'echo 0 >"$0" && exec "$@"'


def enter_namespace(path: str) -> None:
    """Moves this thread into the network namespace that is mounted at ``path``. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if _libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(fd)


def leave_namespace() -> None:
    """Moves this thread into a new network namespace. Raises OSError."""
    if _libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")


@contextmanager
def namespace_restored() -> Iterator[None]:
    """Restores the network namespace of this thread when the context ends.

    Sockets stay in the namespace in which they were opened, and /proc/sys/net is that of the thread's namespace. This
    takes a tenth of the time of a forked child.
    """
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        yield
    finally:
        enter_namespace(f"/proc/self/fd/{fd}")
        os.close(fd)


class Space:
    """A network namespace by name (in /run/netns), and the cgroup of its processes."""

    def __init__(self, netns: str, cgroup: Path | None) -> None:
        """Without a ``cgroup``, or a name, processes stay in the one of their parent."""
        self.netns = netns
        self._cgroup = cgroup
        self._children: list[Process] = []
        self._sockets: list[socket.socket] = []

    @property
    def cgroup(self) -> Path:
        assert self._cgroup is not None
        return self._cgroup

    @property
    def _plain(self) -> Space:
        """What the fork servers need of it."""
        return Space(self.netns, self._cgroup)

    def enter(self, *, join_cgroup: bool = True) -> None:
        """Joins both, in a child. The mount namespace is not changed, so that bpffs and cgroups are visible."""
        if join_cgroup and self._cgroup is not None:
            (self._cgroup / "cgroup.procs").write_text("0")
        if self.netns:
            enter_namespace(f"/run/netns/{self.netns}")

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """This thread is in the namespace, so that a process that it starts is there from the beginning.

        A function that a child has to call before its program (``preexec_fn``) would make subprocess fork: that takes
        9 ms of a worker of pytest, whose page tables are copied, instead of 1 ms.
        """
        with namespace_restored():
            enter_namespace(f"/run/netns/{self.netns}")
            yield

    def popen(
        self,
        command: list[str],
        *,
        join_cgroup: bool = True,
        before_exec: Callable[[], object] | None = None,
        **options: Any,
    ) -> subprocess.Popen[bytes]:
        """Starts a process here, which is killed at the end of the lab. ``before_exec`` is called in it at last."""

        joins = join_cgroup and self._cgroup is not None
        if joins or before_exec is not None:
            # Not by a shell as in run(): the process is in its cgroup when this method returns.
            def enter() -> None:
                self.enter(join_cgroup=join_cgroup)
                if before_exec is not None:
                    before_exec()

            process = subprocess.Popen(command, preexec_fn=enter, start_new_session=True, **options)
        else:
            with self._entered():
                process = subprocess.Popen(command, start_new_session=True, **options)
        self._children.append(process)
        return process

    def start_command(
        self,
        arguments: list[str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        environment: Mapping[str, str] | None = None,
    ) -> Served:
        """Starts ``ebpfproxy`` with these arguments here, outside the cgroup; it is killed at the end of the lab.

        It runs in a child of a process that has its modules already, as a new interpreter would run it.
        ``environment`` is added to that of this process.
        """
        from tests.lab import command  # noqa: PLC0415 - clients need none of it

        process = Served(
            fork_server.COMMANDS,
            Space(self.netns, None),
            command.main,
            arguments,
            {**os.environ, **(environment or {})},
            str(Path.cwd()),
            name=["ebpfproxy", *arguments],
            imports=command.modules(arguments),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        self._children.append(process)
        return process

    def fork(self, function: Callable[..., object], *args: Any, join_cgroup: bool = True) -> Child:
        """Starts a function here in a forked child, with pipes as standard input and output.

        It takes a tenth of the time of a new interpreter. The child is killed at the end of the lab, and exits with 1 if
        the function raises an exception. As with :meth:`call`, clients and servers are children of the fork server.
        """
        if fork_server.can_call(function, args):
            own = Space(self.netns, self._cgroup if join_cgroup else None)
            served = Served(fork_server.CLIENTS, own, function, *args, stdin=-1, stdout=-1)
            self._children.append(served)
            return served
        sys.stdout.flush()
        sys.stderr.flush()
        stdin, write_in = os.pipe()
        read_out, stdout = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _become_process(stdin, stdout)
                self.enter(join_cgroup=join_cgroup)
                function(*args)
                sys.stdout.flush()
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(stdin)
        os.close(stdout)
        name = f"{function.__module__}.{function.__name__}"
        process = Forked(name, pid, os.fdopen(write_in, "wb"), os.fdopen(read_out, "rb"))
        self._children.append(process)
        return process

    def run(self, command: list[str], *, timeout: float = 60, check: bool = True) -> str:
        """Runs a command here and returns its output. Raises FileNotFoundError if there is no such program."""
        joined = command
        if self._cgroup is not None:
            if shutil.which(command[0]) is None:
                raise FileNotFoundError(f"no program {command[0]!r}")
            joined = ["sh", "-c", _JOIN, str(self._cgroup / "cgroup.procs"), *command]
        with self._entered():
            done = subprocess.run(joined, capture_output=True, timeout=timeout, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{command} failed ({done.returncode}): {done.stdout}{done.stderr}")
        return done.stdout

    def call(self, function: Callable[..., R], *args: Any, timeout: float = 60) -> R:
        """Runs a function in a forked child here; returns its result or raises its exception.

        Clients are run by the fork server, other functions by a child of this process, which has its state.
        Raises TimeoutError after ``timeout`` seconds, and RuntimeError if the child exits without a result or
        the result cannot be pickled.
        """
        if fork_server.can_call(function, args):
            data, status = fork_server.CLIENTS.call(self._plain, function, args, timeout)
        else:
            data, status = self._fork_to_call(function, args, timeout)
        return self._result_of(function, timeout, data, status)

    def _result_of(self, function: Callable[..., R], timeout: float, data: bytes, status: int) -> R:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            raise TimeoutError(f"{function.__name__} in {self.netns} took longer than {timeout} s")
        if not data:
            raise RuntimeError(f"{function.__name__} in {self.netns} ended with wait status {status}")
        good, value = pickle.loads(data)
        if not good:
            raise value
        return value  # type: ignore[no-any-return]

    def run_command(self, arguments: list[str], *, timeout: float = 60) -> Done:
        """Runs ``ebpfproxy`` with these arguments here, in a child of a process that has its modules already.

        What a test has replaced in this process is not replaced there; to :meth:`call` ``command.run`` has it.
        """
        from tests.lab import command  # noqa: PLC0415 - clients need none of it

        args = arguments, dict(os.environ)
        imports = command.modules(arguments)
        found = fork_server.COMMANDS.call(self._plain, command.run, args, timeout, imports)
        return self._result_of(command.run, timeout, *found)

    def _fork_to_call(
        self, function: Callable[..., object], args: tuple[Any, ...], timeout: float
    ) -> tuple[bytes, int]:
        """Calls the function in a child of this process: the pickled result, and the wait status."""
        # The child would write buffered output a second time.
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self.answer(writer, function, args, timeout)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        return data, status

    def answer(
        self, writer: int, function: Callable[..., object], args: tuple[Any, ...], timeout: float
    ) -> NoReturn:
        """In a forked child: calls the function here, writes its pickled result, and exits."""
        try:
            # The child must not inherit the handler of the parent, such as that of pytest-timeout.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(self._result(function, args))
            sys.stdout.flush()
        finally:
            os._exit(0)

    def open(self, function: Callable[..., tuple[socket.socket, R]], *args: Any) -> tuple[socket.socket, R]:
        """Calls a function here as :meth:`call` does, which returns a socket and a value.

        The socket stays in this network namespace and cgroup. It is open in this process until the lab ends, so that
        a long connection needs no process of its own.
        """
        here, there = socket.socketpair()
        with here, there:
            if fork_server.can_call(function, args):
                found = fork_server.CLIENTS.call(
                    self._plain, _send_socket, (function, args), 60.0, sockets=[there.fileno()]
                )
                value: R = self._result_of(_send_socket, 60.0, *found)
            else:
                value = self.call(_send_socket, there, function, args)
            _, descriptors, _, _ = socket.recv_fds(here, 1, 1)
        opened = socket.socket(fileno=descriptors[0])
        self._sockets.append(opened)
        return opened, value

    def _result(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
        """Returns the pickled result, (True, value) or (False, exception), in a child."""
        try:
            self.enter()
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
        """Kills the processes that were started here, and closes sockets."""
        for each in self._sockets:
            each.close()
        self._sockets.clear()
        for process in self._children:
            if process.poll() is None:
                # A child of a fork server may be gone now.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self._children:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with suppress(BrokenPipeError):
                        stream.close()
        self._children.clear()


#: This process's own.
OWN = Space("", None)


def _send_socket(
    there: socket.socket, function: Callable[..., tuple[socket.socket, R]], args: tuple[Any, ...]
) -> R:
    opened, value = function(*args)
    socket.send_fds(there, [b"x"], [opened.fileno()])
    return value


def _become_process(stdin: int, stdout: int) -> None:
    """Gives a forked child what a new process has: its own session, signals and streams, and no other descriptors.

    A descriptor of a sibling's pipe would keep that pipe open. Garbage collection is off, as it might close
    descriptors of the parent whose numbers are used again.
    """
    gc.disable()
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    # pytest has replaced these streams. The function may replace them once more, which must not close what it has
    # redirected meanwhile.
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
    )
