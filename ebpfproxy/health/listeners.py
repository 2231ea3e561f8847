"""Listening sockets that outlive an agent, so that no health check is refused while the next one starts.

A connection that is made to a listening socket while nobody accepts waits in the kernel. So an agent leaves
its sockets to the next one: by systemd's store of descriptors, by itself where it starts itself anew, and to
an agent that waits for its end (``agent.succession``).
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from ebpfproxy.health.http import listen
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

#: Makes a listening socket for a host and a port, as :func:`ebpfproxy.health.http.listen`. Raises OSError.
Listen = Callable[[str, int], socket.socket]

#: The descriptors of the sockets of the agent that has replaced itself by this one, in decimal.
_OWN = "EBPFPROXY_LISTENERS"
#: The first descriptor that systemd passes (sd_listen_fds(3)).
_FIRST = 3
#: All addresses: of both families, or of IPv4 where there is no IPv6.
_WILDCARDS = ("::", "0.0.0.0")


def inherited() -> list[socket.socket]:
    """The sockets that this process was started with. Called once: they are the caller's then."""
    numbers = [int(each) for each in os.environ.pop(_OWN, "").split(",") if each]
    if os.environ.pop("LISTEN_PID", "") == str(os.getpid()):
        numbers += range(_FIRST, _FIRST + int(os.environ.pop("LISTEN_FDS", "0")))
    found = []
    for number in numbers:
        with suppress(OSError):
            os.set_inheritable(number, False)
            found.append(socket.socket(fileno=number))
    return found


class Listeners:
    """The listening sockets of this process. Any thread may use it."""

    def __init__(self, inherited: Iterable[socket.socket] = ()) -> None:
        self._lock = threading.Lock()
        self._inherited: dict[tuple[str, int], socket.socket] = {}
        self._made: list[socket.socket] = []
        self.inherit(inherited)

    def inherit(self, sockets: Iterable[socket.socket]) -> None:
        """Keeps sockets of an earlier agent for who listens at their addresses."""
        with self._lock:
            for each in sockets:
                host, port = each.getsockname()[:2]
                if not _accepts(each) or (host, port) in self._inherited:
                    each.close()
                else:
                    self._inherited[host, port] = each

    @property
    def has_inherited(self) -> bool:
        """True if sockets of an earlier agent wait for who listens at their addresses."""
        with self._lock:
            return bool(self._inherited)

    def listen(self, host: str, port: int) -> socket.socket:
        """The socket of an earlier agent with this address, else a new one. Raises OSError."""
        return self._listen(host, port)

    def listen_instead(self, host: str, port: int) -> socket.socket:
        """As :meth:`listen`, also where an earlier agent had the port at all addresses, or at one of them.

        Its socket is in the way of a new one, and is closed first.
        """
        return self._listen(host, port, closes=True)

    def _listen(self, host: str, port: int, *, closes: bool = False) -> socket.socket:
        hosts = (_canonical(host),) if host else _WILDCARDS
        with self._lock:
            at = next(((each, port) for each in hosts if (each, port) in self._inherited), None)
            found = self._inherited.pop(at) if at is not None else None
            if found is None:
                try:
                    found = listen(host, port)
                except OSError as error:
                    if not closes or error.errno != errno.EADDRINUSE or not self._close_others(hosts, port):
                        raise
                    found = listen(host, port)
            self._made = [each for each in self._made if each.fileno() >= 0]
            self._made.append(found)
        _store(found)
        return found

    def _close_others(self, hosts: Iterable[str], port: int) -> bool:
        """Closes those that exclude a socket at the hosts' port. True if there are any. The lock is held."""
        is_wildcard = not set(_WILDCARDS).isdisjoint(hosts)
        others = [at for at in self._inherited if at[1] == port and (is_wildcard or at[0] in _WILDCARDS)]
        for at in others:
            _close_everywhere(self._inherited.pop(at))
        return bool(others)

    def release_inherited(self) -> None:
        """Closes those at whose address nobody listens any more, for every process that has them."""
        with self._lock:
            unused = list(self._inherited.values())
            self._inherited.clear()
        for each in unused:
            _close_everywhere(each)

    def sockets(self) -> list[socket.socket]:
        """All that are open."""
        with self._lock:
            return [each for each in (*self._made, *self._inherited.values()) if each.fileno() >= 0]

    def leave_to_next(self) -> list[int]:
        """Copies of the descriptors, which a program that replaces this one in its process inherits."""
        copies = [os.dup(each.fileno()) for each in self.sockets()]
        for each in copies:
            os.set_inheritable(each, True)
        os.environ[_OWN] = ",".join(map(str, copies))
        return copies


def _canonical(host: str) -> str:
    """The host as the kernel shows it in a socket's name."""
    with suppress(OSError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return str(socket.getaddrinfo(host, None, family)[0][4][0])
    return host


def _close_everywhere(sock: socket.socket) -> None:
    """Nobody listens at its address then, though other processes, or systemd, may still have it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _accepts(sock: socket.socket) -> bool:
    """False once somebody has shut it down."""
    with suppress(OSError):
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _store(sock: socket.socket) -> None:
    """Has systemd keep the socket for the next start of the unit, if it keeps any (sd_notify(3)).

    systemd forgets one by itself that is shut down, and knows one that it has already.
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = f"\0{where[1:]}" if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
            there.connect(address)
            socket.send_fds(there, [b"FDSTORE=1\nFDNAME=listener"], [sock.fileno()])
    except OSError as error:
        log.debug("failed to give a socket to systemd", error=str(error))
