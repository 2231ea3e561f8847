"""The XDP program on devices: a pinned link each, in the driver (native) or behind it (generic).

A link is pinned as ``links/xdp-<ifindex>-<mode>``; it ends with its device, and is replaced in one step. A
device has one XDP program: where somebody else's is attached, ours is not, and tc does all the work. The
``xdp_devices`` map tells programs between which devices frames can go: a driver drops what it cannot take
without telling anybody.
"""

from __future__ import annotations

import enum
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.hooks import FORWARDING
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import XdpFlags, pack_xdp_device
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.programs.attach import LINKS, Drifted, drift, pin_over, program_id
from ebpfproxy.datapath.programs.devices import exists
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.xdp_state import XdpFeatures, XdpState, xdp_program

_PIN = re.compile(r"xdp-(\d+)-(native|generic)(-new)?")
(_HOOK,) = FORWARDING.hooks
#: Errors of a device that has a program of somebody else, in this mode or in the other.
_TAKEN = (errno.EBUSY, errno.EEXIST)
_FOREIGN = "another XDP program is attached"


class XdpMode(enum.StrEnum):
    """The value is in names of pins; ``flag`` is the kernel's (XDP_FLAGS_DRV_MODE, _SKB_MODE)."""

    NATIVE = "native"
    GENERIC = "generic"

    @property
    def flag(self) -> int:
        return 1 << 2 if self is XdpMode.NATIVE else 1 << 1


class XdpDevice(NamedTuple):
    """A device that leads outside. ``obstacle`` says why it cannot have a program, empty where it can."""

    ifindex: int
    name: str
    link_address: bytes
    is_veth: bool
    mtu: int
    obstacle: str


class XdpAttachment(NamedTuple):
    """A device with our program, as the kernel says."""

    ifindex: int
    mode: XdpMode
    program_id: int


class XdpAttacher:
    """Attaches the program to uplinks, and is the only writer of ``xdp_devices``. One thread uses it."""

    def __init__(self, pins: Path, table: Map, modes: tuple[XdpMode, ...]) -> None:
        """``modes``: those to be tried, in this order; none for no XDP."""
        self._links = pins / LINKS
        self._table = table
        self._modes = modes
        #: Devices whose driver has refused the program, as they were then, and the reasons, by ifindex.
        self._refused: dict[int, tuple[XdpDevice, XdpFeatures | None, str]] = {}
        #: The mode of each device, or the reason why it has no program, by ifindex.
        self.states: dict[int, str] = {}
        self._entries = dict(table.items())
        #: The program's pin, and the names of the devices that have it, by their links.
        self._attached: tuple[Path, dict[Path, XdpDevice]] = Path(), {}

    def attach(self, devices: Iterable[XdpDevice], programs: Path) -> list[str]:
        """Attaches to exactly these devices, as far as they can have the program; returns what changed.

        Call it again once in a while: foreign programs and what drivers can do come and go.
        """
        before, self.states = self.states, {}
        wanted: dict[bytes, bytes] = {}
        kept: dict[Path, XdpDevice] = {}
        self._attached = programs / _HOOK.name, kept
        if not self._modes:
            self._bring(wanted)
            return self._detach_all_but(kept)
        self._links.mkdir(parents=True, exist_ok=True)
        with XdpState() as state, bpf.opened(programs / _HOOK.name) as program:
            for device in devices:
                try:
                    features = state.features(device.ifindex)
                    mode, reason = self._attach(device, features, program)
                except OSError as error:
                    # The device is gone: there will be another state of the node.
                    mode, reason = None, str(error)
                    features = None
                self.states[device.ifindex] = str(mode or reason)
                flags = XdpFlags(0)
                if mode is not None:
                    kept[self._pin(device.ifindex, mode)] = device
                    flags |= XdpFlags.FORWARDS
                    # What a veth sends back is lost unless the other end has an XDP program, too. What is
                    # redirected to it arrives.
                    if mode is XdpMode.GENERIC or not device.is_veth:
                        flags |= XdpFlags.SENDS_BACK
                if features is not None and XdpFeatures.NDO_XMIT in features:
                    flags |= XdpFlags.TAKES
                if flags:
                    wanted[U32.pack(device.ifindex)] = pack_xdp_device(device.link_address, flags)
        # A frame that finds no entry is left to tc.
        self._bring(wanted)
        changed = [f"{device}: {what}" for device, what in self.states.items() if before.get(device) != what]
        return changed + self._detach_all_but(kept)

    def _bring(self, wanted: dict[bytes, bytes]) -> None:
        refused = self._table.bring(wanted)
        self._entries = {key: value for key, value in wanted.items() if key not in refused}

    def owned(self) -> Owned:
        return Owned(self._table, lambda: list(self._entries.items()))

    def drifted(self) -> dict[int, list[Drifted]]:
        """Devices by index that have lost the program since it was attached. Any thread may ask."""
        program, attached = self._attached
        found = {}
        for path, device in list(attached.items()):
            with bpf.pinned(path) as link:
                info = bpf.xdp_link_info(link) if link is not None else None
            there = int(info.prog_id) if info is not None and info.ifindex == device.ifindex else None
            drifts = [*drift(f"{device.name} xdp", there, program_id(program))]
            if drifts and exists(device.ifindex):
                found[device.ifindex] = drifts
        return found

    def _pin(self, ifindex: int, mode: XdpMode) -> Path:
        return self._links / f"xdp-{ifindex}-{mode}"

    def _attach(
        self, device: XdpDevice, features: XdpFeatures | None, program: int
    ) -> tuple[XdpMode | None, str]:
        """The mode, or None and the reason."""
        reason = device.obstacle
        if reason:
            return None, reason
        for mode in self._modes:
            if mode is XdpMode.NATIVE:
                reason = _native_obstacle(device, features) or self._native(device, features, program)
            else:
                reason = self._link(device, mode, program)
            if not reason:
                return mode, ""
        return None, reason

    def _native(self, device: XdpDevice, features: XdpFeatures | None, program: int) -> str:
        """A driver that has refused is not asked again: the generic program would be detached for that."""
        if XdpMode.GENERIC not in self._modes:
            return self._link(device, XdpMode.NATIVE, program)
        known = self._refused.get(device.ifindex)
        if known is not None and known[:2] == (device, features):
            return known[2]
        reason = self._link(device, XdpMode.NATIVE, program)
        if reason and not reason.startswith(_FOREIGN):
            self._refused[device.ifindex] = device, features, reason
        return reason

    def _link(self, device: XdpDevice, mode: XdpMode, program: int) -> str:
        """Brings the device's link to the program; returns why that is not possible, empty if it is."""
        path = self._pin(device.ifindex, mode)
        with bpf.pinned(path) as link:
            if link is not None and bpf.xdp_link_info(link).ifindex == device.ifindex:
                if bpf.xdp_link_info(link).prog_id != bpf.prog_info(program).id:
                    bpf.link_update(link, program)
                return ""
        # One device has one program, whatever its mode. A killed agent may have left one under another name.
        for other in self._links.glob(f"xdp-{device.ifindex}-*"):
            self.detach(other)
        try:
            fresh = bpf.link_create(program, device.ifindex, _HOOK.attach_type, mode.flag)
        except BpfError as error:
            if error.errno in _TAKEN:
                with Rtnetlink() as netlink:
                    return f"{_FOREIGN} (id {xdp_program(netlink, device.ifindex)})"
            return f"no {mode} XDP: {os.strerror(error.errno or 0)}"
        try:
            pin_over(fresh, path)
        finally:
            os.close(fresh)
        return ""

    @staticmethod
    def detach(path: Path) -> None:
        """Detaches the link that is pinned there, if any: its device has no program when this returns."""
        with bpf.pinned(path) as link:
            if link is not None:
                bpf.link_detach(link)
        path.unlink(missing_ok=True)

    def _detach_all_but(self, kept: Iterable[Path]) -> list[str]:
        changed = []
        for path in set(self._links.glob("xdp-*")) - set(kept):
            self.detach(path)
            changed.append(f"{path.name} detached")
        return sorted(changed)


def _native_obstacle(device: XdpDevice, features: XdpFeatures | None) -> str:
    """A driver with XDP can send frames back, but for that of a veth."""
    if features is not None and XdpFeatures.BASIC not in features:
        return "its driver has no native XDP"
    if not device.is_veth:
        return ""
    if features is None:
        return "this kernel does not say if its peer takes frames of XDP programs: Linux 6.3 does"
    if XdpFeatures.NDO_XMIT not in features:
        return "its peer takes no frames of XDP programs: it has neither such a program nor GRO"
    return ""


def xdp_attachments(pins: Path) -> list[XdpAttachment]:
    """Reads pinned links, in any network namespace: the indexes are those of the agent's."""
    found = []
    for path in sorted((pins / LINKS).glob("xdp-*")):
        name = _PIN.fullmatch(path.name)
        with bpf.pinned(path) as link:
            if name and link is not None and (info := bpf.xdp_link_info(link)).ifindex:
                found.append(XdpAttachment(int(info.ifindex), XdpMode(name[2]), int(info.prog_id)))
    return found
