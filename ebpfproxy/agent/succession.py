"""How an agent takes the place of one that still runs (``ebpfproxy run --standby``).

While a DaemonSet's pod is replaced, both pods may be on the node for a while. The new agent waits for the
lock of the roots, and connects to a socket of the old one. When the old one is told to end, it passes its
listening sockets, releases the lock, and answers health checks until the new one is healthy, which closes the
connection. No port is ever closed, no check is answered by an agent that knows nothing yet, and no two agents
write maps.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from contextlib import suppress
from pathlib import Path

from ebpfproxy.agent import state
from ebpfproxy.agent.local_socket import NoAgentError, is_root, socket_of
from ebpfproxy.datapath.kernel import roots
from ebpfproxy.health.listeners import Listeners
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: An agent that ends answers health checks for so long: less than the 30 s after which the kubelet kills it.
LINGER_SECONDS = 20.0
#: Its successor answers itself after so long, healthy or not.
HOLD_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
#: Less than the kernel allows in one message (SCM_MAX_FD).
_AT_ONCE = 200
_END = b"."


def _address(name: str) -> str:
    return f"\0{name}/successor"


class Successors:
    """Where an agent that waits for the end of this one connects."""

    def __init__(self, name: str) -> None:
        """``name``: of the local socket, which the record in the maps tells. Raises OSError."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(_address(name))
        self._listener.listen()

    def hand_over(self, listeners: Listeners, lock: roots.Lock) -> None:
        """Releases the lock. If an agent waits, it gets the sockets, and this returns once it is healthy."""
        with self._listener:
            successor = self._accept()
            if successor is None:
                lock.release()
                return
            with successor:
                log.info("another agent takes over")
                successor.settimeout(LINGER_SECONDS)
                # It may end at any moment.
                with suppress(OSError):
                    numbers = [each.fileno() for each in listeners.sockets()]
                    for at in range(0, len(numbers), _AT_ONCE):
                        socket.send_fds(successor, [b"x"], numbers[at : at + _AT_ONCE])
                    successor.sendall(_END)
                lock.release()
                with suppress(OSError):
                    successor.recv(1)

    def _accept(self) -> socket.socket | None:
        """The first that waits, whom root runs."""
        while True:
            try:
                found, _ = self._listener.accept()
            except OSError:
                return None
            if is_root(found):
                return found
            found.close()


class Predecessor:
    """The agent before this one, which answers health checks until :meth:`dismiss`."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._sockets: list[socket.socket] = []

    def dismiss(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def wait_for_lock(
        self, folders: list[tuple[str, Path]], bpf_root: Path
    ) -> tuple[roots.Lock, list[socket.socket]]:
        """The lock, once nobody else has it, and the listening sockets of who had it."""
        is_told = False
        while True:
            try:
                lock = roots.Lock(folders)
            except roots.RootError as error:
                if not is_told:
                    log.info("waiting for the other agent to end", reason=str(error))
                    is_told = True
            else:
                # What it has passed was sent before the lock was released.
                self._receive()
                return lock, self._sockets
            if self._connection is None:
                self._connect(bpf_root)
            self._wait()

    def _connect(self, bpf_root: Path) -> None:
        found = state.load_latest(roots.pin_folder(bpf_root))
        if found is None or not found.socket:
            return
        try:
            connection = socket_of(found.netns)
        except NoAgentError:
            return
        # A record may be that of an agent that has ended, or of a version that has no such socket.
        try:
            connection.connect(_address(found.socket))
        except OSError:
            connection.close()
            return
        if not is_root(connection):
            connection.close()
            return
        connection.setblocking(False)
        self._connection = connection

    def _wait(self) -> None:
        if self._connection is None:
            time.sleep(_PAUSE_SECONDS)
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            if selector.select(_PAUSE_SECONDS):
                self._receive()
        if self._sockets:
            # All is passed: the lock follows at once.
            time.sleep(_PAUSE_SECONDS / 10)

    def _receive(self) -> None:
        """Takes what was passed, as far as it is there."""
        while self._connection is not None:
            try:
                data, numbers, _, _ = socket.recv_fds(self._connection, 1, _AT_ONCE)
            except BlockingIOError:
                return
            except OSError:
                data, numbers = b"", []
            for number in numbers:
                os.set_inheritable(number, False)
                self._sockets.append(socket.socket(fileno=number))
            if not data:
                # It has ended without a successor, or failed.
                self.dismiss()
