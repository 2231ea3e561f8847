"""The source of objects, which also takes Kubernetes events: the API server, or manifests."""

from __future__ import annotations

from collections.abc import Callable

from ebpfproxy.agent.options import AgentOptions
from ebpfproxy.kube.client import ApiConnection
from ebpfproxy.kube.events.recorder import Record, Recorder
from ebpfproxy.kube.limits import RateLimit
from ebpfproxy.kube.manifests import ManifestSource
from ebpfproxy.kube.objects import Event
from ebpfproxy.kube.source_status import SourceStatus
from ebpfproxy.kube.watch.reflector import reflectors
from ebpfproxy.services.reduce import reducer


class Source:
    """The API server or manifests."""

    def __init__(
        self,
        options: AgentOptions,
        sink: Callable[[Event], None],
        requested: Callable[[str, str, float], None],
        became: Callable[[str], None],
    ) -> None:
        """``requested`` is called for each request: with the server, the verb, seconds until its response
        began; ``became`` of each event: one of ``kube.events.recorder.RESULTS``.

        Raises ConfigError and ManifestError.
        """
        self.has_cluster = options.manifests is None
        self._describe: Callable[[], str]
        self.requests: Callable[[], dict[tuple[str, str], int]] = dict
        #: Sends a Kubernetes event. With manifests there is no API server to send it to.
        self.record: Record = lambda _: None
        reduce = reducer(options.node_name, external_ips=options.external_ips, algorithm=options.algorithm)
        if options.manifests is not None:
            manifests = ManifestSource(options.manifests, sink, node_name=options.node_name, reduce=reduce)
            manifests.check()
            self._describe = lambda: f"manifests {options.manifests}"
            self.host = ""
            self.start, self.stop = manifests.start, manifests.stop
            self.statuses: Callable[[], list[SourceStatus]] = lambda: manifests.statuses
            return
        connection = ApiConnection.from_options(
            options.kubeconfig, options.master, RateLimit(options.api_qps, options.api_burst)
        )
        watches = reflectors(connection, options.node_name, sink, reduce)
        self._describe = lambda: f"API server {connection.host}"
        host = self.host = connection.host.partition("://")[2]
        connection.observe = lambda verb, seconds: requested(host, verb, seconds)
        self.requests = lambda: dict(connection.requests)
        self.statuses = lambda: [watch.status for watch in watches]

        recorder = Recorder(connection, options.node_name, became)
        self.record = recorder.record

        def start() -> None:
            for watch in watches:
                watch.start()
            recorder.start()

        def stop() -> None:
            for watch in watches:
                watch.stop()
            recorder.stop()

        self.start, self.stop = start, stop

    @property
    def description(self) -> str:
        """For the log and ``status``; of a cluster, the API server's address that is used now."""
        return self._describe()
