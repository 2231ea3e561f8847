"""Containers' logs, and commands in them: a WebSocket of ``v5.channel.k8s.io`` or ``v4``, as API server and kubelet serve it.

``Containers.start`` runs the commands. A lost connection closes standard input and nothing else, as with containerd.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.apiserver import bodies
from tests.apiserver.store import encode

if TYPE_CHECKING:
    from tests.apiserver.handler import Handler
    from tests.lab.processes import Process

_PATH = re.compile(r"/api/v1/namespaces/([^/]+)/pods/([^/]+)/(exec|log)")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455
_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10
_CLOSED_CHANNEL = 255


class Call(NamedTuple):
    pod: str
    container: str
    command: list[str]


class Containers:
    """``start`` returns a process with three pipes; ``logs`` are by pod, container and whether it is the previous one.

    ``protocols``: those that this server knows. ``calls``: what was started, with its process.
    """

    def __init__(self) -> None:
        self.start: Callable[[Call], Process] | None = None
        self.logs: dict[tuple[str, str, bool], str] = {}
        self.protocols = ["v5.channel.k8s.io", "v4.channel.k8s.io"]
        self.calls: list[tuple[Call, Process]] = []

    def serve(self, handler: Handler) -> bool:
        """Returns False for another path."""
        split = urlsplit(handler.path)
        if (found := _PATH.fullmatch(split.path)) is None:
            return False
        namespace, pod, what = found.groups()
        query = parse_qs(split.query)
        item = handler.api.cluster.get("pods", namespace, pod)
        if f"create pods/{what}" in handler.api.denied:
            message = f'pods "{pod}" is forbidden: User "test" cannot create resource "pods/{what}"'
            handler.answer(403, bodies.status(403, "Forbidden", message))
        elif item is None:
            handler.answer(404, bodies.status(404, "NotFound", f'pods "{pod}" not found'))
        elif what == "log" and _is_being_created(item):
            message = f'container in pod "{pod}" is waiting to start: ContainerCreating'
            handler.answer(400, bodies.status(400, "BadRequest", message))
        elif what == "log":
            previous = query.get("previous") == ["true"]
            only = item["spec"]["containers"][0]["name"]
            text = self.logs.get((pod, query.get("container", [only])[0], previous), "")
            handler.answer(200, text.encode(), content_type="text/plain")
        else:
            is_running = item["status"].get("phase") == "Running"
            self._execute(handler, Call(pod, query["container"][0], query["command"]), is_running=is_running)
        return True

    def _execute(self, handler: Handler, call: Call, *, is_running: bool) -> None:
        """The kubelet's refusals come when the WebSocket is there already, as of kube-apiserver 1.36."""
        asked = [each.strip() for each in handler.headers["Sec-WebSocket-Protocol"].split(",")]
        protocol = next(each for each in asked if each in self.protocols)
        key = handler.headers["Sec-WebSocket-Key"].encode()
        handler.send_response(101)
        handler.send_header("Upgrade", "websocket")
        handler.send_header("Connection", "Upgrade")
        handler.send_header(
            "Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
        )
        handler.send_header("Sec-WebSocket-Protocol", protocol)
        handler.end_headers()
        handler.close_connection = True
        if not is_running:
            message = f'unable to upgrade connection: container not found ("{call.container}")'
            refused = {"metadata": {}, "status": "Failure", "message": message, "code": 404}
            send(handler.connection, _BINARY, b"\x03" + encode(refused))
            return
        assert self.start is not None
        process = self.start(call)
        self.calls.append((call, process))
        _Session(handler.connection, handler.rfile, process, half_closes=protocol.startswith("v5")).run()


def _is_being_created(pod: dict[str, Any]) -> bool:
    status = pod.get("status", {})
    return status.get("phase", "Pending") == "Pending" and "containerStatuses" not in status


class _Session:
    def __init__(
        self, connection: socket.socket, received: Any, process: Process, *, half_closes: bool
    ) -> None:
        self._connection, self._received, self._process = connection, received, process
        self._half_closes = half_closes
        self._lock = threading.Lock()

    def run(self) -> None:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        copies = [
            threading.Thread(target=self._copy, args=(channel, stream), daemon=True)
            for channel, stream in ((1, stdout), (2, stderr))
        ]
        for each in copies:
            each.start()
        threading.Thread(target=self._read, args=(stdin,), daemon=True).start()
        for each in copies:
            each.join()
        self._send(_BINARY, b"\x03" + encode(_status(self._process.wait())))
        self._send(_CLOSE, struct.pack(">H", 1000))

    def _copy(self, channel: int, stream: IO[bytes]) -> None:
        while data := stream.read1(32 * 1024):  # type: ignore[attr-defined]
            self._send(_BINARY, bytes([channel]) + data)

    def _send(self, kind: int, data: bytes) -> None:
        with self._lock, suppress(OSError):
            send(self._connection, kind, data)

    def _read(self, stdin: IO[bytes]) -> None:
        with suppress(OSError, ValueError):
            for kind, data in self._frames():
                if kind == _PING:
                    self._send(_PONG, data)
                elif kind == _CLOSE or (self._half_closes and data == bytes([_CLOSED_CHANNEL, 0])):
                    break
                elif data[:1] == b"\0":
                    stdin.write(data[1:])
                    stdin.flush()
        with suppress(OSError):
            stdin.close()

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        """What the client sends, which is masked, until the connection ends."""
        while len(head := self._received.read(2)) == 2:
            length = head[1] & 0x7F
            assert head[1] & 0x80 and length < 126
            mask = self._received.read(4)
            data = self._received.read(length)
            yield head[0] & 0xF, bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))


def send(connection: socket.socket, kind: int, data: bytes) -> None:
    length = len(data)
    head = bytes([0x80 | kind, length]) if length < 126 else struct.pack(">BBH", 0x80 | kind, 126, length)
    connection.sendall(head + data)


def _status(code: int) -> dict[str, Any]:
    """What the kubelet says (k8s.io/apimachinery, pkg/util/remotecommand)."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }
