"""The API server as the source of objects."""

from __future__ import annotations

from collections.abc import Callable

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.events.recorder import Recorder
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.kube.objects import Event, Reduce
from ebpfproxy.kube.source_status import SourceStatus
from ebpfproxy.kube.watch.reflector import reflectors


class ClusterSource:
    """A connection, its watches, and what sends Kubernetes events; see ``source.Source``."""

    has_cluster = True

    def __init__(
        self,
        options: AgentOptions,
        sink: Callable[[Event], None],
        reduce: Reduce,
        requested: Callable[[str, str, float], None],
        became: Callable[[str], None],
    ) -> None:
        """Raises ConfigError."""
        self._connection = ApiConnection.from_options(
            options.kubeconfig, options.master, RateLimit(options.api_qps, options.api_burst)
        )
        host = self.host = self._connection.host.partition("://")[2]
        self._connection.observe = lambda verb, seconds: requested(host, verb, seconds)
        self._watches = reflectors(self._connection, options.node_name, sink, reduce)
        self._recorder = Recorder(self._connection, options.node_name, became)
        self.record = self._recorder.record

    @property
    def description(self) -> str:
        return f"API server {self._connection.host}"

    def requests(self) -> dict[tuple[str, str], int]:
        return dict(self._connection.requests)

    def statuses(self) -> list[SourceStatus]:
        return [watch.status for watch in self._watches]

    def start(self) -> None:
        for watch in self._watches:
            watch.start()
        self._recorder.start()

    def stop(self) -> None:
        for watch in self._watches:
            watch.stop()
        self._recorder.stop()
