"""How commands ask the running agent: HTTP over a socket of its network namespace, for root alone.

The name is an abstract one (unix(7)): it ends with the process, leaves no file, and needs no folder that a
container and its host share. A bpffs, which they do share, cannot hold a socket; and the server of metrics
may be switched off, or open to the network. Anybody may take a name: so it is one that nobody can guess, the
agent's record in the maps tells it (``agent.state``), and each side checks that the other is root.
"""

from __future__ import annotations

import http.client
import secrets
import socket
import struct
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.agent import state
from ebpfproxy.datapath.kernel.roots import is_locked, pin_folder
from ebpfproxy.health.http import Answer, HttpThread, Respond, text_answer
from ebpfproxy.netlink.namespaces import NO_ENTRY, may_enter, socket_with_cookie

#: A command waits for so long: the reconciler may be busy with a change of everything.
SECONDS = 10.0
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_BACKLOG = 16
#: What is said of an agent that does not understand, or is not understood.
OTHER_VERSION = "the agent is of another version"


class NoAgentError(Exception):
    """No agent answers on this root; the message says what happened."""


class Reply(NamedTuple):
    """``status`` is HTTP's."""

    status: int
    body: bytes


def is_root(peer: socket.socket) -> bool:
    """True if root has made the other end."""
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(packed)
    return bool(uid == 0)


class LocalServer:
    """Answers commands in a thread of its own, while the reconciler is busy, too."""

    def __init__(self, pages: Mapping[str, Respond]) -> None:
        """``pages``: by the first part of a path; each gets what follows it."""
        self.name = f"ebpfproxy/{secrets.token_hex(16)}"
        self._pages = dict(pages)
        self._thread = HttpThread("local")

    def start(self) -> None:
        """Begins to answer. Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        listener.bind(f"\0{self.name}")
        listener.listen(_BACKLOG)
        self._thread.add(listener, self._respond, is_root)
        self._thread.start()

    def stop(self) -> None:
        """Who still waits for an answer gets none."""
        self._thread.stop()

    def _respond(self, path: str) -> Answer | Future[Answer]:
        kind, _, rest = path.removeprefix("/").partition("/")
        page = self._pages.get(kind)
        return page(rest) if page is not None else text_answer(OTHER_VERSION, 501)


class _Connection(http.client.HTTPConnection):
    def __init__(self, name: str, netns: int, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._name = name
        self._netns = netns

    def connect(self) -> None:
        self.sock = socket_of(self._netns)
        self.sock.settimeout(self.timeout)
        self.sock.connect(f"\0{self._name}")
        if not is_root(self.sock):
            raise NoAgentError("its socket belongs to somebody who is not root")


def socket_of(netns: int) -> socket.socket:
    """A socket of the network namespace with this cookie, as names belong to one. Raises NoAgentError."""
    found = socket_with_cookie(netns, socket.AF_UNIX, socket.SOCK_STREAM)
    if found is not None:
        return found
    why = "" if may_enter() else f": {NO_ENTRY}"
    raise NoAgentError(f"the agent's network namespace cannot be seen from here{why}")


def ask(bpf_root: Path, path: str, seconds: float = SECONDS) -> Reply:
    """Asks the agent that works on ``bpf_root``; ``path`` as a page of :class:`LocalServer` has it.

    Raises NoAgentError, and OSError without such a folder.
    """
    agent = state.load_latest(pin_folder(bpf_root)) if is_locked(bpf_root) else None
    if agent is None:
        raise NoAgentError("no agent runs")
    if not agent.socket:
        raise NoAgentError(OTHER_VERSION)
    return ask_at(agent.socket, agent.netns, path, seconds)


def ask_at(name: str, netns: int, path: str, seconds: float = SECONDS) -> Reply:
    """Asks at the socket with this name in the network namespace with this cookie. Raises NoAgentError."""
    connection = _Connection(name, netns, seconds)
    try:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        return Reply(response.status, response.read())
    except ConnectionRefusedError:
        raise NoAgentError("the agent is starting") from None
    except (OSError, http.client.HTTPException) as error:
        raise NoAgentError(f"the agent does not answer: {error}") from error
    finally:
        connection.close()
