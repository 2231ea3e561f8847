"""Connections without end, in a pod, while a test does something to the agent."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.lab import clients
from tests.lab.spaces import Space


class Load:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.result: dict[str, Any] = {}

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self.result = json.loads(self._process.stdout.read())
        self._process.wait(10)


@contextmanager
def running(pod: Space, host: str, port: int) -> Iterator[Load]:
    """Its ``result`` afterwards: how many connections, and the errors of those that failed."""
    command = [sys.executable, "-m", "tests.e2e.load", host, str(port)]
    load = Load(pod.popen(command, stdin=-1, stdout=-1))
    assert load._process.stdout is not None
    assert load._process.stdout.readline() == b"ready\n"
    yield load
    load.stop()


def main(host: str, port: int) -> None:
    """New connections, and a long one that is asked all the time; until standard input ends."""
    count, errors = 0, []
    slowest = 0.0
    long = socket.create_connection((host, port), 20)
    long.recv(4096)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
