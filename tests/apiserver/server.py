"""The HTTP side of the stand-in: one thread a connection, faults on demand."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.apiserver.store import KINDS, Selector, Store

PATHS = {
    "/api/v1/services": "services",
    "/apis/discovery.k8s.io/v1/endpointslices": "endpointslices",
    "/api/v1/nodes": "nodes",
}


class Fault:
    """What goes wrong with the next ``times`` matching requests.

    ``kind``: an HTTP status as text; ``hang`` (no answer, connection open), ``close`` (no answer, closed),
    ``html`` (a proxy's error page with status 502). For watches once they run: ``cut`` (half a line, then
    closed), ``silence`` (nothing more, connection open), ``garbage`` (a line that is no JSON), ``expire``
    (410 inside the stream).
    """

    def __init__(
        self, kind: str, *, times: int = 1, resource: str | None = None, retry_after: int | None = None
    ) -> None:
        self.kind = kind
        self.times = times
        self.resource = resource
        self.retry_after = retry_after

    @property
    def is_for_streams(self) -> bool:
        return self.kind in ("cut", "silence", "garbage", "expire")


def status(code: int, reason: str, message: str) -> bytes:
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


class ApiServer:
    """A context manager; ``url`` is where it listens, ``requests`` what it was asked."""

    def __init__(
        self,
        store: Store | None = None,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        tokens: set[str] | None = None,
        tls: ssl.SSLContext | None = None,
        streaming_list: bool = True,
        bookmark_seconds: float = 60.0,
    ) -> None:
        self.store = store or Store()
        self.tokens = tokens
        self.denied: set[str] = set()
        self.streaming_list = streaming_list
        self.bookmark_seconds = bookmark_seconds
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.control: Callable[[str, dict[str, list[str]]], object] | None = None
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._streams: set[socket.socket] = set()
        self._server = _Server((host, port), _Handler)
        self._server.api = self
        scheme = "http"
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.port = self._server.server_address[1]
        self.url = f"{scheme}://{host}:{self.port}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Resets every open connection, as a crash does."""
        for each in list(self._streams):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def fail(self, kind: str, **options: Any) -> Fault:
        fault = Fault(kind, **options)
        with self._lock:
            self._faults.append(fault)
        with self.store.changed:
            self.store.changed.notify_all()
        return fault

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def take_fault(self, resource: str, *, stream: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.is_for_streams == stream and fault.resource in (None, resource):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None

    def track(self, connection: socket.socket, *, add: bool) -> None:
        with self._lock:
            (self._streams.add if add else self._streams.discard)(connection)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    api: ApiServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
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
        """``/control/churn?rate=&seconds=``: see tests.apiserver.__main__."""
        split = urlsplit(self.path)
        assert self.api.control is not None
        answer = self.api.control(split.path, parse_qs(split.query))
        self._answer(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        params = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.api.requests.append((split.path, params))
        resource = PATHS.get(split.path)
        fault = self.api.take_fault(resource or "", stream=False)
        if fault is not None:
            self._fail(fault)
        elif self.api.tokens is not None and not self._authenticated():
            self._answer(401, status(401, "Unauthorized", "Unauthorized"))
        elif resource is None:
            message = "the server could not find the requested resource"
            self._answer(404, status(404, "NotFound", message))
        elif resource in self.api.denied:
            message = f'{resource} is forbidden: User "test" cannot list resource "{resource}"'
            self._answer(403, status(403, "Forbidden", message))
        elif params.get("watch") in ("true", "1"):
            self._watch(resource, params)
        else:
            self._list(resource, params)

    def _authenticated(self) -> bool:
        assert self.api.tokens is not None
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.api.tokens

    def _fail(self, fault: Fault) -> None:
        if fault.kind == "hang":
            self.api.stopping.wait(60)
            self.close_connection = True
        elif fault.kind == "close":
            self.close_connection = True
        elif fault.kind == "html":
            self._answer(502, b"<html><h1>502 Bad Gateway</h1></html>", content_type="text/html")
        else:
            code = int(fault.kind)
            extra = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
            self._answer(code, status(code, f"Reason{code}", f"injected {code}"), extra=extra)

    def _answer(
        self,
        code: int,
        body: bytes,
        *,
        content_type: str = "application/json",
        extra: dict[str, str] | None = None,
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (extra or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _list(self, resource: str, params: dict[str, str]) -> None:
        selector = Selector(params.get("labelSelector", ""), params.get("fieldSelector", ""))
        version, entries = self.api.store.items(resource, selector)
        api_version, _, kind = KINDS[resource]
        meta: dict[str, Any] = {"resourceVersion": str(version)}
        start = 0
        if "continue" in params:
            token = json.loads(base64.b64decode(params["continue"]))
            start = token["start"]
            meta["resourceVersion"] = token["version"]
        limit = int(params.get("limit", "0")) or len(entries) or 1
        page = entries[start : start + limit]
        left = len(entries) - start - len(page)
        if left > 0:
            token = {"start": start + len(page), "version": meta["resourceVersion"]}
            meta["continue"] = base64.b64encode(json.dumps(token).encode()).decode()
            meta["remainingItemCount"] = left
        self._answer(
            200,
            b'{"kind":"%s","apiVersion":"%s","metadata":%s,"items":[%s]}\n'
            % (
                kind.encode(),
                api_version.encode(),
                json.dumps(meta).encode(),
                b",".join(e.body for e in page),
            ),
        )

    # -- watches

    def _watch(self, resource: str, params: dict[str, str]) -> None:
        store = self.api.store
        selector = Selector(params.get("labelSelector", ""), params.get("fieldSelector", ""))
        initial = params.get("sendInitialEvents") == "true"
        if initial and not self.api.streaming_list:
            message = (
                "WatchOptions.meta.k8s.io is invalid: sendInitialEvents: Forbidden: "
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled"
            )
            self._answer(422, status(422, "Invalid", message))
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if initial:
            version, entries = store.items(resource, selector)
            for i in range(0, len(entries), 100):
                self._chunk(b"".join(e.line for e in entries[i : i + 100]))
            self._chunk(self._bookmark(resource, version, initial_end=True))
        else:
            version = int(params.get("resourceVersion") or store.version)
        end = time.monotonic() + float(params.get("timeoutSeconds", "1800"))
        bookmark = time.monotonic() + self.api.bookmark_seconds
        while not self.api.stopping.is_set():
            with store.changed:
                found = store.after(resource, version)
                fault = self.api.take_fault(resource, stream=True)
                now = time.monotonic()
                if found == [] and fault is None and now < min(end, bookmark):
                    store.changed.wait(min(end, bookmark) - now)
                    continue
                version = max(version, store.version)
            if fault is not None and fault.kind in ("cut", "silence", "garbage"):
                self._break(fault)
                return
            if found is None or fault is not None:
                message = f"too old resource version: {version} ({store.version})"
                self._chunk(b'{"type":"ERROR","object":%s}\n' % status(410, "Expired", message).strip())
                break
            lines = b"".join(e.line for e in found if selector(e))
            if lines:
                self._chunk(lines)
            if now >= bookmark and params.get("allowWatchBookmarks") == "true":
                self._chunk(self._bookmark(resource, version))
                bookmark = now + self.api.bookmark_seconds
            if now >= end:
                break
        self._chunk(b"")

    def _break(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.kind == "silence":
            self.api.stopping.wait(60)
        elif fault.kind == "cut":
            self._chunk(b'{"type":"MODIFIED","object":{"kind":"Service","apiVers')
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._chunk(b"this is no JSON\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    @staticmethod
    def _bookmark(resource: str, version: int, *, initial_end: bool = False) -> bytes:
        api_version, kind, _ = KINDS[resource]
        meta: dict[str, Any] = {"resourceVersion": str(version)}
        if initial_end:
            meta["annotations"] = {"k8s.io/initial-events-end": "true"}
        body: dict[str, Any] = {"kind": kind, "apiVersion": api_version, "metadata": meta}
        if kind == "EndpointSlice":
            body |= {"addressType": "", "endpoints": None, "ports": None}
        return json.dumps({"type": "BOOKMARK", "object": body}).encode() + b"\n"
