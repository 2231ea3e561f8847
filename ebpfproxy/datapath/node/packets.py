"""The devices and address ranges that packet programs know, and the devices that they are attached to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, pack_device, with_device_flags
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.node.crc32c import zeros_tables
from ebpfproxy.datapath.node.service_cidrs import Cidrs
from ebpfproxy.datapath.programs.attach import Drifted
from ebpfproxy.datapath.programs.devices import LOOPBACK, DeviceAttacher, Target
from ebpfproxy.datapath.programs.xdp import XdpAttacher, XdpDevice
from ebpfproxy.datapath.programs.xdp_places import XdpMode

#: In the ``devices`` map: what masquerading uses where a device is not known.
_ANY_DEVICE = 0
#: The key of a map of one element.
_FIRST = U32.pack(0)


class PacketDevice(NamedTuple):
    """A device to attach to. ``local``: it leads to pods or VMs; ``tunnel``: to other nodes' pods.

    ``pods``: what comes from it is a pod's.

    ``ingress_below``: what comes in by it has come in by another of the devices before; ``egress_below``:
    what leaves by it leaves by another one after that; ``egress_above``: some of what leaves by it has
    left by another one before. Addresses may be empty; ``mtu`` in bytes.
    """

    target: Target
    address4: bytes
    address6: bytes
    local: bool
    tunnel: bool
    pods: bool
    ingress_below: bool
    egress_below: bool
    egress_above: bool
    mtu: int


class PacketPath:
    """The only writer of ``devices``, ``crc32c`` and, by ``cidrs``, of the CIDRs. One thread uses it.

    ``loopback``: NodePorts answer on the loopback device. ``xdp``: how uplinks may have the XDP program.
    """

    def __init__(
        self, maps: MapSet, pins: Path, *, tcx: bool, loopback: bool, xdp: tuple[XdpMode, ...] = ()
    ) -> None:
        self._devices = maps["devices"]
        self._entries = dict(self._devices.items())
        self._cidrs = Cidrs(maps)
        self._attacher = DeviceAttacher(pins, tcx=tcx)
        self._xdp = XdpAttacher(pins, maps["xdp_devices"], xdp)
        self._xdp_devices: tuple[XdpDevice, ...] = ()
        self._loopback = (LOOPBACK,) if loopback else ()
        self._targets: tuple[Target, ...] = self._loopback
        self._node = (b"", b"")
        self._mode = DeviceFlags(0)
        self._crc = maps["crc32c"]
        if self._crc.lookup(_FIRST) != (tables := zeros_tables()):
            self._crc.update(_FIRST, tables)

    @property
    def needs_raw(self) -> bool:
        """True if any device has no link layer."""
        return any(target.raw for target in self._targets)

    @property
    def targets(self) -> tuple[Target, ...]:
        return self._targets

    @property
    def attached(self) -> frozenset[int]:
        """Indexes of the devices that programs are attached to."""
        return self._attacher.attached

    def set_devices(
        self,
        devices: Iterable[PacketDevice],
        address4: bytes,
        address6: bytes,
        *,
        routes_by_source: bool = False,
    ) -> None:
        """Sets all devices, and the node's own addresses, which are for packets by any other device.

        ``routes_by_source``: routing rules tell sources apart.
        """
        found = list(devices)
        self._node = address4, address6
        wanted = {U32.pack(_ANY_DEVICE): pack_device(*self._node, self._mode, 0)}
        for each in found:
            flags = DeviceFlags.PODS * each.pods | DeviceFlags.LOCAL * each.local
            flags |= DeviceFlags.TUNNEL * each.tunnel
            flags |= DeviceFlags.INGRESS_BELOW * each.ingress_below
            flags |= DeviceFlags.EGRESS_BELOW * each.egress_below
            flags |= DeviceFlags.EGRESS_ABOVE * each.egress_above
            flags |= DeviceFlags.RULES * routes_by_source
            wanted[U32.pack(each.target.ifindex)] = pack_device(each.address4, each.address6, flags, each.mtu)
        refused = self._devices.bring(wanted)
        self._entries = {key: value for key, value in wanted.items() if key not in refused}
        self._targets = (*self._loopback, *(each.target for each in found))

    def set_xdp_devices(self, devices: Iterable[XdpDevice]) -> None:
        """Sets the devices that may have the XDP program."""
        self._xdp_devices = tuple(devices)

    def set_mode(self, mode: DeviceFlags) -> None:
        """Sets what holds for the whole node.

        HANDOVER_MODE: TCP connections that began elsewhere are netfilter's. NO_NEW_FLOWS: programs create no
        flow. MIGRATING_FLOWS: flows are being copied to these maps, and unknown segments are not rejected.
        """
        if mode != self._mode:
            self._mode = mode
            key, value = U32.pack(_ANY_DEVICE), pack_device(*self._node, mode, 0)
            self._devices.update(key, value)
            self._entries = {**self._entries, key: value}

    @property
    def cidrs(self) -> Cidrs:
        return self._cidrs

    def owned(self) -> list[Owned]:
        """The maps that nothing else writes, with what they should hold."""
        return [
            Owned(self._devices, lambda: list(self._entries.items())),
            Owned(self._crc, lambda: [(_FIRST, zeros_tables())]),
            self._cidrs.owned(),
            self._xdp.owned(),
        ]

    def drifted(self) -> dict[int, list[Drifted]]:
        """Devices by index that have lost a program since it was attached. Any thread may ask."""
        found = self._attacher.drifted()
        for index, drifts in self._xdp.drifted().items():
            found.setdefault(index, []).extend(drifts)
        return found

    def forget(self, ifindexes: Iterable[int]) -> None:
        """See :meth:`DeviceAttacher.forget`: XDP's part looks each time."""
        self._attacher.forget(ifindexes)

    def attach(self, programs: Path) -> tuple[list[str], list[str]]:
        """See :meth:`DeviceAttacher.attach`."""
        return self._attacher.attach(self._targets, programs)

    def attach_xdp(self, programs: Path) -> list[str]:
        """See :meth:`XdpAttacher.attach`. A packet that XDP leaves alone needs the programs at tc."""
        return self._xdp.attach(self._xdp_devices, programs)

    @property
    def xdp_states(self) -> dict[int, str]:
        """By ifindex: the mode of the XDP program, or why there is none."""
        return self._xdp.states


def begin_nothing(maps: MapSet) -> None:
    """Makes packet programs create no flow any more, only forward those that they know, as no agent runs.

    When this returns, no program is still creating one.
    """
    table, key = maps["devices"], U32.pack(_ANY_DEVICE)
    if (node := table.lookup(key)) is not None:
        table.update(key, with_device_flags(node, DeviceFlags.HANDOVER_MODE | DeviceFlags.NO_NEW_FLOWS))
    grace = Grace()
    grace.wait()
    grace.close()
