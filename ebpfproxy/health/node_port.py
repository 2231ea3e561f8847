"""``healthCheckNodePort``: load balancers ask every node whether it has endpoints of a Service.

A cluster can have hundreds of such ports, each asked every few seconds. Answers are kube-proxy's
(pkg/proxy/healthcheck/service_health.go), on every path.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from ebpfproxy.health.http import END_SECONDS, Answer, HttpThread, listen, text_answer
from ebpfproxy.health.listeners import Listen
from ebpfproxy.logs import get_logger

log = get_logger(__name__)

_BODY = (
    '{\n\t"service": {\n\t\t"namespace": %s,\n\t\t"name": %s\n\t},\n'
    '\t"localEndpoints": %d,\n\t"serviceProxyHealthy": %s\n}'
)


class ServiceHealth(msgspec.Struct, frozen=True, order=True):
    """A Service with a healthCheckNodePort, and how many ready endpoints it has on this node."""

    namespace: str
    name: str
    port: int
    local_endpoints: int

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class NodePortHealth:
    """:meth:`update` may be called from any one thread; what it says holds when it returns."""

    def __init__(
        self,
        proxy_healthy: Callable[[], bool],
        on_failure: Callable[[ServiceHealth, str], None] = lambda *_: None,
        *,
        listen: Listen = listen,
    ) -> None:
        """``on_failure``: told once of a Service whose port cannot be bound, and why. It must not block."""
        self._proxy_healthy = proxy_healthy
        self._on_failure = on_failure
        self._listen = listen
        self._lock = threading.Lock()
        self._given: tuple[ServiceHealth, ...] = ()
        self._wanted: dict[int, ServiceHealth] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._failed: dict[int, str] = {}
        self._duplicates: frozenset[ServiceHealth] = frozenset()
        self._addresses: frozenset[bytes] | None = None
        self._thread = HttpThread("node-port-health")

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
        self._thread.repeat(self._retry)
        self._thread.start()

    def stop(self) -> None:
        """Every port is closed when this returns."""
        self._thread.stop(END_SECONDS)

    def set_addresses(self, addresses: frozenset[bytes] | None) -> None:
        """The addresses at which checks are answered, beside the loopback's: kube-proxy's nodePortAddresses.

        None is all of them. Any thread may call this.
        """
        self._addresses = addresses

    def _admits(self, client: socket.socket) -> bool:
        """One socket is for all addresses, which come and go: what came to another one is closed."""
        addresses = self._addresses
        if addresses is None:
            return True
        at = ipaddress.ip_address(client.getsockname()[0])
        if isinstance(at, ipaddress.IPv6Address) and at.ipv4_mapped is not None:
            at = at.ipv4_mapped
        return at.is_loopback or at.packed in addresses

    def update(self, wanted: Iterable[ServiceHealth]) -> None:
        """All Services that have such a port; of two with the same port the first by name has it."""
        given = tuple(sorted(wanted))
        if given == self._given:
            return
        self._given = given
        duplicates = set()
        with self._lock:
            self._wanted = {}
            for each in given:
                if self._wanted.setdefault(each.port, each) is not each:
                    duplicates.add(msgspec.structs.replace(each, local_endpoints=0))
            for port in self._listeners.keys() - self._wanted.keys():
                self._thread.remove(self._listeners.pop(port))
            for port in self._failed.keys() - self._wanted.keys():
                del self._failed[port]
            for port in self._wanted.keys() - self._listeners.keys() - self._failed.keys():
                self._open(port)
        for each in duplicates - self._duplicates:
            owner = self._wanted[each.port]
            log.warning(
                "health check port is used by another Service, not serving it",
                port=each.port,
                service=str(each),
                owner=str(owner),
            )
            self._on_failure(each, f"it is {owner}'s")
        self._duplicates = frozenset(duplicates)

    def _open(self, port: int) -> None:
        """The lock is held."""
        try:
            listener = self._listen("", port)
        except OSError as error:
            if port not in self._failed:
                service = self._wanted[port]
                log.error(
                    "cannot bind health check port, trying again",
                    port=port,
                    service=str(service),
                    error=str(error),
                )
                self._on_failure(service, str(error))
            self._failed[port] = str(error)
            return
        if self._failed.pop(port, None) is not None:
            log.info("health check port is bound now", port=port, service=str(self._wanted[port]))
        self._listeners[port] = listener
        self._thread.add(listener, partial(self._respond, port), self._admits)

    # -- the thread

    def _retry(self) -> bool:
        with self._lock:
            for port in list(self._failed):
                self._open(port)
        return False

    def _respond(self, port: int, path: str) -> Answer:  # noqa: ARG002 - all paths are the same
        with self._lock:
            service = self._wanted.get(port)
        if service is None:
            return text_answer("", 503)
        healthy, count = self._proxy_healthy(), service.local_endpoints
        # Manifests, which no API server has checked, may have any names.
        names = (msgspec.json.encode(each).decode() for each in (service.namespace, service.name))
        body = _BODY % (*names, count, str(healthy).lower())
        return Answer(
            200 if count and healthy else 503,
            "application/json",
            body.encode(),
            (("X-Load-Balancing-Endpoint-Weight", str(count)),),
        )
