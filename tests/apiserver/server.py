"""The stand-in: its listener, credentials and faults."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from tests.apiserver.containers import Containers
from tests.apiserver.control import Control
from tests.apiserver.events import Events
from tests.apiserver.faults import Fault, Faults
from tests.apiserver.handler import Handler
from tests.apiserver.single_objects import Cluster
from tests.apiserver.store import Store


class ApiServer:
    """A context manager; ``url`` is where it listens, ``requests`` what it was asked
    (path and query), ``headers`` with what headers.

    ``tokens``: bearer tokens that are good, None where nobody is asked. ``tls`` makes it HTTPS; a client
    certificate that the context verifies counts as credentials. ``denied``: resources that nobody may see.
    ``compresses_streams``: as with the gate WatchListCompression; pages of 128 KiB are compressed anyway.
    ``unserved``: paths of resources that this server's version does not have.
    ``cluster`` has objects of further kinds, one by one; ``containers`` runs commands in pods.
    ``public``: bodies by path that everybody may GET. ``events`` are those of events.k8s.io.
    All of these may be changed while it runs, from any thread.
    """

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
        self.faults = Faults()
        self.control = Control(self)
        self.tokens = tokens
        self.denied: set[str] = set()
        self.unserved: set[str] = set()
        self.compresses_streams = False
        self.cluster = Cluster(self.store, self.denied)
        self.containers = Containers()
        self.public: dict[str, bytes] = {}
        self.events = Events(self.denied)
        self.streaming_list = streaming_list
        self.bookmark_seconds = bookmark_seconds
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.headers: list[dict[str, str]] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = HttpServer((host, port), Handler)
        self._server.api = self
        if tls is not None:
            # The handshake is done in the connection's thread.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self.url = f"{'https' if tls is not None else 'http'}://{host}:{self.port}"

    def __enter__(self) -> ApiServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        self._wake()
        self._server.shutdown()
        self._server.server_close()
        self.drop_connections()

    def drop_connections(self) -> None:
        """Resets every open connection, as a crash does."""
        with self._lock:
            connections = list(self._connections)
        for each in connections:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def fail(self, kind: str, **options: Any) -> Fault:
        """Injects a fault; the keywords are those of ``faults.Fault``."""
        fault = Fault(kind, **options)
        self.faults.add(fault)
        self._wake()
        return fault

    def heal(self) -> None:
        self.faults.clear()

    def _wake(self) -> None:
        with self.store.changed:
            self.store.changed.notify_all()

    def track(self, connection: socket.socket, *, add: bool) -> None:
        with self._lock:
            (self._connections.add if add else self._connections.discard)(connection)


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    api: ApiServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Errors of disconnecting clients are expected here."""
