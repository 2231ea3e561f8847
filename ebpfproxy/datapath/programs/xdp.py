"""The XDP program on devices: a pinned link each, in the driver (native) or behind it (generic).

A link is pinned as ``links/xdp-<ifindex>-<mode>``; it ends with its device, and is replaced in one step. A
device has one XDP program: where somebody else's is attached, ours is not, and tc does all the work. Only in
the dispatcher of libxdp (:mod:`ebpfproxy.datapath.programs.xdp_chain`) ours becomes one of several; then the
program is pinned, as ``links/xdp-<ifindex>-<mode>-chained``. The ``xdp_devices`` map tells programs between
which devices frames can go: a driver drops what it cannot take without telling anybody.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.abi.hooks import FORWARDING
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import XdpFlags, pack_xdp_device
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.bpf_map import Map
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.datapath.kernel.pins import pin_over
from ebpfproxy.datapath.programs import xdp_chain
from ebpfproxy.datapath.programs.attach import LINKS, Drifted, drift, program_id
from ebpfproxy.datapath.programs.devices import exists
from ebpfproxy.datapath.programs.xdp_places import (
    Dispatcher,
    Place,
    XdpAttachment,
    XdpMode,
    detach,
    dispatcher_of,
)
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.xdp_state import XdpFeatures, XdpState, xdp_program, xdp_refusal

(_HOOK,) = FORWARDING.hooks
#: Errors of a device that has a program of somebody else, in this mode or in the other.
_TAKEN = (errno.EBUSY, errno.EEXIST)
#: Longer than FLOW_HOP_NS in bpf/lib/hop_cache.h, by the steps of the programs' clock.
_HOP_SECONDS = 0.12
_FOREIGN = "another XDP program is attached"


class XdpDevice(NamedTuple):
    """A device that leads outside. ``obstacle`` says why it cannot have a program, empty where it can."""

    ifindex: int
    name: str
    link_address: bytes
    is_veth: bool
    mtu: int
    obstacle: str


class XdpAttacher:
    """Attaches the program to uplinks, and is the only writer of ``xdp_devices``. One thread uses it."""

    def __init__(self, pins: Path, table: Map, modes: tuple[XdpMode, ...]) -> None:
        """``modes``: those to be tried, in this order; none for no XDP."""
        self._links = pins / LINKS
        self._table = table
        self._modes = modes
        #: Devices whose driver has refused the program, as they were then, and the reasons, by ifindex.
        self._refused: dict[int, tuple[XdpDevice, XdpFeatures | None, str]] = {}
        #: The driver's words of the last attempt that failed, by ifindex.
        self._words: dict[int, tuple[tuple[XdpDevice, XdpMode, int | None], str]] = {}
        #: The MTUs of devices when they got the program, by ifindex.
        self._mtus: dict[int, int] = {}
        #: The mode of each device, or the reason why it has no program, by ifindex.
        self.states: dict[int, str] = {}
        self._entries = dict(table.items())
        #: Where programs are pinned, and the devices that have one, with its place.
        self._attached: tuple[Path, dict[Place, XdpDevice]] = Path(), {}

    def attach(self, devices: Iterable[XdpDevice], programs: Path) -> list[str]:
        """Attaches to exactly these devices, as far as they can have the program; returns what changed.

        Call it again once in a while: foreign programs and what drivers can do come and go.
        """
        before, self.states = self.states, {}
        wanted: dict[bytes, bytes] = {}
        kept: dict[Place, XdpDevice] = {}
        self._attached = programs, kept
        if not self._modes:
            self._bring(wanted)
            return self._detach_all_but(kept)
        self._links.mkdir(parents=True, exist_ok=True)
        with XdpState() as kernel, bpf.opened(programs / _HOOK.name) as program:
            for device in devices:
                try:
                    place, state = self._attach(device, kernel.features(device.ifindex), program)
                    # Some drivers take frames as soon as they have a program.
                    features = kernel.features(device.ifindex)
                except OSError as error:
                    # The device is gone: there will be another state of the node.
                    place, state = None, str(error)
                    features = None
                flags = XdpFlags(0)
                if place is not None:
                    kept[place] = device
                    flags |= XdpFlags.FORWARDS
                    # What a veth sends back is lost unless the other end has an XDP program, too. What is
                    # redirected to it arrives.
                    if place.mode is XdpMode.GENERIC or not device.is_veth:
                        flags |= XdpFlags.SENDS_BACK
                self.states[device.ifindex] = state
                if features is not None and XdpFeatures.NDO_XMIT in features:
                    flags |= XdpFlags.TAKES
                if flags:
                    wanted[U32.pack(device.ifindex)] = pack_xdp_device(device.link_address, flags)
        # A frame that finds no entry is left to tc.
        self._bring(wanted)
        changed = [f"{device}: {what}" for device, what in self.states.items() if before.get(device) != what]
        return changed + self._detach_all_but(kept)

    def _bring(self, wanted: dict[bytes, bytes]) -> None:
        former = self._entries
        refused = self._table.bring(wanted)
        self._entries = {key: value for key, value in wanted.items() if key not in refused}
        if former.items() - self._entries.items():
            # Programs keep for a moment where they send a flow's frames, and these are lost in a device that
            # has no program any more.
            time.sleep(_HOP_SECONDS)

    def owned(self) -> Owned:
        return Owned(self._table, lambda: list(self._entries.items()))

    def drifted(self) -> dict[int, list[Drifted]]:
        """Devices by index that have lost the program since it was attached. Any thread may ask."""
        programs, attached = self._attached
        found = {}
        for place, device in list(attached.items()):
            wanted = program_id(programs / (xdp_chain.NAME if place.is_chained else _HOOK.name))
            drifts = [*drift(f"{device.name} xdp", self._program_at(place, wanted), wanted)]
            if drifts and exists(device.ifindex):
                found[device.ifindex] = drifts
        return found

    def _program_at(self, place: Place, wanted: int | None) -> int | None:
        """The program that is there now, None without one."""
        if place.is_chained:
            with suppress(OSError):
                return wanted if wanted in (dispatcher_of(place.ifindex).members or ()) else None
            return None
        with bpf.pinned(self._links / place.pin) as link:
            info = bpf.xdp_link_info(link) if link is not None else None
        return int(info.prog_id) if info is not None and info.ifindex == place.ifindex else None

    def _attach(
        self, device: XdpDevice, features: XdpFeatures | None, program: int
    ) -> tuple[Place | None, str]:
        """Where the program is, and its state; None and the reason where it is not."""
        if device.obstacle:
            return None, device.obstacle
        found = dispatcher_of(device.ifindex)
        if found.members is not None:
            return self._chain(device, features, found)
        reason = ""
        for mode in self._modes:
            if mode is XdpMode.NATIVE:
                reason = _native_obstacle(device, features) or self._native(device, features, program)
            else:
                reason = self._link(device, mode, program)
            if not reason:
                return Place(device.ifindex, mode), str(mode)
        return None, reason

    def _chain(
        self, device: XdpDevice, features: XdpFeatures | None, found: Dispatcher
    ) -> tuple[Place | None, str]:
        """The same where the device has a dispatcher of libxdp, whose mode is that of all programs in it."""
        reason = ""
        if found.mode not in self._modes:
            reason = f"it is {found.mode}"
        elif found.mode is XdpMode.NATIVE:
            reason = _native_obstacle(device, features)
        place = Place(device.ifindex, found.mode, is_chained=True)
        if not reason:
            try:
                return place, self._join(place, found)
            except xdp_chain.ChainError as error:
                reason = str(error)
        return None, f"{_FOREIGN} (id {found.program.number}), by libxdp: {reason}"

    def _join(self, place: Place, found: Dispatcher) -> str:
        """Makes our program one of those in the dispatcher, instead of an earlier agent's. Raises ChainError.

        Returns the state.
        """
        programs, _ = self._attached
        members, is_native = found.members or [], place.mode is XdpMode.NATIVE
        with bpf.pinned(programs / xdp_chain.NAME) as extension:
            if extension is None:
                raise xdp_chain.ChainError(xdp_chain.obstacle() or "this kernel has no BPF_PROG_TYPE_EXT")
            number = int(bpf.prog_info(extension).id)
            if number not in members:
                xdp_chain.join(place.ifindex, extension, is_native=is_native)
            for other in members:
                if other != number and bpf.prog_name(other) == xdp_chain.NAME:
                    xdp_chain.leave(place.ifindex, other, is_native=is_native)
            if program_id(self._links / place.pin) != number:
                pin_over(extension, self._links / place.pin)
        there = dispatcher_of(place.ifindex).members or []
        return XdpAttachment(place, number, tuple(there)).state

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
        path = self._links / Place(device.ifindex, mode).pin
        has_grown = device.mtu > self._mtus.setdefault(device.ifindex, device.mtu)
        with bpf.pinned(path) as link:
            if link is not None and bpf.xdp_link_info(link).ifindex == device.ifindex and not has_grown:
                if bpf.xdp_link_info(link).prog_id != bpf.prog_info(program).id:
                    bpf.link_update(link, program)
                return ""
        # One device has one program, whatever its mode. A killed agent may have left one under another name.
        # And virtio-net looks at the MTU only now: what is too large for a program later is lost.
        for other in self._links.glob(f"xdp-{device.ifindex}-*"):
            detach(other)
        try:
            fresh = bpf.link_create(program, device.ifindex, _HOOK.attach_type, mode.flag)
        except BpfError as error:
            if error.errno in _TAKEN:
                with Rtnetlink() as netlink:
                    return f"{_FOREIGN} (id {xdp_program(netlink, device.ifindex).number})"
            return f"no {mode} XDP: {self._words_of(device, mode, program, error)}"
        self._mtus[device.ifindex] = device.mtu
        try:
            pin_over(fresh, path)
        finally:
            os.close(fresh)
        return ""

    def _words_of(self, device: XdpDevice, mode: XdpMode, program: int, error: BpfError) -> str:
        """Why the driver refuses the program, for which it is asked once as long as nothing changes."""
        attempt = device, mode, error.errno
        known, words = self._words.get(device.ifindex, (None, ""))
        if known != attempt:
            words = xdp_refusal(device.ifindex, program, mode.flag) or os.strerror(error.errno or 0)
            self._words[device.ifindex] = attempt, words
        return words

    def _detach_all_but(self, kept: Iterable[Place]) -> list[str]:
        others = set(self._links.glob("xdp-*")) - {self._links / place.pin for place in kept}
        return sorted(detach(path) for path in others)


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
