"""The programs: loaded in a worker, attached once the maps are complete, then kept on all devices.

Only :meth:`ProgramManager.load` runs outside the reconciler's thread.
"""

from __future__ import annotations

import time
from pathlib import Path

from ebpfproxy.agent.background import BackgroundRunner
from ebpfproxy.agent.handover import Handover
from ebpfproxy.agent.options import AgentOptions
from ebpfproxy.datapath.abi.hooks import GUARD, LOOPBACK, PACKETS, RAW_PACKETS, SOCKETS
from ebpfproxy.datapath.abi.node_layout import DeviceFlags
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.probe import Features
from ebpfproxy.datapath.node.packets import PacketDevice, PacketPath
from ebpfproxy.datapath.programs import attach, detach, loader
from ebpfproxy.datapath.programs.devices import Target, device_attachments
from ebpfproxy.logs import get_logger
from ebpfproxy.netlink.namespaces import netns_cookie
from ebpfproxy.node.facts import NodeFacts
from ebpfproxy.node.local import LocalMode
from ebpfproxy.node.network import Network
from ebpfproxy.node.roles import Role
from ebpfproxy.services.model import Prefix

log = get_logger(__name__)

#: The time between two attempts to attach to devices that failed.
_RETRY_SECONDS = 10.0


class ProgramManager:
    """Programs stay attached when the agent stops: the next one replaces them."""

    def __init__(
        self,
        options: AgentOptions,
        maps: MapSet,
        pins: Path,
        features: Features,
        background: BackgroundRunner,
        *,
        handover: Handover,
    ) -> None:
        self._options = options
        self._maps = maps
        self._pins = pins
        self._features = features
        self._background = background
        self._handover = handover
        self._packets = PacketPath(maps, pins, tcx=features.tcx, loopback=options.node_ports_on_loopback)
        self._programs: Path | None = None
        self._loading = False
        self._next_try = 0.0
        self._cidrs: tuple[Prefix, ...] | None = None
        self._service_cidrs: tuple[tuple[Prefix, ...], frozenset[bytes]] | None = None
        self._own_addresses: frozenset[bytes] = frozenset()
        #: True after the first time: from then on programs follow the node's devices.
        self.attached = False
        #: Devices that could not be attached to, with the reasons.
        self.failures: list[str] = []

    @property
    def targets(self) -> tuple[Target, ...]:
        """The devices that packet programs should be attached to."""
        return self._packets.targets

    @property
    def attached_devices(self) -> frozenset[int]:
        """Indexes of the devices that they are attached to."""
        return self._packets.attached

    # -- loading

    def start_load(self) -> None:
        self._loading = True
        self._background(self.load, self._loaded)

    def load(self) -> Path:
        """Compiles and loads the programs, unless they are pinned already. Raises LoadError."""
        options = self._options
        wanted = loader.Options(
            features=self._features,
            host_netns_cookie=netns_cookie(),
            node_ports_on_loopback=options.node_ports_on_loopback,
            pod_sockets=options.pod_sockets,
            masquerade_all=options.masquerade_all,
            bypass_netfilter=options.bypass_netfilter,
            masquerade_ports=options.masquerade_ports,
            masquerade_ports_shared=options.masquerade_ports_shared,
            pods_by_cidr=options.local_pods.by_cidr,
        )
        modules = (
            SOCKETS,
            PACKETS,
            *((GUARD,) if options.guard_node_ports else ()),
            *((LOOPBACK,) if options.node_ports_on_loopback else ()),
            *((RAW_PACKETS,) if self._packets.needs_raw else ()),
        )
        try:
            return loader.ensure_loaded(self._maps, wanted, modules)
        except OSError as error:
            raise loader.LoadError(str(error)) from error

    def _loaded(self, folder: Path) -> None:
        self._loading = False
        self._programs = folder
        if self.attached:
            self._attach_devices()

    # -- attaching

    def attach(self, started: float) -> None:
        """Attaches everything once programs are loaded, and after that to devices that failed.

        ``started``: the agent's start, in Unix seconds.
        """
        if self.attached:
            if self.failures and time.monotonic() >= self._next_try:
                self._attach_devices()
            return
        if self._programs is None:
            return
        migration = MapMigration(self._pins, self._maps)
        migration.copy()
        changed = attach.attach_all(
            self._pins,
            self._programs,
            self._options.cgroup_root,
            guard_node_ports=self._options.guard_node_ports,
        )
        self.attached = True
        migration.copy()
        mode = DeviceFlags.HANDOVER if self._handover.is_under_way() else DeviceFlags(0)
        # A new flow needs programs at all devices: until they are there it is kube-proxy's.
        is_first = not device_attachments(self._pins)
        self._packets.set_mode(mode | DeviceFlags.WAITS if mode and is_first else mode)
        changed += self._attach_devices()
        if mode:
            taken = self._handover.reserve_ports(self._maps, self._options.masquerade_ports)
            log.info("leaving existing connections to netfilter", ports_taken=taken)
        self._packets.set_mode(mode)
        migration.copy()
        migration.close()
        if migration.copied:
            log.info("copied flows from maps of other sizes", entries=migration.copied)
        loader.remove_others(self._maps, self._programs)
        removed = detach.remove_other_versions(self._pins, self._maps.folder)
        log.info(
            "programs are attached",
            cgroup=str(self._options.cgroup_root),
            changed=changed or "nothing",
            removed=[str(p) for p in removed],
            seconds_since_start=round(time.time() - started, 3),
        )

    def _attach_devices(self) -> list[str]:
        assert self._programs is not None
        if self._packets.needs_raw and not loader.is_loaded(self._programs, RAW_PACKETS):
            if not self._loading:
                self.start_load()
            return []
        self._next_try = time.monotonic() + _RETRY_SECONDS
        changed, failed = self._packets.attach(self._programs)
        if changed and self.attached:
            log.debug("attached to devices", changed=changed)
        for failure in failed:
            if failure not in self.failures:
                log.error("failed to attach to a device, trying again", error=failure)
        self.failures = failed
        return changed

    # -- this node's devices and ranges

    def set_network(self, network: Network) -> None:
        self._own_addresses = frozenset(network.addresses)
        own = {len(address): address for address in network.primary}
        self._packets.set_devices(
            (
                PacketDevice(
                    Target(d.ifindex, d.name, not d.ethernet),
                    d.address4,
                    d.address6,
                    d.role is Role.LOCAL,
                    self._options.local_pods.is_behind(d),
                    d.ingress_below,
                    d.egress_below,
                    d.mtu,
                )
                for d in network.devices
            ),
            own.get(4, b""),
            own.get(16, b""),
        )
        if self.attached:
            self._attach_devices()

    def set_pod_cidrs(self, node: NodeFacts) -> None:
        """The ranges of pods, from the options or from the Node once it is there."""
        pods = self._options.cluster_cidrs
        if self._options.local_pods.mode is LocalMode.NODE_CIDR:
            pods = node.pod_cidrs
        if pods != self._cidrs:
            self._cidrs = pods
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
