"""A folder of manifests as the source of objects, without a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ebpfproxy.kube.events.event import KubeEvent
from ebpfproxy.kube.manifests import ManifestSource
from ebpfproxy.kube.objects import Event, Reduce
from ebpfproxy.kube.source_status import SourceStatus


class FolderSource:
    """See ``source.Source``."""

    has_cluster = False
    host = ""

    def __init__(self, folder: Path, sink: Callable[[Event], None], node_name: str, reduce: Reduce) -> None:
        """Raises ManifestError."""
        self.description = f"manifests {folder}"
        self._manifests = ManifestSource(folder, sink, node_name=node_name, reduce=reduce)
        self._manifests.check()
        self.start, self.stop = self._manifests.start, self._manifests.stop

    def record(self, event: KubeEvent) -> None:
        """There is no API server to send it to."""

    def requests(self) -> dict[tuple[str, str], int]:
        return {}

    def statuses(self) -> list[SourceStatus]:
        return self._manifests.statuses
