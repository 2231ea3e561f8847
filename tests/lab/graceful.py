"""HTTP servers with graceful shutdown, and clients that record failed requests.

All times are of CLOCK_MONOTONIC, which is the same in all processes.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn

import msgspec

from tests.lab.spaces import Space

#: The number of keep-alive connections of a load, and of short ones that it opens after it is told to stop.
#: One of three servers gets none of them with p = 3 * (2/3)^60 = 8e-11.
KEPT = LAST = 60
#: The number of connections with slow requests, and the duration of such a request.
_SLOW, _SLOW_SECONDS = 4, 0.4
_PAUSE = 0.003


# -- servers


class Accepted(msgspec.Struct):
    """The time when a connection was accepted, and when the client called connect() (0 if unknown)."""

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
    #: An idle connection is closed after this time.
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
        response = {"name": self.server.name, "terminating": self.server.is_terminating}
        body = json.dumps(response).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.server.is_closing or self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _serve(name: str, port: int, linger: float) -> None:
    """Responds to every request with its name until SIGTERM, and for ``linger`` seconds more.

    This is as with a preStop hook that sleeps; a second SIGTERM ends this time. Then it accepts no connections,
    responds on open ones with ``Connection: close``, and prints the times of accepted connections.
    """
    _raise_descriptor_limit()
    server = _Server(name, port, linger)
    signal.signal(signal.SIGTERM, server.terminate)
    print("ready", flush=True)
    server.serve_forever(0.05)
    # Connections in the accept queue are established for their clients.
    while select.select([server], [], [], 0)[0]:
        server.handle_request()
    # This waits for the threads of all connections.
    server.server_close()
    print(msgspec.json.encode(server.accepted).decode(), flush=True)


class Server:
    """A server in a pod."""

    def __init__(self, space: Space, name: str, port: int, linger: float) -> None:
        self.process = space.fork(_serve, name, port, linger)
        self.name = name
        #: All connections that it accepted; set after it has exited.
        self.accepted: list[Accepted] = []

    def wait_ready(self) -> None:
        assert self.process.stdout.readline() == b"ready\n"

    def terminate(self) -> None:
        self.process.terminate()

    def wait_ended(self) -> None:
        """Waits until it has exited by itself, after all responses."""
        self.accepted = msgspec.json.decode(self.process.stdout.read(), type=list[Accepted])
        assert self.process.wait() == 0


# -- continuous clients


class Opened(msgspec.Struct):
    """A connection of a client: the time of connect(), and the name of the server."""

    began: float
    name: str


class Seen(msgspec.Struct):
    """The results of a load."""

    requests: int = 0
    errors: list[str] = msgspec.field(default_factory=list)
    opened: list[Opened] = msgspec.field(default_factory=list)
    #: The time of the last successful request on an established connection, by terminating server.
    kept: dict[str, float] = msgspec.field(default_factory=dict)

    def after(self, moment: float) -> Counter[str]:
        """The number of connections that began after ``moment``, by server."""
        return Counter(each.name for each in self.opened if each.began > moment)


class _Client:
    """A connection that is reopened after the server has closed it gracefully."""

    def __init__(self, kind: str, host: str, port: int, seen: Seen) -> None:
        self._kind, self._seen = kind, seen
        self._http = HTTPConnection(host, port, timeout=30)

    def ask(self, path: str = "/", *, close: bool = False) -> None:
        is_new, began = self._http.sock is None, time.monotonic()
        headers = {"Began": str(began)} | ({"Connection": "close"} if close else {})
        try:
            self._http.request("GET", path, headers=headers)
            response = json.loads(self._http.getresponse().read())
        except (OSError, HTTPException, ValueError) as error:
            where = "new" if is_new else "kept"
            self._seen.errors.append(f"{self._kind}, {where}, {began:.3f}: {error!r}")
            self._http.close()
            return
        self._seen.requests += 1
        if is_new:
            self._seen.opened.append(Opened(began, response["name"]))
        elif response["terminating"]:
            self._seen.kept[response["name"]] = began


def _ask(host: str, port: int) -> None:
    """Sends requests on several kinds of connections until standard input ends, and prints results."""
    _raise_descriptor_limit()
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
    """A load in a space, from ``wait_ready`` to ``stop``."""

    def __init__(self, space: Space, host: str, port: int) -> None:
        self._process = space.fork(_ask, host, port)

    def wait_ready(self) -> None:
        assert self._process.stdout.readline() == b"ready\n"

    def stop(self) -> Seen:
        self._process.stdin.close()
        return msgspec.json.decode(self._process.stdout.read(), type=Seen)


# -- clients with a fixed source port


class Mounted(msgspec.Struct):
    """A new connection: its server, how the previous one ended, and errors of attempts in between."""

    name: str
    ended: str
    failed: list[str]


def _mount(host: str, port: int, own: int, cgroup: Path | None) -> None:
    """Keeps one connection from a fixed port, as NFS does, reconnects when it is closed, and prints a line for each.

    After the first one it moves to the cgroup.
    """
    ended, failed = "", list[str]()
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # NFS uses this option. A connection that times out sends no packet.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000)
            sock.settimeout(5)
            sock.bind(("", own))
            try:
                sock.connect((host, port))
                name = _request(sock)
            except OSError as error:
                # The kernel has not released the previous connection yet.
                if error.errno != errno.EADDRNOTAVAIL:
                    failed.append(_name(error))
                time.sleep(0.02)
                continue
            print(msgspec.json.encode(Mounted(name, ended, failed)).decode(), flush=True)
            failed = []
            try:
                while _request(sock):
                    time.sleep(0.05)
                ended = "closed"
            except OSError as error:
                ended = _name(error)
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text("0")


def _request(sock: socket.socket) -> str:
    """The name of the server; empty if it has closed the connection gracefully."""
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
        """``is_hooked``: starts in the space's cgroup, and moves to ``then`` after the first connection."""
        cgroup = then if is_hooked else None
        self._process = space.fork(_mount, host, port, own, cgroup, join_cgroup=is_hooked)
        self._what = f"{host}:{port} from port {own}"

    def next(self, timeout: float = 60.0) -> Mounted:
        """Waits for the next connection."""
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no connection to {self._what} within {timeout} s")
        return msgspec.json.decode(self._process.stdout.readline(), type=Mounted)

    def end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


def _raise_descriptor_limit() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
