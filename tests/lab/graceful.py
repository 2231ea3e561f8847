"""HTTP servers that end as pods should, and clients that lose nothing or say what.

``python -m tests.lab.graceful serve NAME PORT LINGER`` answers every request with its name. After SIGTERM it
goes on for LINGER seconds, as with a preStop hook that sleeps (a second SIGTERM cuts that short); then it takes
no more connections, answers what is open with ``Connection: close``, and prints what it accepted and when.

``… ask HOST PORT`` asks without end, by connections of all sorts, until its input ends, and prints what it saw.

``… mount HOST PORT OWN_PORT CGROUP`` keeps one connection from one port, as NFS does, connects again when that
ends, and prints a line for each. After the first one it moves to the cgroup, if that is not empty.

All times are CLOCK_MONOTONIC's, the same in all processes.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

import msgspec

from tests.lab.spaces import Space

#: Connections that a load keeps open, and short ones that it still makes when it is told to stop. One of three
#: servers has none of them with p = 3 * (2/3)^60 = 8e-11.
KEPT = LAST = 60
#: Requests that take their time: of how many connections, and how long.
_SLOW, _SLOW_SECONDS = 4, 0.4
_PAUSE = 0.003


# -- servers


class Accepted(msgspec.Struct):
    """A connection: when it was accepted, and when its client began to open it (0 where that is unknown)."""

    accepted: float
    began: float = 0.0


class _Server(ThreadingMixIn, TCPServer):
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, name: str, port: int, linger: float) -> None:
        self.name, self.linger = name, linger
        self.is_terminating = self.is_closing = False
        self.accepted: list[Accepted] = []
        super().__init__(("0.0.0.0", port), _Handler)

    def terminate(self, *_: object) -> None:
        wait = 0.0 if self.is_terminating else self.linger
        self.is_terminating = True
        timer = threading.Timer(wait, self._stop)
        timer.daemon = True
        timer.start()

    def _stop(self) -> None:
        self.is_closing = True
        self.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    #: An idle connection ends after this time.
    timeout = 10.0
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._seen = Accepted(time.monotonic())
        self.server.accepted.append(self._seen)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._seen.began = self._seen.began or float(self.headers.get("Began", "0"))
        time.sleep(_SLOW_SECONDS if self.path == "/slow" else 0)
        answer = {"name": self.server.name, "terminating": self.server.is_terminating}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.server.is_closing or self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _serve(name: str, port: int, linger: float) -> None:
    server = _Server(name, port, linger)
    signal.signal(signal.SIGTERM, server.terminate)
    print("ready", flush=True)
    server.serve_forever(0.05)
    # Connections in the queue look accepted to their clients.
    while select.select([server], [], [], 0)[0]:
        server.handle_request()
    # Waits for the threads of all connections.
    server.server_close()
    print(msgspec.json.encode(server.accepted).decode(), flush=True)


class Server:
    """One of them in a pod."""

    def __init__(self, space: Space, name: str, port: int, linger: float) -> None:
        command = [sys.executable, "-m", "tests.lab.graceful", "serve", name, str(port), str(linger)]
        self.process = space.popen(command, stdout=subprocess.PIPE)
        self.name = name
        #: The connections that it accepted in its life; known when it has ended.
        self.accepted: list[Accepted] = []

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def terminate(self) -> None:
        self.process.terminate()

    def wait_ended(self) -> None:
        """Until it has ended by itself, with everything answered."""
        assert self.process.stdout is not None
        self.accepted = msgspec.json.decode(self.process.stdout.read(), type=list[Accepted])
        assert self.process.wait() == 0


# -- clients without end


class Opened(msgspec.Struct):
    """A connection of a client: when it began to open it, and who answered."""

    began: float
    name: str


class Seen(msgspec.Struct):
    """What a load has seen."""

    requests: int = 0
    errors: list[str] = msgspec.field(default_factory=list)
    opened: list[Opened] = msgspec.field(default_factory=list)
    #: When a terminating server was last asked, and answered, on a connection that was there already.
    kept: dict[str, float] = msgspec.field(default_factory=dict)

    def after(self, moment: float) -> Counter[str]:
        """Who got the connections that began later."""
        return Counter(each.name for each in self.opened if each.began > moment)


class _Client:
    """A connection that is opened again when the server has closed it in good order."""

    def __init__(self, kind: str, host: str, port: int, seen: Seen) -> None:
        self._kind, self._seen = kind, seen
        self._http = HTTPConnection(host, port, timeout=30)

    def ask(self, path: str = "/", *, close: bool = False) -> None:
        is_new, began = self._http.sock is None, time.monotonic()
        headers = {"Began": str(began)} | ({"Connection": "close"} if close else {})
        try:
            self._http.request("GET", path, headers=headers)
            answer = json.loads(self._http.getresponse().read())
        except (OSError, HTTPException, ValueError) as error:
            where = "new" if is_new else "kept"
            self._seen.errors.append(f"{self._kind}, {where}, {began:.3f}: {error!r}")
            self._http.close()
            return
        self._seen.requests += 1
        if is_new:
            self._seen.opened.append(Opened(began, answer["name"]))
        elif answer["terminating"]:
            self._seen.kept[answer["name"]] = began


def _ask(host: str, port: int) -> None:
    seen, done = Seen(), threading.Event()
    kept = [_Client("keep-alive", host, port, seen) for _ in range(KEPT)]
    slow = [_Client("slow", host, port, seen) for _ in range(_SLOW)]
    short = _Client("short", host, port, seen)
    for each in [*kept, *slow]:
        each.ask()

    def in_turns() -> None:
        is_last = False
        while not is_last:
            is_last = done.is_set()
            for each in kept:
                each.ask()
                time.sleep(_PAUSE)

    def slowly(each: _Client) -> None:
        while not done.is_set():
            each.ask("/slow")
            time.sleep(_PAUSE)

    def shortly() -> None:
        left = LAST
        while left:
            left -= done.is_set()
            short.ask(close=True)
            time.sleep(_PAUSE)

    threads = [threading.Thread(target=target) for target in (in_turns, shortly)]
    threads += [threading.Thread(target=slowly, args=(each,)) for each in slow]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    sys.stdin.read()
    done.set()
    for thread in threads:
        thread.join()
    print(msgspec.json.encode(seen).decode(), flush=True)


class Load:
    """It runs in a space from ``wait_ready`` to ``stop``."""

    def __init__(self, space: Space, host: str, port: int) -> None:
        command = [sys.executable, "-m", "tests.lab.graceful", "ask", host, str(port)]
        self._process = space.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def stop(self) -> Seen:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        return msgspec.json.decode(self._process.stdout.read(), type=Seen)


# -- clients with a port of their own


class Mounted(msgspec.Struct):
    """A new connection of one: to whom, how the one before ended, and which tries failed in between."""

    name: str
    ended: str
    failed: list[str]


def _mount(host: str, port: int, own: int, cgroup: str) -> None:
    ended, failed = "", list[str]()
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # NFS uses this option. A connection that it ends sends no packet.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
            sock.settimeout(5)
            sock.bind(("", own))
            try:
                sock.connect((host, port))
                name = _question(sock)
            except OSError as error:
                # Its own kernel has not yet finished with the connection before.
                if error.errno != errno.EADDRNOTAVAIL:
                    failed.append(_name(error))
                time.sleep(0.02)
                continue
            print(msgspec.json.encode(Mounted(name, ended, failed)).decode(), flush=True)
            failed = []
            try:
                while _question(sock):
                    time.sleep(0.05)
                ended = "closed"
            except OSError as error:
                ended = _name(error)
        if cgroup:
            Path(cgroup, "cgroup.procs").write_text("0")


def _question(sock: socket.socket) -> str:
    """Who answers; empty where the server has ended the connection in good order."""
    sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    response = HTTPResponse(sock)
    try:
        response.begin()
    except HTTPException:
        return ""
    name: str = json.loads(response.read())["name"]
    if response.will_close:
        while sock.recv(100):
            pass
        return ""
    return name


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


class Mount:
    def __init__(
        self,
        space: Space,
        host: str,
        port: int,
        own: int,
        *,
        is_hooked: bool = False,
        then: Path | None = None,
    ) -> None:
        """``is_hooked``: begins in the space's cgroup, and is in ``then`` from the second connection on."""
        command = [sys.executable, "-m", "tests.lab.graceful", "mount", host, str(port), str(own)]
        command.append(str(then) if is_hooked else "")
        self._process = space.popen(command, join_cgroup=is_hooked, stdout=subprocess.PIPE)
        self._what = f"{host}:{port} from port {own}"

    def next(self, timeout: float = 60.0) -> Mounted:
        """Its next connection."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no connection to {self._what} within {timeout} s")
        return msgspec.json.decode(self._process.stdout.readline(), type=Mounted)

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


def main(what: str, *arguments: Any) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if what == "serve":
        _serve(arguments[0], int(arguments[1]), float(arguments[2]))
    elif what == "ask":
        _ask(arguments[0], int(arguments[1]))
    else:
        _mount(arguments[0], int(arguments[1]), int(arguments[2]), arguments[3])


if __name__ == "__main__":
    main(*sys.argv[1:])
