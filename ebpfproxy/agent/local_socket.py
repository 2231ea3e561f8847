"""How commands ask the running agent: HTTP over a socket of its network namespace, for root alone.

The name is an abstract one (unix(7)): it ends with the process, leaves no file, and needs no folder that a
container and its host share. A bpffs, which they do share, cannot hold a socket; and the server of metrics
may be switched off, or open to the network. Each side checks that the other is root: anybody may take a name.
"""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.health.http import Answer, HttpThread, Respond
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: A command waits for so long: the reconciler may be busy with a change of everything.
SECONDS = 10.0
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_BACKLOG = 16


class NoAgentError(Exception):
    """No agent answers on this root in this network namespace; the message says what happened."""


class Reply(NamedTuple):
    """``status`` is HTTP's."""

    status: int
    body: bytes


def _name(bpf_root: Path) -> str:
    """The folder itself names its one agent, by whichever path it is reached."""
    found = bpf_root.stat()
    return f"\0ebpfproxy/{found.st_dev:x}-{found.st_ino:x}"


def _is_root(peer: socket.socket) -> bool:
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(packed)
    return bool(uid == 0)


class LocalServer:
    """Answers commands in a thread of its own: a question may wait for the reconciler."""

    def __init__(self, bpf_root: Path, pages: Mapping[str, Respond]) -> None:
        """``pages``: by the first part of a path; each gets what follows it."""
        self._bpf_root = bpf_root
        self._pages = dict(pages)
        self._thread = HttpThread("local")

    def start(self) -> None:
        """Begins to answer. Without the name the agent works as well: commands then say that it is silent."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(_name(self._bpf_root))
            listener.listen(_BACKLOG)
        except OSError as error:
            log.error("failed to listen for commands", error=str(error))
            listener.close()
        else:
            self._thread.add(listener, self._respond, _is_root)
        self._thread.start()

    def stop(self) -> None:
        self._thread.stop()

    def _respond(self, path: str) -> Answer:
        kind, _, rest = path.removeprefix("/").partition("/")
        page = self._pages.get(kind)
        return page(rest) if page is not None else Answer(404, "text/plain", b"")


class _Connection(http.client.HTTPConnection):
    def __init__(self, name: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._name = name

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._name)
        if not _is_root(self.sock):
            raise NoAgentError("its socket belongs to somebody who is not root")


def ask(bpf_root: Path, path: str) -> Reply:
    """Asks the agent that works on ``bpf_root``; ``path`` as a page of :class:`LocalServer` has it.

    Raises NoAgentError.
    """
    connection: _Connection | None = None
    try:
        connection = _Connection(_name(bpf_root))
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        return Reply(response.status, response.read())
    except ConnectionRefusedError:
        raise NoAgentError("no agent runs in this network namespace") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoAgentError(f"the agent does not answer: {error}") from error
    finally:
        if connection is not None:
            connection.close()
