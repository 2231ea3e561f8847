"""What the agent asks the migration from kube-proxy: ``operator.migrate.node.node_handover`` has it."""

from __future__ import annotations

from typing import Protocol

from ebpfproxy.datapath.kernel.maps import MapSet


class Handover(Protocol):
    def is_under_way(self) -> bool:
        """True if connections that kube-proxy began may be open on this node."""

    def reserve_ports(self, maps: MapSet, ports: tuple[int, int]) -> int:
        """Reserves the source ports in this range that kube-proxy's masqueraded connections have.

        Returns how many there are.
        """
