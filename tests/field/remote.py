"""A socket in a pod, a node or outside, driven from a test step by step.

``python -m tests.field.remote FAMILY TYPE PROTOCOL`` reads a JSON list a line, a method's name and its arguments,
and answers with a JSON line: what the method gave, or the name of its error.
"""

from __future__ import annotations

import ctypes
import errno
import json
import socket
import subprocess
import sys
from typing import Any

from tests.lab.spaces import Space, read_line

_libc = ctypes.CDLL(None, use_errno=True)


class Remote:
    """The same from outside. Every method gives a name such as ECONNREFUSED where the kernel gives an error."""

    def __init__(
        self, space: Space, host: str, *, protocol: int = 0, kind: socket.SocketKind = socket.SOCK_DGRAM
    ) -> None:
        """``host``: an address of the family that is meant."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        numbers = [str(int(each)) for each in (family, kind, protocol)]
        command = [sys.executable, "-m", "tests.field.remote", *numbers]
        self._process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(read_line(self._process))

    def bind(self, host: str, port: int) -> Any:
        return self._do("bind", host, port)

    def connect(self, host: str, port: int) -> Any:
        return self._do("connect", host, port)

    def disconnect(self) -> Any:
        """connect() with AF_UNSPEC: a datagram socket has no peer any more (connect(2))."""
        return self._do("disconnect")

    def peer(self) -> Any:
        """[host, port], as getpeername() has it."""
        return self._do("peer")

    def send(self, data: str = "?") -> Any:
        return self._do("send", data)

    def sendto(self, host: str, port: int, data: str = "?") -> Any:
        return self._do("sendto", data, host, port)

    def receive(self, seconds: float = 3.0) -> Any:
        """[data, host, port]; "nothing" after some seconds."""
        return self._do("receive", seconds)

    def ask(self, seconds: float = 3.0) -> Any:
        """Sends on the connected socket; the name of who answers, or the error of the one or the other."""
        error = self.send()
        if error is not None:
            return error
        answer = self.receive(seconds)
        return json.loads(answer[0])["name"] if isinstance(answer, list) else answer

    def ask_at(self, host: str, port: int, seconds: float = 3.0) -> Any:
        """As :meth:`ask` with an address; checks that the answer comes from it."""
        error = self.sendto(host, port)
        if error is not None:
            return error
        answer = self.receive(seconds)
        if not isinstance(answer, list):
            return answer
        assert answer[1:] == [host, port], f"answer from {answer[1:]}"
        return json.loads(answer[0])["name"]

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


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
