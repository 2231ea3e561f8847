"""Health checks as load balancers make them: a new connection each time, a short patience, from another host."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from tests.lab.processes import Child, read_line
from tests.lab.spaces import Space

#: The patience of a load balancer: a check that is not refused, but has no answer in this time, has failed, too. An agent
#: lets checks wait for so long until it is healthy (docs/configuration.md).
SECONDS = 10.0
_PAUSE = 0.005


class Probe(NamedTuple):
    host: str
    port: int
    path: str

    def once(self) -> str:
        """Why it has failed; empty where it has not."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            connection.request("GET", self.path)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        finally:
            connection.close()
        return "" if response.status == 200 else f"status {response.status}"


class Failed(NamedTuple):
    """``when`` it began."""

    path: str
    when: float
    why: str

    @property
    def is_disconnected(self) -> bool:
        """It was connected, and the connection ended."""
        return self.why.startswith(("RemoteDisconnected", "ConnectionResetError", "IncompleteRead"))


class Probed(NamedTuple):
    made: int
    failed: list[Failed]
    slowest: float


def main(probes: list[Probe]) -> None:
    stop, lock = threading.Event(), threading.Lock()
    count, slowest, failed = 0, 0.0, list[Failed]()

    def run(probe: Probe) -> None:
        nonlocal count, slowest
        while not stop.wait(_PAUSE):
            began, when = time.monotonic(), time.time()
            why = probe.once()
            with lock:
                count += 1
                slowest = max(slowest, time.monotonic() - began)
                if why:
                    failed.append(Failed(f"{probe.port}{probe.path}", when, why))

    threads = [threading.Thread(target=run, args=(probe,)) for probe in probes]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(json.dumps([count, failed, slowest]), flush=True)


class Prober:
    def __init__(self, space: Space, probes: list[Probe]) -> None:
        self._process: Child = space.fork(main, probes)
        assert read_line(self._process) == "ready"

    def stop(self) -> Probed:
        self._process.stdin.close()
        made, failed, slowest = json.loads(self._process.stdout.read())
        with suppress(OSError):
            self._process.wait()
        return Probed(made, [Failed(*each) for each in failed], slowest)


class Store:
    """The store of descriptors that systemd is for a unit (sd_notify(3)), and how it starts a process with them."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self.environment = {"NOTIFY_SOCKET": path}
        self.kept: dict[tuple[str, int], int] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            data, numbers, _, _ = socket.recv_fds(self._socket, 4096, 16)
            assert data.startswith(b"FDSTORE=1"), data
            for number in numbers:
                with socket.socket(fileno=socket.dup(number)) as sock:
                    self.kept[sock.getsockname()[:2]] = number
