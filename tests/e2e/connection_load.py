"""Opens connections from a pod continuously, while a test stops, starts or reconfigures the agent."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.lab import clients
from tests.lab.processes import Child, read_line
from tests.lab.spaces import Space

#: The client's pause before each connection. Without one it would take a whole processor from the agent whose work is
#: watched: with this one it opens hundreds of connections in each second.
_PAUSE = 0.001


class Load:
    def __init__(self, process: Child) -> None:
        self._process = process
        self.result: dict[str, Any] = {}

    def stop(self) -> None:
        self._process.stdin.close()
        self.result = json.loads(self._process.stdout.read())
        self._process.wait()


@contextmanager
def running(pod: Space, host: str, port: int) -> Iterator[Load]:
    """Yields a load whose ``result`` has the number of connections and the errors, after the block."""
    process = pod.fork(main, host, port)
    assert read_line(process) == "ready"
    load = Load(process)
    yield load
    load.stop()


def main(host: str, port: int) -> None:
    """Opens connections and sends requests on a long-lived one, until standard input ends."""
    count, errors = 0, []
    slowest = 0.0
    long = socket.create_connection((host, port), 20)
    long.recv(4096)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], _PAUSE)[0]:
        began = time.monotonic()
        try:
            clients.ask_tcp(host, port, 20)
            long.sendall(b"still there?")
            if not long.recv(100):
                raise OSError("the long connection ended")
        except OSError as error:
            errors.append(repr(error))
        slowest = max(slowest, time.monotonic() - began)
        count += 1
    print(json.dumps({"count": count, "errors": errors, "slowest": slowest}))
