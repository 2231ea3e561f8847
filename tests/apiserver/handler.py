"""Requests of one connection: lists, pages, watches and faults."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import time
import uuid
import zlib
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.apiserver import bodies, events
from tests.apiserver.control import ControlError
from tests.apiserver.faults import Fault
from tests.apiserver.selectors import Selector
from tests.apiserver.store import KINDS, ExpiredError, encode

if TYPE_CHECKING:
    from tests.apiserver.server import ApiServer, HttpServer

PATHS = {
    "/api/v1/services": "services",
    "/apis/discovery.k8s.io/v1/endpointslices": "endpointslices",
    "/api/v1/nodes": "nodes",
    "/apis/networking.k8s.io/v1/servicecidrs": "servicecidrs",
    "/apis/networking.k8s.io/v1beta1/servicecidrs": "servicecidrs",
}
_NAMESPACED = re.compile(r"(/.*)/namespaces/([^/]+)(/[^/]+)")
_SLOW_PIECE = 512
_WRITE = 64 * 1024
#: It equals a real server's (endpoints/handlers/responsewriters, defaultGzipThresholdBytes).
_COMPRESSED_FROM = 128 * 1024


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer
    api: ApiServer

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()
        super().setup()
        self.api = self.server.api
        self.api.track(self.connection, add=True)

    def finish(self) -> None:
        self.api.track(self.connection, add=False)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        """``/control/…``: see tests.apiserver.control; else an object: see tests.apiserver.single_objects."""
        split = urlsplit(self.path)
        if not split.path.startswith("/control/"):
            self._object()
            return
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.answer(200, encode(dict(self.api.control(split.path, query, body))))
        except ControlError as error:
            self.answer(400, encode({"error": str(error)}))

    def do_PUT(self) -> None:
        self._object()

    def do_PATCH(self) -> None:
        self._object()

    def do_DELETE(self) -> None:
        self._object()

    def _object(self) -> None:
        """See tests.apiserver.single_objects."""
        split, cluster = urlsplit(self.path), self.api.cluster
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        user = self._user()
        if self.command != "GET":
            self.api.requests.append((split.path, query))
            self.api.headers.append(dict(self.headers))
            fault = self.api.faults.take(cluster.resource_of(split.path), query, in_stream=False)
            if fault is not None and self._fail(fault):
                return
        if user is None:
            self.answer(401, bodies.status(401, "Unauthorized", "Unauthorized"))
            return
        serve = self.api.events.answer if split.path.startswith(events.PREFIX) else cluster.answer
        answer = serve(self.command, split.path, query, body, dict(self.headers), user)
        self.answer(answer.code, answer.body, extra=dict(answer.headers))

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        self._params = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.api.requests.append((split.path, self._params))
        self.api.headers.append(dict(self.headers))
        self._slow = 0.0
        self._half = False
        self._zip: Any = None
        resource = PATHS.get(split.path)
        if (found := _NAMESPACED.fullmatch(split.path)) is not None and found[1] + found[3] in PATHS:
            resource = PATHS[found[1] + found[3]]
            fields = f"metadata.namespace={found[2]},{self._params.get('fieldSelector', '')}"
            self._params = {**self._params, "fieldSelector": fields}
        watch = self._params.get("watch") in ("true", "1")
        kind = resource or self.api.cluster.resource_of(split.path)
        fault = self.api.faults.take(kind, self._params, in_stream=False)
        if fault is not None and self._fail(fault):
            return
        user = self._user()
        if user is None:
            self.answer(401, bodies.status(401, "Unauthorized", "Unauthorized"))
        elif self.api.containers.serve(self):
            pass
        elif split.path in self.api.public:
            self.answer(200, self.api.public[split.path])
        elif resource is None:
            self._object()
        elif split.path in self.api.unserved:
            self.answer(404, bodies.status(404, "NotFound", bodies.NOT_FOUND))
        elif resource in self.api.denied or user == "system:anonymous":
            self.answer(403, bodies.forbidden(user, "watch" if watch else "list", resource))
        else:
            (self._watch if watch else self._list)(resource)

    def _user(self) -> str | None:
        """Returns None for invalid credentials, ``system:anonymous`` for missing ones where they are required."""
        if isinstance(self.connection, ssl.SSLSocket):
            certificate: Any = self.connection.getpeercert() or {}
            for part in certificate.get("subject", ()):
                return str(part[0][1])
        if self.api.tokens is None:
            return "test"
        header = self.headers.get("Authorization")
        if header is None:
            return "system:anonymous"
        return "test" if header[7:] in self.api.tokens and header[:7].lower() == "bearer " else None

    def _fail(self, fault: Fault) -> bool:
        """Returns False where the request is served nevertheless."""
        if fault.kind == "slow":
            self._slow = fault.seconds
            return False
        if fault.kind == "late":
            self.api.stopping.wait(fault.seconds)
            return False
        if fault.kind == "half":
            self._half = self.close_connection = True
            return False
        if fault.kind == "html":
            self.answer(502, b"<html><h1>502 Bad Gateway</h1></html>", content_type="text/html")
        elif fault.kind in ("hang", "close"):
            self.close_connection = True
            if fault.kind == "hang":
                self.api.stopping.wait(60)
        else:
            code = int(fault.kind)
            extra = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            body = bodies.status(code, f"Reason{code}", f"injected {code}")
            self.answer(code, body, extra=extra)
        return True

    # -- responses

    def _head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        self.send_header("Audit-Id", str(uuid.uuid4()))
        self.send_header("Cache-Control", "no-cache, private")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(
        self,
        code: int,
        body: bytes,
        *,
        content_type: str = "application/json",
        extra: dict[str, str] | None = None,
    ) -> None:
        length = {"Content-Type": content_type, "Content-Length": str(len(body))}
        self._head(code, {**length, **(extra or {})})
        self.wfile.write(body)

    def _begin_chunks(self, *, compressed: bool) -> None:
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        self._zip = None
        if compressed and "gzip" in self.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"] = "gzip"
            self._zip = zlib.compressobj(1, wbits=31)
        self._head(200, headers)

    def _frame(self, data: bytes) -> bytes:
        """Sends a chunk that can be decoded on arrival; an empty one ends the body."""
        if self._zip is None:
            return _framed(data)
        if data:
            return _framed(self._zip.compress(data) + self._zip.flush(zlib.Z_SYNC_FLUSH))
        return _framed(self._zip.flush()) + _framed(b"")

    def _write(self, data: bytes) -> None:
        """Sends framed chunks."""
        if not self._slow:
            self.wfile.write(data)
            return
        for i in range(0, len(data), _SLOW_PIECE):
            self.wfile.write(data[i : i + _SLOW_PIECE])
            self.api.stopping.wait(self._slow)

    def _chunk(self, data: bytes) -> None:
        self._write(self._frame(data))

    def _break_off(self, data: bytes) -> None:
        """Sends half of the data and closes the connection."""
        framed = self._frame(data)
        self._write(framed[: len(framed) // 2])
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # -- lists

    def _list(self, resource: str) -> None:
        selector = Selector(self._params.get("labelSelector", ""), self._params.get("fieldSelector", ""))
        at, start = None, ("", "")
        if "continue" in self._params:
            token = json.loads(base64.b64decode(self._params["continue"]))
            at, start = token["rv"], tuple(token["start"])
        try:
            version, found = self.api.store.items(resource, selector, at=at)
        except ExpiredError:
            self.answer(410, bodies.status(410, "Expired", bodies.TOO_OLD_TO_CONTINUE))
            return
        rest = [each for each in found if each.key > start]
        page = rest[: int(self._params.get("limit", "0")) or len(rest)]
        meta: dict[str, Any] = {"resourceVersion": str(version)}
        if len(page) < len(rest):
            token = {"v": "meta.k8s.io/v1", "rv": version, "start": page[-1].key}
            meta["continue"] = base64.b64encode(encode(token)).decode()
            meta["remainingItemCount"] = len(rest) - len(page)
        api_version, _, kind = KINDS[resource]
        head = b'{"kind":"%s","apiVersion":"%s","metadata":%s,"items":[' % (
            kind.encode(),
            api_version.encode(),
            encode(meta),
        )
        body = head + b",".join(each.body for each in page) + b"]}\n"
        self._begin_chunks(compressed=len(body) >= _COMPRESSED_FROM)
        if self._half:
            self._break_off(body)
            return
        self._chunk(body)
        self._chunk(b"")

    # -- watches

    def _watch(self, resource: str) -> None:
        params, store = self._params, self.api.store
        selector = Selector(params.get("labelSelector", ""), params.get("fieldSelector", ""))
        streaming_list = params.get("sendInitialEvents") == "true"
        if streaming_list and not self.api.streaming_list:
            self.answer(422, bodies.status(422, "Invalid", bodies.NO_STREAMING_LIST))
            return
        self._begin_chunks(compressed=self.api.compresses_streams)
        asked = int(params.get("resourceVersion") or 0)
        if streaming_list or not asked:
            version, found = store.items(resource, selector)
            lines = [each.line("ADDED") for each in found]
            if streaming_list:
                lines.append(bodies.bookmark(resource, version, initial_end=True))
            if self._half:
                self._break_off(b"".join(lines))
                return
            self._lines(lines)
        else:
            version = asked
        self._follow(resource, selector, version)

    def _follow(self, resource: str, selector: Selector, version: int) -> None:
        """Sends changes after ``version`` until the timeout of the request."""
        store, params = self.api.store, self._params
        end = time.monotonic() + float(params.get("timeoutSeconds", "1800"))
        bookmark = time.monotonic() + self.api.bookmark_seconds
        while not self.api.stopping.is_set():
            with store.changed:
                found = store.after(resource, version)
                fault = self.api.faults.take(resource, params, in_stream=True)
                now = time.monotonic()
                if found == [] and fault is None and now < min(end, bookmark):
                    store.changed.wait(min(end, bookmark) - now)
                    continue
                asked, version = version, max(version, store.version)
            if fault is not None and fault.kind != "expire":
                self._break(fault)
                return
            if found is None or fault is not None:
                body = bodies.too_old(asked, store.compacted or store.version)
                self._chunk(b'{"type":"ERROR","object":%s}\n' % body.strip())
                break
            self._lines(line for change in found if (line := change.line(selector)))
            if now >= bookmark:
                # A watch from a future version gets no event before that version (as in a real cacheWatcher).
                if params.get("allowWatchBookmarks") == "true" and asked <= store.version:
                    self._chunk(bodies.bookmark(resource, version))
                bookmark = now + self.api.bookmark_seconds
            if now >= end:
                break
        self._chunk(b"")

    def _lines(self, lines: Iterable[bytes]) -> None:
        """Sends each event in its own chunk, as a real server flushes them; one write has many, for speed."""
        buffer = bytearray()
        for line in lines:
            buffer += self._frame(line)
            if len(buffer) > _WRITE:
                self._write(bytes(buffer))
                buffer.clear()
        if buffer:
            self._write(bytes(buffer))

    def _break(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.kind == "silence":
            self.api.stopping.wait(60)
        elif fault.kind == "cut":
            self._chunk(b'{"type":"MODIFIED","object":{"kind":"Service","apiVers')
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._chunk(b"this is no JSON\n")


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)
