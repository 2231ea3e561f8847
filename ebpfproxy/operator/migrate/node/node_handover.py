"""Tells the agent about kube-proxy's connections (``ebpfproxy.agent.handover.Handover``)."""

from __future__ import annotations

from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.logs import get_logger
from ebpfproxy.netlink import ctnetlink
from ebpfproxy.operator.migrate.node import hold_chains, reserved_ports
from ebpfproxy.operator.migrate.node.tools import ToolError

log = get_logger(__name__)


class NodeHandover:
    def is_under_way(self) -> bool:
        """Reads nft's and iptables' chains; False, with a warning, where they fail."""
        try:
            return hold_chains.is_handover()
        except ToolError as error:
            log.warning(
                "cannot tell whether kube-proxy has connections here, assuming none", error=str(error)
            )
            return False

    def reserve_ports(self, maps: MapSet, ports: tuple[int, int]) -> int:
        return reserved_ports.reserve(maps, ctnetlink.find(), ports)
