"""``ebpfproxy ui`` as a process of a lab node, and what it sends."""

from __future__ import annotations

import json
import re
import select
import socket
import time
from http.client import HTTPConnection
from typing import Any, NamedTuple

from tests.lab import LabNode

_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)/#key=([\w-]+)\n")


class Ui:
    """A running command; ``address`` is what it has printed."""

    def __init__(self, node: LabNode, *before: str, stdin: int | None = None) -> None:
        self._node = node
        options = ["--listen", "127.0.0.1:0", "--bpf-root", str(node.bpf_root)]
        names = ["--cni-results", str(node.cni_results)]
        command = [*before, "ui", *options, *names]
        self.process = node.start_command(command, stdin=stdin, stdout=-1, stderr=-1)
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        found = _ADDRESS.fullmatch(line)
        assert found is not None, line + self.process.stderr.read()
        self.address = line.decode().strip()
        self.port, self.key = int(found[1]), found[2].decode()

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        return self._node.call(_get, self.port, path, {"Authorization": f"Bearer {self.key}", **headers})

    def connect(self) -> socket.socket:
        """A connection that sends nothing by itself."""
        opened, _ = self._node.open(_connected, self.port)
        return opened

    def stream(self, query: str = "") -> Stream:
        opened = self.connect()
        return Stream(opened, f"/api/decisions{query}", self.key)

    def end(self) -> tuple[int, str]:
        """Sends SIGTERM; returns the exit code, and what it has written to standard error."""
        self.process.terminate()
        errors = self.process.communicate(timeout=30)[1]
        return self.process.wait(), errors.decode()


def _get(port: int, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read()


def _connected(port: int) -> tuple[socket.socket, None]:
    return socket.create_connection(("127.0.0.1", port)), None


class Event(NamedTuple):
    name: str
    data: Any


class Stream:
    """Server-sent events, over a connection of its own."""

    def __init__(self, connection: socket.socket, path: str, key: str) -> None:
        self._socket = connection
        self.events: list[Event] = []
        self._rest = b""
        self.ended = False
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n"
        connection.sendall(request.encode())

    def poll(self) -> list[Event]:
        """All events so far, without waiting for any."""
        while not self.ended and select.select([self._socket], [], [], 0)[0]:
            data = self._socket.recv(65536)
            self.ended = not data
            self._rest += data
            if b"\r\n0\r\n\r\n" in self._rest:
                self.ended = True
        *blocks, self._rest = self._rest.split(b"\n\n")
        for block in blocks:
            if found := re.search(rb"event: (\w+)\ndata: (.*)\Z", block, re.DOTALL):
                self.events.append(Event(found[1].decode(), json.loads(found[2])))
        return self.events

    def lines(self) -> list[dict[str, Any]]:
        """The decisions so far."""
        return [line for event in self.poll() if event.name == "decisions" for line in event.data]

    def states(self) -> list[dict[str, Any]]:
        return [event.data for event in self.poll() if event.name == "state"]

    @property
    def is_tracing(self) -> bool:
        return bool(self.states() and self.states()[-1]["tracing"])

    def wait_tracing(self, seconds: float = 60) -> Stream:
        deadline = time.monotonic() + seconds
        while not self.is_tracing:
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.02)
        return self

    def close(self) -> None:
        self._socket.close()
