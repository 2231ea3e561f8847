"""``healthCheckNodePort``: load balancers ask every node whether it has endpoints of a Service.

One thread serves all ports: a cluster can have hundreds, each asked every few seconds. Answers are
kube-proxy's (pkg/proxy/healthcheck/service_health.go), on every path.
"""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_RETRY_SECONDS = 5.0
_CLIENT_SECONDS = 10.0
_REQUEST_BYTES = 8192
_MOST_CLIENTS = 1024
_BACKLOG = 128
_ACCEPT_PAUSE_SECONDS = 0.05


class ServiceHealth(msgspec.Struct, frozen=True, order=True):
    """A Service with a healthCheckNodePort, and how many ready endpoints it has on this node."""

    namespace: str
    name: str
    port: int
    local_endpoints: int

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class _Client:
    def __init__(self, connection: socket.socket, port: int) -> None:
        self.connection = connection
        self.port = port
        self.deadline = time.monotonic() + _CLIENT_SECONDS
        self.received = b""


class NodePortHealth:
    """:meth:`update` may be called from any one thread; what it says holds when it returns."""

    def __init__(
        self,
        proxy_healthy: Callable[[], bool],
        on_failure: Callable[[ServiceHealth, str], None] = lambda *_: None,
    ) -> None:
        """``on_failure``: told once of a Service whose port cannot be bound, and why. It must not block."""
        self._proxy_healthy = proxy_healthy
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._given: tuple[ServiceHealth, ...] = ()
        self._wanted: dict[int, ServiceHealth] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._failed: dict[int, str] = {}
        self._doubles: frozenset[ServiceHealth] = frozenset()
        self._selector = selectors.DefaultSelector()
        self._clients: set[_Client] = set()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="node-port-health", daemon=True)
        self._stopping = False

    @property
    def failed(self) -> dict[int, str]:
        """Ports that cannot be bound now, and why."""
        with self._lock:
            return dict(self._failed)

    @property
    def bound(self) -> int:
        with self._lock:
            return len(self._listeners)

    def start(self) -> None:
        self._selector.register(self._wakened, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Every port is closed when this returns."""
        self._stopping = True
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        # A full pipe wakes the thread as well as one more byte would.
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"!")

    def update(self, wanted: Iterable[ServiceHealth]) -> None:
        """All Services that have such a port; of two with the same port the first by name has it."""
        given = tuple(sorted(wanted))
        if given == self._given:
            return
        self._given = given
        with self._lock:
            self._wanted = {}
            doubles = set()
            for each in given:
                if self._wanted.setdefault(each.port, each) is not each:
                    doubles.add(msgspec.structs.replace(each, local_endpoints=0))
            for port in self._listeners.keys() - self._wanted.keys():
                self._close(port)
            for port in self._failed.keys() - self._wanted.keys():
                del self._failed[port]
            for port in self._wanted.keys() - self._listeners.keys() - self._failed.keys():
                self._open(port)
        for each in doubles - self._doubles:
            owner = self._wanted[each.port]
            log.warning("health check port is another's", port=each.port, service=str(each), owner=str(owner))
            self._on_failure(each, f"it is {owner}'s")
        self._doubles = frozenset(doubles)
        self._wake()

    # -- listeners; the lock is held

    def _open(self, port: int) -> None:
        try:
            listener = _listen(port)
        except OSError as error:
            if port not in self._failed:
                service = str(self._wanted[port])
                log.error("health check port cannot be bound", port=port, service=service, error=error)
                self._on_failure(self._wanted[port], str(error))
            self._failed[port] = str(error)
            return
        if self._failed.pop(port, None) is not None:
            log.info("health check port is bound now", port=port, service=str(self._wanted[port]))
        self._listeners[port] = listener
        self._selector.register(listener, selectors.EVENT_READ, port)

    def _close(self, port: int) -> None:
        listener = self._listeners.pop(port)
        self._selector.unregister(listener)
        listener.close()

    # -- the thread

    def _run(self) -> None:
        next_retry = 0.0
        while not self._stopping:
            for key, _ in self._selector.select(1.0):
                if key.data is None:
                    _drain(self._wakened)
                elif isinstance(key.data, _Client):
                    self._serve(key.data)
                else:
                    self._accept(key.data)
            now = time.monotonic()
            for client in [c for c in self._clients if c.deadline < now or c.port not in self._listeners]:
                self._end(client)
            if now >= next_retry:
                next_retry = now + _RETRY_SECONDS
                with self._lock:
                    for port in list(self._failed):
                        self._open(port)
        with self._lock:
            for port in list(self._listeners):
                self._close(port)
        for client in list(self._clients):
            self._end(client)

    def _accept(self, port: int) -> None:
        with self._lock:
            listener = self._listeners.get(port)
            if listener is None:
                return
            connection = _accepted(listener)
        if connection is None:
            return
        if len(self._clients) >= _MOST_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        client = _Client(connection, port)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)

    def _serve(self, client: _Client) -> None:
        try:
            data = client.connection.recv(_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        if not data or len(client.received) > _REQUEST_BYTES:
            self._end(client)
            return
        while b"\r\n\r\n" in client.received:
            head, _, client.received = client.received.partition(b"\r\n\r\n")
            with self._lock:
                service = self._wanted.get(client.port)
            if service is None or not self._reply(client, service, head):
                self._end(client)
                return

    def _reply(self, client: _Client, service: ServiceHealth, head: bytes) -> bool:
        """Whether the connection goes on."""
        answer, goes_on = self._answer(service, head)
        client.deadline = time.monotonic() + _CLIENT_SECONDS
        try:
            # An answer is smaller than any socket's buffer: a client that leaves no room is ended.
            return client.connection.send(answer) == len(answer) and goes_on
        except OSError:
            return False

    def _answer(self, service: ServiceHealth, head: bytes) -> tuple[bytes, bool]:
        """The answer, and whether the connection goes on."""
        line, *headers = head.split(b"\r\n")
        words = line.split()
        if len(words) != 3 or words[0] not in (b"GET", b"HEAD") or not words[2].startswith(b"HTTP/1."):
            return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", False
        closes = words[2] == b"HTTP/1.0" or any(map(_ends_connection, headers))
        count = service.local_endpoints
        healthy = self._proxy_healthy()
        body = _BODY % (
            msgspec.json.encode(service.namespace),
            msgspec.json.encode(service.name),
            count,
            b"true" if healthy else b"false",
        )
        status = b"200 OK" if count and healthy else b"503 Service Unavailable"
        answer = _HEAD % (status, count, _http_date(), len(body))
        answer += b"Connection: close\r\n\r\n" if closes else b"\r\n"
        return answer + (body if words[0] == b"GET" else b""), not closes

    def _end(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.connection)
        client.connection.close()


_HEAD = (
    b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"
    b"X-Load-Balancing-Endpoint-Weight: %d\r\nDate: %s\r\nContent-Length: %d\r\n"
)
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_BODY = (
    b'{\n\t"service": {\n\t\t"namespace": %s,\n\t\t"name": %s\n\t},\n'
    b'\t"localEndpoints": %d,\n\t"serviceProxyHealthy": %s\n}'
)


def _http_date() -> bytes:
    """RFC 9110's, for which Python has a function in a package that is large."""
    now = time.gmtime()
    day, month = _DAYS[now.tm_wday], _MONTHS[now.tm_mon - 1]
    return time.strftime(f"{day}, %d {month} %Y %H:%M:%S GMT", now).encode()


def _listen(port: int) -> socket.socket:
    """On every address of both families; of IPv4 alone where there is no IPv6. Raises OSError."""
    # Where the kernel has no IPv6, create_server raises ValueError for dualstack_ipv6.
    if socket.has_dualstack_ipv6():
        try:
            return _unblocking(
                socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
                )
            )
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return _unblocking(socket.create_server(("0.0.0.0", port), backlog=_BACKLOG))


def _unblocking(listener: socket.socket) -> socket.socket:
    # update() can close a listener and open one with its number between select and accept.
    listener.setblocking(False)
    return listener


def _accepted(listener: socket.socket) -> socket.socket | None:
    """None where nobody waits, or this process has no descriptors left: then after a pause."""
    try:
        return listener.accept()[0]
    except (BlockingIOError, ConnectionAbortedError):
        return None
    except OSError:
        # The listener stays readable: without a pause the thread would spin.
        time.sleep(_ACCEPT_PAUSE_SECONDS)
        return None


def _ends_connection(header: bytes) -> bool:
    """``Connection: close``, or a body, which is not read and so must not be taken for a request."""
    name, _, value = header.lower().partition(b":")
    return name in (b"content-length", b"transfer-encoding") or (name == b"connection" and b"close" in value)


def _drain(wakened: socket.socket) -> None:
    try:
        while wakened.recv(4096):
            pass
    except BlockingIOError:
        pass
