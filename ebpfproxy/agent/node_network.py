"""The node's devices and addresses, from what the kernel and the Node object say to the maps and programs."""

from __future__ import annotations

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.logs import get_logger
from ebpfproxy.node.facts import Facts, NodeFacts
from ebpfproxy.node.network import Device, network_of
from ebpfproxy.node.node_ports import select_node_port_addresses
from ebpfproxy.node.roles import Role

log = get_logger(__name__)


class NodeNetwork:
    """Keeps maps and programs up to date with the node's devices and addresses. One thread uses it."""

    def __init__(
        self, options: AgentOptions, writer: Writer, programs: ProgramManager, node_facts: NodeFacts
    ) -> None:
        """``node_facts``: what is known of the Node object before it is read."""
        self._options = options
        self._writer = writer
        self._programs = programs
        self._facts = Facts()
        self.node_facts = node_facts
        self._devices: dict[int, Device] = {}

    @property
    def devices(self) -> list[Device]:
        return list(self._devices.values())

    def set_facts(self, facts: Facts) -> None:
        """Takes what the kernel says of this node."""
        self._facts = facts
        self._apply()

    def set_node(self, facts: NodeFacts) -> None:
        """Takes what the Node object says. A cloud provider may write its addresses late."""
        if facts != self.node_facts:
            self.node_facts = facts
            self._apply()

    def _apply(self) -> None:
        network = network_of(self._facts, self.node_facts, self._options.devices)
        node_ports = select_node_port_addresses(network, self._options.node_port_addresses)
        log.info(
            "found devices and addresses",
            uplinks=[d.name for d in network.devices if d.role is Role.UPLINK],
            tunnels=[d.name for d in network.devices if d.role is Role.TUNNEL],
            outside=[d.name for d in network.devices if d.role is Role.OUTSIDE],
            local=sum(d.role is Role.LOCAL for d in network.devices),
            addresses=len(network.addresses),
            node_port_addresses=len(node_ports),
        )
        self._log_roles(network.devices)
        self._writer.set_own_addresses(network.addresses, network.answered)
        self._writer.set_node_addresses(node_ports)
        self._writer.set_primary_addresses(network.primary)
        self._programs.set_network(network)

    def _log_roles(self, devices: tuple[Device, ...]) -> None:
        """Pods' devices come and go by the hundred: of those only a change of role is logged."""
        for device in devices:
            before = self._devices.get(device.ifindex)
            if before is not None and (before.role, before.why) == (device.role, device.why):
                continue
            tell = log.debug if before is None and device.role is Role.LOCAL else log.info
            tell("device has a role", name=device.name, taken_for=str(device.role), because=device.why)
        self._devices = {device.ifindex: device for device in devices}
