"""The packet programs on devices: tcx links where the kernel has them (Linux 6.6), else clsact filters.

A link is pinned as ``links/tc-<ifindex>-ingress``; it ends with its device, and is replaced in one step. A
filter has a priority of its own, lets the filters after it have their turn (TC_ACT_UNSPEC), and is replaced
in one step as well. Whatever others have attached stays.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from ebpfproxy.datapath.abi.hooks import LOOPBACK as LOOPBACK_PROGRAMS
from ebpfproxy.datapath.abi.hooks import PACKETS, RAW_PACKETS, TCX_INGRESS, Hook, Module
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs.attach import LINKS, Drifted, drift, pin_over, program_id
from ebpfproxy.netlink.rtnetlink import Rtnetlink, device_indexes
from ebpfproxy.netlink.traffic_control import (
    EGRESS,
    INGRESS,
    Place,
    delete_clsact,
    delete_filter,
    filters,
    put_filter,
)

#: Our filters have this priority. Low numbers run first; CNIs use 1 and 49152.
FILTER_PRIORITY = 3
#: The program's id follows it.
_FILTER_NAME = "ebpfproxy:"
_PARENTS = {"ingress": INGRESS, "egress": EGRESS}
_DIRECTIONS = ("ingress", "egress")
_PIN = re.compile(r"tc-(\d+)-(ingress|egress)(-new)?")


class Target(NamedTuple):
    """A device to attach to. ``raw``: its packets begin with the IP header."""

    ifindex: int
    name: str
    raw: bool


#: It has this index in every network namespace, and a program of its own, at egress only.
LOOPBACK = Target(1, "lo", raw=False)


def directions_of(ifindex: int) -> tuple[str, ...]:
    """At which a device has a program where it is attached."""
    return ("egress",) if ifindex == LOOPBACK.ifindex else _DIRECTIONS


class DeviceAttachment(msgspec.Struct, frozen=True):
    """One direction of one device, as the kernel says."""

    ifindex: int
    direction: str
    program_id: int


class DeviceAttacher:
    """Attaches programs to devices, and remembers where: there are many pods. One thread uses it."""

    def __init__(self, pins: Path, *, tcx: bool) -> None:
        self._links = pins / LINKS
        self._tcx = tcx
        self._attached: dict[int, tuple[Target, Path]] = {}

    @property
    def attached(self) -> frozenset[int]:
        """Indexes of the devices that have both programs, as far as this knows."""
        return frozenset(self._attached)

    def attach(self, targets: Iterable[Target], programs: Path) -> tuple[list[str], list[str]]:
        """Attaches ``programs`` to exactly these devices.

        Returns what changed and what failed, a phrase for each; what failed is tried again at the next
        call. A device that is gone by now is no failure.
        """
        changed: list[str] = []
        failed: list[str] = []
        wanted = {target.ifindex: target for target in targets}
        first = not self._attached
        self._links.mkdir(parents=True, exist_ok=True)
        for target in wanted.values():
            if self._attached.get(target.ifindex) == (target, programs):
                continue
            try:
                what = self._attach(target, programs)
            except OSError as error:
                if error.errno != errno.ENODEV:
                    failed.append(f"{target.name}: {error}")
                self._attached.pop(target.ifindex, None)
                continue
            self._attached[target.ifindex] = target, programs
            if what:
                changed.append(f"{target.name} {what}")
        gone = set(self._attached) - set(wanted)
        for index in gone:
            del self._attached[index]
        if gone or first:
            changed += self._detach_others(wanted)
        return changed, failed

    def _attach(self, target: Target, programs: Path) -> str:
        module = _module(target)
        did = []
        # Replies are translated before the first connection is.
        for hook in reversed(module.hooks):
            direction = _direction(hook)
            with bpf.opened(programs / f"{hook.name}{module.suffix}") as program:
                if self._tcx:
                    did.append(self._link(target, hook.attach_type, direction, program))
                else:
                    did.append(_filter(target, direction, program))
        return "" if not any(did) else next(filter(None, did))

    # -- what others have done

    def drifted(self) -> dict[int, list[Drifted]]:
        """Devices by index that have lost a program since they were attached to. Any thread may ask."""
        attached = list(self._attached.values())
        found: dict[int, list[Drifted]] = {}
        ids: dict[Path, int | None] = {}
        with Rtnetlink() as netlink:
            for target, programs in attached:
                for hook in _module(target).hooks:
                    path = programs / f"{hook.name}{_module(target).suffix}"
                    if path not in ids:
                        ids[path] = program_id(path)
                    there = self._program(netlink, target, _direction(hook))
                    drifts = [*drift(f"{target.name} {_direction(hook)}", there, ids[path])]
                    if drifts and exists(target.ifindex):
                        found.setdefault(target.ifindex, []).extend(drifts)
        return found

    def forget(self, ifindexes: Iterable[int]) -> None:
        """Makes the next :meth:`attach` look what these devices have."""
        for index in ifindexes:
            self._attached.pop(index, None)

    def _program(self, netlink: Rtnetlink, target: Target, direction: str) -> int | None:
        """The id of our program at a device, None if there is none."""
        if not self._tcx:
            with suppress(OSError):
                return _our_filter(netlink, target.ifindex, direction)
            return None
        with bpf.pinned(self._links / f"tc-{target.ifindex}-{direction}") as link:
            if link is not None and (info := bpf.tcx_link_info(link)).ifindex == target.ifindex:
                return int(info.prog_id)
        return None

    def _link(self, target: Target, attach_type: int, direction: str, program: int) -> str:
        path = self._links / f"tc-{target.ifindex}-{direction}"
        with bpf.pinned(path) as link:
            if link is not None and bpf.tcx_link_info(link).ifindex == target.ifindex:
                if bpf.tcx_link_info(link).prog_id == bpf.prog_info(program).id:
                    return ""
                bpf.link_update(link, program)
                return "replaced"
        fresh = bpf.link_create(program, target.ifindex, attach_type)
        try:
            pin_over(fresh, path)
        finally:
            os.close(fresh)
        return "attached"

    def _detach_others(self, wanted: dict[int, Target]) -> list[str]:
        if self._tcx:
            return _remove_links(self._links, wanted)
        return remove_filters(wanted)


def exists(ifindex: int) -> bool:
    """True if this network namespace has a device with this index."""
    try:
        socket.if_indextoname(ifindex)
    except OSError:
        return False
    return True


def _module(target: Target) -> Module:
    usual = RAW_PACKETS if target.raw else PACKETS
    return LOOPBACK_PROGRAMS if target == LOOPBACK else usual


def _direction(hook: Hook) -> str:
    return "ingress" if hook.attach_type == TCX_INGRESS else "egress"


def _remove_links(links: Path, wanted: dict[int, Target]) -> list[str]:
    gone = []
    for path in sorted(links.glob("tc-*")):
        found = _PIN.fullmatch(path.name)
        if found and (int(found[1]) not in wanted or found[3]):
            path.unlink()
            gone.append(f"device {found[1]} {found[2]} detached")
    return gone


# -- filters


def _filter(target: Target, direction: str, program: int) -> str:
    """Adds or replaces our filter."""
    wanted = bpf.prog_info(program).id
    with Rtnetlink() as netlink:
        known = _our_filter(netlink, target.ifindex, direction)
        if known == wanted:
            return ""
        put_filter(netlink, _place(target.ifindex, direction), program, f"{_FILTER_NAME}{wanted}")
    return "attached" if known is None else "replaced"


def _place(ifindex: int, direction: str) -> Place:
    return Place(ifindex, _PARENTS[direction], FILTER_PRIORITY)


def _our_filter(netlink: Rtnetlink, index: int, direction: str) -> int | None:
    """The program's id, None without a filter of ours."""
    for each in filters(netlink, index, _PARENTS[direction]):
        if each.priority == FILTER_PRIORITY and each.name.startswith(_FILTER_NAME):
            return int(each.name.removeprefix(_FILTER_NAME))
    return None


def remove_filters(keep: Iterable[int] = ()) -> list[str]:
    """Removes our filters from all devices but these, and a clsact that is then empty."""
    kept = set(keep)
    gone = []
    with Rtnetlink() as netlink:
        for index in device_indexes(netlink):
            if index in kept:
                continue
            ours = [d for d in _DIRECTIONS if _our_filter(netlink, index, d) is not None]
            for direction in ours:
                delete_filter(netlink, _place(index, direction))
                gone.append(f"device {index} {direction} detached")
            if ours and not any(filters(netlink, index, parent) for parent in _PARENTS.values()):
                delete_clsact(netlink, index)
    return gone


# -- what is there


def device_attachments(pins: Path) -> list[DeviceAttachment]:
    """What the kernel has on devices, by links, or by filters in this network namespace."""
    return link_attachments(pins) or filter_attachments()


def link_attachments(pins: Path) -> list[DeviceAttachment]:
    """Reads pinned links, in any network namespace: the indexes are those of the agent's."""
    found = []
    for path in sorted((pins / LINKS).glob("tc-*")):
        name = _PIN.fullmatch(path.name)
        with bpf.pinned(path) as link:
            if name and link is not None and (info := bpf.tcx_link_info(link)).ifindex:
                found.append(DeviceAttachment(int(info.ifindex), name[2], int(info.prog_id)))
    return found


def filter_attachments() -> list[DeviceAttachment]:
    """Reads the filters of every device of this network namespace."""
    found = []
    with Rtnetlink() as netlink:
        for index in device_indexes(netlink):
            for direction in _DIRECTIONS:
                program = _our_filter(netlink, index, direction)
                if program is not None:
                    found.append(DeviceAttachment(index, direction, program))
    return found
