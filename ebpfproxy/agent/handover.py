"""What the agent asks of the migration from kube-proxy (``operator.migrate.node.handover`` answers)."""

from __future__ import annotations

from typing import Protocol

from ebpfproxy.datapath.kernel.maps import MapSet


class Handover(Protocol):
    def is_under_way(self) -> bool:
        """Whether connections that kube-proxy began may live on this node."""

    def reserve_ports(self, maps: MapSet, ports: tuple[int, int]) -> int:
        """Keeps source ports between these two, which kube-proxy's masqueraded connections have, from ours.

        Returns how many there are.
        """
