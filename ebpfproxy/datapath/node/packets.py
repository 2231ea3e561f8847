"""The devices and address ranges that packet programs know, and the devices that they are attached to."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import DeviceFlags, pack_device, with_device_flags
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.node.crc32c import zeros_tables
from ebpfproxy.datapath.node.service_cidrs import Cidrs
from ebpfproxy.datapath.programs.devices import LOOPBACK, DeviceAttacher, Target

#: In the ``devices`` map: what masquerading uses where a device is not known.
_ANY_DEVICE = 0


class PacketDevice(NamedTuple):
    """A device to attach to. ``local``: it leads to pods or VMs. ``pods``: what comes from it is a pod's.

    ``ingress_below``: what comes in by it has come in by another of the devices before; ``egress_below``:
    what leaves by it leaves by another one after that. Addresses may be empty; ``mtu`` in bytes.
    """

    target: Target
    address4: bytes
    address6: bytes
    local: bool
    pods: bool
    ingress_below: bool
    egress_below: bool
    mtu: int


class PacketPath:
    """The only writer of ``devices``, ``crc32c`` and, by ``cidrs``, of the CIDRs. One thread uses it.

    ``loopback``: NodePorts answer on the loopback device.
    """

    def __init__(self, maps: MapSet, pins: Path, *, tcx: bool, loopback: bool) -> None:
        self._devices = maps["devices"]
        self._cidrs = Cidrs(maps)
        self._attacher = DeviceAttacher(pins, tcx=tcx)
        self._loopback = (LOOPBACK,) if loopback else ()
        self._targets: tuple[Target, ...] = self._loopback
        self._node = (b"", b"")
        self._mode = DeviceFlags(0)
        if maps["crc32c"].lookup(U32.pack(0)) != (tables := zeros_tables()):
            maps["crc32c"].update(U32.pack(0), tables)

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

    def set_devices(self, devices: Iterable[PacketDevice], address4: bytes, address6: bytes) -> None:
        """Sets all devices, and the node's own addresses, which are for packets by any other device."""
        found = list(devices)
        self._node = address4, address6
        wanted = {U32.pack(_ANY_DEVICE): pack_device(*self._node, self._mode, 0)}
        for each in found:
            flags = DeviceFlags.PODS * each.pods | DeviceFlags.LOCAL * each.local
            flags |= DeviceFlags.INGRESS_BELOW * each.ingress_below
            flags |= DeviceFlags.EGRESS_BELOW * each.egress_below
            wanted[U32.pack(each.target.ifindex)] = pack_device(each.address4, each.address6, flags, each.mtu)
        self._devices.bring(wanted)
        self._targets = (*self._loopback, *(each.target for each in found))

    def set_mode(self, mode: DeviceFlags) -> None:
        """HANDOVER: TCP connections that began elsewhere are netfilter's. WAITS: no flow begins."""
        if mode != self._mode:
            self._mode = mode
            self._devices.update(U32.pack(_ANY_DEVICE), pack_device(*self._node, mode, 0))

    @property
    def cidrs(self) -> Cidrs:
        return self._cidrs

    def attach(self, programs: Path) -> tuple[list[str], list[str]]:
        """See :meth:`DeviceAttacher.attach`."""
        return self._attacher.attach(self._targets, programs)


def begin_nothing(maps: MapSet) -> None:
    """Makes packet programs create no flow any more, only forward those that they know, as no agent runs."""
    table, key = maps["devices"], U32.pack(_ANY_DEVICE)
    if (node := table.lookup(key)) is not None:
        table.update(key, with_device_flags(node, DeviceFlags.HANDOVER | DeviceFlags.WAITS))
