"""A socket in a pod, on a node or outside, whose system calls a test makes one by one.

A forked process has the socket. It reads commands, each a JSON list of a method's name and arguments in one line,
and prints a JSON line: the result, or the name of the error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import socket
import sys
from typing import Any

from tests.lab.processes import read_line
from tests.lab.spaces import Space

_libc = ctypes.CDLL(None, use_errno=True)


class Remote:
    """Controls the socket from the test. Methods return a name such as ECONNREFUSED if a system call fails."""

    def __init__(
        self, space: Space, host: str, *, protocol: int = 0, kind: socket.SocketKind = socket.SOCK_DGRAM
    ) -> None:
        """``host``: an address, which determines the family."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._process = space.fork(main, family, kind, protocol)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, *command: Any) -> Any:
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(read_line(self._process))

    def bind(self, host: str, port: int) -> Any:
        return self._do("bind", host, port)

    def connect(self, host: str, port: int) -> Any:
        return self._do("connect", host, port)

    def disconnect(self) -> Any:
        """connect() with AF_UNSPEC, which removes the peer of a datagram socket (connect(2))."""
        return self._do("disconnect")

    def peer(self) -> Any:
        """[host, port], as getpeername() returns them."""
        return self._do("peer")

    def send(self, data: str = "?") -> Any:
        return self._do("send", data)

    def sendto(self, host: str, port: int, data: str = "?") -> Any:
        return self._do("sendto", data, host, port)

    def receive(self, seconds: float = 3.0) -> Any:
        """[data, host, port], or "nothing" after ``seconds``."""
        return self._do("receive", seconds)

    def ask(self, seconds: float = 3.0) -> Any:
        """Sends on the connected socket and receives; returns the backend's name, or an error of either."""
        error = self.send()
        if error is not None:
            return error
        reply = self.receive(seconds)
        return json.loads(reply[0])["name"] if isinstance(reply, list) else reply

    def ask_at(self, host: str, port: int, seconds: float = 3.0) -> Any:
        """As :meth:`ask`, with sendto(); asserts that the reply has this address as source."""
        error = self.sendto(host, port)
        if error is not None:
            return error
        reply = self.receive(seconds)
        if not isinstance(reply, list):
            return reply
        assert reply[1:] == [host, port], f"reply from {reply[1:]}"
        return json.loads(reply[0])["name"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main(family: int, kind: int, protocol: int) -> None:
    sock = socket.socket(family, kind, protocol)
    for line in sys.stdin:
        print(json.dumps(_answer(sock, *json.loads(line))), flush=True)


def _answer(sock: socket.socket, name: str, *arguments: Any) -> Any:
    try:
        if name == "bind":
            sock.bind(tuple(arguments))
        elif name == "connect":
            sock.connect(tuple(arguments))
        elif name == "disconnect":
            if _libc.connect(sock.fileno(), bytes(16), 16):
                raise OSError(ctypes.get_errno(), "connect")
        elif name == "peer":
            return list(sock.getpeername()[:2])
        elif name == "send":
            sock.send(arguments[0].encode())
        elif name == "sendto":
            sock.sendto(arguments[0].encode(), tuple(arguments[1:]))
        else:
            sock.settimeout(arguments[0])
            data, source = sock.recvfrom(4096)
            return [data.decode(), *source[:2]]
    except TimeoutError:
        return "nothing"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None
