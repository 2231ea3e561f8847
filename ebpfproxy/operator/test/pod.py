"""Runs in the pods of ``ebpfproxy test``: a server, and a client that prints results as JSON lines.

It uses nothing but the standard library, so that it starts at once in any of the agent's images. The only
argument is a plan as JSON, each part of which may be left out; it runs until it is ended::

    {"serve": {"name": "server-1", "port": 8080},
     "patience": 15, "questions": [QUESTION, …],
     "load": [QUESTION, …]}

A question has an ``id``, ``protocol``, ``address`` and ``port``, and says which answer is right: ``by`` names
the servers that may answer (None: any; none: nobody may), ``same`` wants all answers from one of them,
``sources`` are the addresses as which the server may see the client, beside the client's own (None: all).

Lines: ``{"serving": ["TCP", …]}``; for each question ``{"id": 1, "asked": 5, "wrong": ""}`` or ``{"id": 1,
"skipped": "…"}``, then ``{"done": true}``; under load each second ``{"load": {"asked": 90, "failed": 1,
"id": 1, "wrong": "…"}}`` with the last failure.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Question = dict[str, Any]
Line = dict[str, Any]

_SCTP = 132
_KINDS = {
    "TCP": (socket.SOCK_STREAM, 0),
    "UDP": (socket.SOCK_DGRAM, 0),
    "SCTP": (socket.SOCK_STREAM, _SCTP),
}
_TIMES, _TIMES_IN_VAIN = 5, 2
_SECONDS, _SECONDS_IN_VAIN = 2.0, 1.0
#: A datagram may be lost anywhere, and is sent again as a resolver does.
_DATAGRAMS = 3
_PAUSE, _LOAD_PAUSE = 0.3, 0.02
_THREADS = 32

_printing = threading.Lock()


def say(line: Line) -> None:
    with _printing:
        print(json.dumps(line), flush=True)


# -- server


def listeners(port: int) -> dict[str, socket.socket]:
    """Opens the port for each protocol that the kernel has, for both families where there are two."""
    found = {}
    for protocol, (kind, number) in _KINDS.items():
        for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
            try:
                made = socket.socket(family, kind, number)
            except OSError:
                continue
            try:
                if family == socket.AF_INET6:
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    made.listen(1024)
            except OSError:
                made.close()
                continue
            found[protocol] = made
            break
    return found


def serve(name: str, listening: Iterable[socket.socket]) -> None:
    """Says to each client who answers and as whom it sees the client; then it echoes."""
    selector = selectors.DefaultSelector()
    entrances = set(listening)
    for each in entrances:
        selector.register(each, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            sock: Any = key.fileobj
            try:
                if sock.type == socket.SOCK_DGRAM:
                    _, peer = sock.recvfrom(2048)
                    sock.sendto(_identity(name, peer), peer)
                elif sock in entrances:
                    connection, peer = sock.accept()
                    connection.sendall(_identity(name, peer))
                    selector.register(connection, selectors.EVENT_READ)
                elif data := sock.recv(2048):
                    sock.sendall(data)
                else:
                    raise ConnectionError
            except OSError:
                if sock not in entrances:
                    selector.unregister(sock)
                    sock.close()


def _identity(name: str, peer: Any) -> bytes:
    return json.dumps({"name": name, "client": _plain(peer[0])}).encode() + b"\n"


def _plain(address: str) -> str:
    """An address without what shows that the socket is of another family, or its link."""
    return address.removeprefix("::ffff:").partition("%")[0]


# -- client


class _WrongError(Exception):
    """The answer is not the right one; the message says what came instead."""


def _open(question: Question, seconds: float) -> socket.socket:
    kind, number = _KINDS[question["protocol"]]
    family = socket.AF_INET6 if ":" in question["address"] else socket.AF_INET
    sock = socket.socket(family, kind, number)
    sock.settimeout(seconds)
    return sock


def _ask(question: Question) -> str:
    """Asks once; returns the server's name. Raises OSError and _WrongError."""
    to = (question["address"], question["port"])
    with _open(question, _SECONDS if question["by"] != [] else _SECONDS_IN_VAIN) as sock:
        if question["protocol"] == "UDP":
            said, source = _datagram(sock, to)
        else:
            sock.connect(to)
            said, source = _line(sock), sock.getpeername()
        try:
            answer = json.loads(said)
            name, client = str(answer["name"]), str(answer["client"])
            if not f"{name}{client}".isprintable():
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise _WrongError("something else than the test's server answered") from None
        if question["by"] is not None and name not in question["by"]:
            raise _WrongError(f"{name} answered")
        if (source[0], source[1]) != to:
            raise _WrongError(f"{name} answered as {_endpoint(source)}")
        allowed = question.get("sources")
        if allowed is not None and client not in (_plain(sock.getsockname()[0]), *allowed):
            raise _WrongError(f"{name} saw {client} as the client")
        return name


def _datagram(sock: socket.socket, to: tuple[str, int]) -> tuple[bytes, Any]:
    for left in reversed(range(_DATAGRAMS)):
        try:
            sock.sendto(b"?", to)
            return sock.recvfrom(2048)
        except TimeoutError:
            if not left:
                raise
    raise AssertionError


def _line(sock: socket.socket) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        more = sock.recv(2048)
        if not more:
            raise _WrongError("the connection was closed without an answer")
        found += more
    return found


def _endpoint(name: Any) -> str:
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def words(error: OSError) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer came in time"
    code = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror or error} ({code})" if code else str(error)


def _wrong(question: Question, names: set[str]) -> str:
    """Asks once; returns what came instead of a right answer, empty after a right one."""
    try:
        name = _ask(question)
    except _WrongError as error:
        return str(error)
    except OSError as error:
        return words(error) if question["by"] != [] else ""
    names.add(name)
    if question.get("same") and len(names) > 1:
        return f"{' and '.join(sorted(names))} answered"
    return ""


def _settle(question: Question, deadline: float) -> str:
    """Asks until the first right answer or the deadline, as nodes may not know the Service yet."""
    while wrong := _wrong(question, set()):
        if time.monotonic() >= deadline:
            return wrong
        time.sleep(_PAUSE)
    return ""


def check(question: Question, deadline: float) -> Line:
    """After the first right answer all have to be right."""
    line: Line = {"id": question["id"]}
    try:
        _open(question, _SECONDS).close()
    except OSError as error:
        return {
            **line,
            "skipped": f"the kernel has no {question['protocol']} over this family: {words(error)}",
        }
    if wrong := _settle(question, deadline):
        return {**line, "asked": 1, "wrong": wrong}
    names: set[str] = set()
    times = _TIMES if question["by"] != [] else _TIMES_IN_VAIN
    for number in range(1, times + 1):
        if wrong := _wrong(question, names):
            return {**line, "asked": number, "wrong": wrong}
    return {**line, "asked": times, "wrong": ""}


def _check_all(questions: list[Question], patience: float) -> None:
    deadline = time.monotonic() + patience
    with ThreadPoolExecutor(_THREADS) as pool:
        for line in pool.map(lambda question: check(question, deadline), questions):
            say(line)
    say({"done": True})


# -- load


class _Load:
    """Asks all the time, and keeps a connection open, at each question's address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = self._failed = 0
        self._last: Line = {"id": 0, "wrong": ""}

    def run(self, questions: list[Question], patience: float) -> None:
        deadline = time.monotonic() + patience
        for question in questions:
            _settle(question, deadline)
        for question in questions:
            for work in (self._ask, self._hold)[: 1 if question["protocol"] == "UDP" else 2]:
                threading.Thread(target=work, args=(question,), daemon=True).start()
        while True:
            time.sleep(1)
            with self._lock:
                say({"load": {"asked": self._asked, "failed": self._failed, **self._last}})

    def _count(self, question: Question, wrong: str) -> None:
        with self._lock:
            self._asked += 1
            if wrong:
                self._failed += 1
                self._last = {"id": question["id"], "wrong": wrong}

    def _ask(self, question: Question) -> None:
        while True:
            self._count(question, _wrong(question, set()))
            time.sleep(_LOAD_PAUSE)

    def _hold(self, question: Question) -> None:
        try:
            with _open(question, 5 * _SECONDS) as sock:
                sock.connect((question["address"], question["port"]))
                _line(sock)
                while True:
                    sock.sendall(b"?\n")
                    _line(sock)
                    self._count(question, "")
                    time.sleep(5 * _LOAD_PAUSE)
        except _WrongError as error:
            self._count(question, f"an open connection ended: {error}")
        except OSError as error:
            self._count(question, f"an open connection ended: {words(error)}")


def main() -> None:
    plan = json.loads(sys.argv[1])
    if server := plan.get("serve"):
        listening = listeners(server["port"])
        serving = threading.Thread(target=serve, args=(server["name"], listening.values()), daemon=True)
        serving.start()
        say({"serving": sorted(listening)})
    if questions := plan.get("questions"):
        _check_all(questions, plan["patience"])
    if load := plan.get("load"):
        _Load().run(load, plan["patience"])
    threading.Event().wait()


if __name__ == "__main__":
    main()
