"""The source of objects, which also takes Kubernetes events: the API server, or manifests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.kube.objects import Event
from ebpfproxy.kube.source_status import SourceStatus
from ebpfproxy.services.reduce import reducer


class Source(Protocol):
    """``host``: the API server's, by which requests are counted; empty without one."""

    @property
    def has_cluster(self) -> bool: ...

    @property
    def host(self) -> str: ...

    @property
    def description(self) -> str:
        """For the log and ``status``; of a cluster, the API server's address that is used now."""

    def record(self, event: KubeEvent, /) -> None:
        """Sends a Kubernetes event."""

    def requests(self) -> dict[tuple[str, str], int]:
        """How many requests there were, by method and result."""

    def statuses(self) -> list[SourceStatus]:
        """One for each resource."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


def source_of(
    options: AgentOptions,
    sink: Callable[[Event], None],
    requested: Callable[[str, str, float], None],
    became: Callable[[str], None],
) -> Source:
    """``requested`` is called for each request: with the server, the verb, seconds until its response began;
    ``became`` of each Kubernetes event: one of ``kube.events.event.RESULTS``.

    Raises ConfigError and ManifestError.
    """
    reduce = reducer(options.node_name, external_ips=options.external_ips, algorithm=options.algorithm)
    # A start with one source does not import what the other needs, such as urllib3.
    if options.manifests is not None:
        from ebpfproxy.agent.folder_source import FolderSource  # noqa: PLC0415

        return FolderSource(options.manifests, sink, options.node_name, reduce)
    from ebpfproxy.agent.cluster_source import ClusterSource  # noqa: PLC0415

    return ClusterSource(options, sink, reduce, requested, became)
