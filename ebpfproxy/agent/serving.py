"""Health checks and scrapes: with which sockets they are answered, and from when on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ebpfproxy.agent import http_servers, kube_events
from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.succession import HOLD_SECONDS, Predecessor
from ebpfproxy.health.listeners import Listeners
from ebpfproxy.health.node_port import NodePortHealth, ServiceHealth
from ebpfproxy.health.proxy import ProxyHealth
from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.metrics.agent_metrics import AgentMetrics


class Serving:
    """The agent's HTTP servers.

    Where an earlier agent has left its sockets, that agent answers, or checks wait in the kernel, until this
    one is healthy, but not for ever: it may never be.
    """

    def __init__(
        self,
        options: AgentOptions,
        metrics: AgentMetrics,
        configz: Mapping[str, object],
        *,
        listeners: Listeners,
        predecessor: Predecessor,
        record: Callable[[KubeEvent], None],
    ) -> None:
        """Creates the servers, and starts none. ``record`` takes Kubernetes events."""
        self._node = options.node_name
        self._listeners, self._predecessor, self._record = listeners, predecessor, record
        self.health = ProxyHealth(options.health_timeout)
        self.node_port_health = NodePortHealth(
            lambda: self.health.healthy, self._port_not_bound, listen=listeners.listen
        )
        self.servers = http_servers.servers(options, self.health, metrics, configz, listeners.listen_instead)
        self._is_started = False
        self._start_by = time.monotonic() + HOLD_SECONDS

    def follow(self, *, complete: bool) -> None:
        """Starts the servers once they may answer. ``complete``: all that is known has been programmed."""
        if not self._is_started and self._may_start():
            self._start()
        if self._is_started and complete:
            self._listeners.release_inherited()

    def _may_start(self) -> bool:
        is_late = time.monotonic() >= self._start_by
        return not self._listeners.has_inherited or self.health.healthy or is_late

    def _start(self) -> None:
        self._is_started = True
        self.node_port_health.start()
        for server in self.servers:
            server.start()
            if server.failure:
                self._record(kube_events.server_not_started(self._node, server.name, server.failure))
        self._predecessor.dismiss()

    def _port_not_bound(self, service: ServiceHealth, error: str) -> None:
        key = ObjectKey(service.namespace, service.name)
        self._record(kube_events.health_port_not_bound(self._node, key, service.port, error))

    def stop(self) -> None:
        for server in self.servers:
            server.stop()
        self.node_port_health.stop()
