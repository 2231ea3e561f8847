"""The node's devices, addresses and ranges: from the kernel and the Node object to maps and programs."""

from __future__ import annotations

from ebpfproxy.agent.agent_options import AgentOptions
from ebpfproxy.agent.programs import ProgramManager
from ebpfproxy.datapath.node.packets import PacketDevice
from ebpfproxy.datapath.programs.devices import Target
from ebpfproxy.datapath.programs.xdp import XdpDevice
from ebpfproxy.datapath.services.writer import Writer
from ebpfproxy.health.node_port import NodePortHealth
from ebpfproxy.logs import get_logger
from ebpfproxy.node.facts import Facts, NodeFacts
from ebpfproxy.node.local import LocalMode
from ebpfproxy.node.network import Device, Network, network_of
from ebpfproxy.node.node_ports import select_node_port_addresses
from ebpfproxy.node.roles import Role
from ebpfproxy.services.model import Prefix

log = get_logger(__name__)


class NodeNetwork:
    """Keeps maps and programs up to date with devices, addresses and ranges. One thread uses it."""

    def __init__(
        self,
        options: AgentOptions,
        writer: Writer,
        programs: ProgramManager,
        node_facts: NodeFacts,
        node_port_health: NodePortHealth,
    ) -> None:
        """``node_facts``: what is known of the Node object before it is read."""
        self._options = options
        self._writer = writer
        self._programs = programs
        self._packets = programs.packets
        self._node_port_health = node_port_health
        self._facts = Facts()
        self.node_facts = node_facts
        self._devices: dict[int, Device] = {}
        self._own_addresses: frozenset[bytes] = frozenset()
        self._pod_cidrs: tuple[Prefix, ...] | None = None
        self._service_cidrs: tuple[tuple[Prefix, ...], frozenset[bytes]] | None = None

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

    def set_pod_cidrs(self) -> None:
        """The ranges of pods, from the options or from the Node once it is there."""
        pods = self._options.cluster_cidrs
        if self._options.local_pods.mode is LocalMode.NODE_CIDR:
            pods = self.node_facts.pod_cidrs
        if pods != self._pod_cidrs:
            self._pod_cidrs = pods
            self._packets.cidrs.set_pods(pods)

    def set_service_cidrs(self, known: tuple[Prefix, ...] | None, taken: frozenset[bytes]) -> None:
        """Only once Services are programmed: before that, nobody has any address there.

        ``known``: ranges of ServiceCIDRs, to which the configured ones are added; None keeps those that an
        earlier agent knew. ``taken``: addresses of Services that another proxy serves; this node's own are
        added.
        """
        ranges = self._packets.cidrs.adopted if known is None else known
        found = (*self._options.service_cidrs, *ranges), taken | self._own_addresses
        if found == self._service_cidrs:
            return
        self._service_cidrs = found
        if not self._packets.cidrs.set_services(*found):
            log.warning(
                "addresses of other proxies do not fit into the map: packets to those left out are dropped",
                addresses=len(taken),
            )

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
        self._node_port_health.set_addresses(node_ports if self._options.node_port_addresses else None)
        self._writer.set_primary_addresses(network.primary)
        self._set_devices(network)
        self._programs.devices_changed()

    def _set_devices(self, network: Network) -> None:
        self._own_addresses = frozenset(network.addresses)
        own = {len(address): address for address in network.primary}
        self._packets.set_devices(
            (
                PacketDevice(
                    target=Target(d.ifindex, d.name, raw=not d.ethernet),
                    address4=d.address4,
                    address6=d.address6,
                    local=d.role is Role.LOCAL,
                    tunnel=d.role is Role.TUNNEL,
                    pods=self._options.local_pods.is_behind(d),
                    ingress_below=d.ingress_below,
                    egress_below=d.egress_below,
                    egress_above=d.egress_above,
                    mtu=d.mtu,
                )
                for d in network.devices
            ),
            own.get(4, b""),
            own.get(16, b""),
            routes_by_source=self._facts.routes_by_source,
        )
        self._packets.set_xdp_devices(
            XdpDevice(
                ifindex=d.ifindex,
                name=d.name,
                link_address=d.link_address,
                is_veth=d.kind == "veth",
                mtu=d.mtu,
                obstacle=d.xdp_obstacle,
            )
            for d in network.devices
            if d.role is Role.UPLINK
        )

    def _log_roles(self, devices: tuple[Device, ...]) -> None:
        """Pods' devices come and go by the hundred: of those only a change of role is logged."""
        for device in devices:
            before = self._devices.get(device.ifindex)
            if before is not None and (before.role, before.why) == (device.role, device.why):
                continue
            tell = log.debug if before is None and device.role is Role.LOCAL else log.info
            tell("device has a role", name=device.name, taken_for=str(device.role), because=device.why)
        self._devices = {device.ifindex: device for device in devices}
