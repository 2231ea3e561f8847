"""The packet programs on devices: tcx links where the kernel has them (Linux 6.6), else clsact filters.

A link is pinned as ``links/tc-<ifindex>-ingress``; it ends with its device, and is replaced in one step. A
filter is replaced in one step as well. Whatever others have attached stays, and has its turn after ours
(TC_ACT_UNSPEC). Ours come first: most programs end with TC_ACT_OK, as Cilium's do, so that none has a turn
after them. Where others have put theirs before ours, ours are moved once; a program that comes before them
again stays there.
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

from ebpfproxy.datapath.abi import uapi
from ebpfproxy.datapath.abi.hooks import LOOPBACK as LOOPBACK_PROGRAMS
from ebpfproxy.datapath.abi.hooks import PACKETS, RAW_PACKETS, TCX_INGRESS, Hook, Module
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.pins import NEW_SUFFIX, pin_over
from ebpfproxy.datapath.programs.attach import LINKS, OVERTAKEN, Drifted, drift, program_id
from ebpfproxy.netlink.rtnetlink import Rtnetlink, device_indexes
from ebpfproxy.netlink.traffic_control import (
    EGRESS,
    INGRESS,
    Filter,
    Place,
    delete_clsact,
    delete_filter,
    filters,
    put_filter,
)

#: Our filters have this priority unless others have a lower number, which runs first; CNIs use 1 and 49152.
_FILTER_PRIORITY = 3
#: Theirs in the priority of another's filter, whose own is mostly 1.
_FILTER_HANDLE = 0xEBF
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
        #: What ours have been moved before, ids of programs or filters, is kept by device and direction.
        self._overtakers: dict[tuple[int, str], frozenset[int | Filter]] = {}

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
        if first and self._tcx:
            _finish_pins(self._links)
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
        self._remove_other_kind(target)
        # Replies are translated before the first connection is.
        for hook in reversed(module.hooks):
            direction = _direction(hook)
            with bpf.opened(programs / f"{hook.name}{module.suffix}") as program:
                if self._tcx:
                    did.append(self._link(target, hook.attach_type, direction, program))
                else:
                    did.append(self._filter(target, direction, program))
        return "" if not any(did) else next(filter(None, did))

    def _remove_other_kind(self, target: Target) -> None:
        """What an agent has attached that did with tcx, or without: both at once would translate twice."""
        links = [self._links / f"tc-{target.ifindex}-{direction}" for direction in _DIRECTIONS]
        if self._tcx:
            if not any(path.exists() for path in links):
                with Rtnetlink() as netlink:
                    _remove_filters_of(netlink, target.ifindex)
            return
        for path in links:
            with bpf.pinned(path) as link:
                if link is not None:
                    if bpf.tcx_link_info(link).ifindex == target.ifindex:
                        # Without its pin it would end only some time later.
                        bpf.link_detach(link)
                    path.unlink(missing_ok=True)

    # -- what others have done

    def drifted(self) -> dict[int, list[Drifted]]:
        """Devices by index that have lost a program or its place since they were attached to.

        Any thread may ask.
        """
        attached = list(self._attached.values())
        found: dict[int, list[Drifted]] = {}
        ids: dict[Path, int | None] = {}
        with Rtnetlink() as netlink:
            for target, programs in attached:
                for hook in _module(target).hooks:
                    path = programs / f"{hook.name}{_module(target).suffix}"
                    if path not in ids:
                        ids[path] = program_id(path)
                    drifts = self._drift(netlink, target, hook, ids[path])
                    if drifts and exists(target.ifindex):
                        found.setdefault(target.ifindex, []).extend(drifts)
        return found

    def _drift(self, netlink: Rtnetlink, target: Target, hook: Hook, wanted: int | None) -> list[Drifted]:
        direction = _direction(hook)
        at = f"{target.name} {direction}"
        there = self._program(netlink, target, direction)
        if drifts := [*drift(at, there, wanted)]:
            return drifts
        with suppress(OSError):
            first = self._first(netlink, target, hook, there)
            if first - self._overtakers.get((target.ifindex, direction), frozenset()):
                return [Drifted(at, OVERTAKEN)]
        return []

    def _first(
        self, netlink: Rtnetlink, target: Target, hook: Hook, own: int | None
    ) -> frozenset[int | Filter]:
        """What runs before our program: ids of programs, or filters. Raises OSError."""
        if self._tcx:
            ids = bpf.attached_programs(target.ifindex, hook.attach_type)
            return frozenset(ids[: ids.index(own)] if own in ids else ())
        there = filters(netlink, target.ifindex, _PARENTS[_direction(hook)])
        ours = our_filter(there)
        return frozenset(there[: there.index(ours)] if ours is not None else ())

    def forget(self, ifindexes: Iterable[int]) -> None:
        """Makes the next :meth:`attach` look what these devices have."""
        for index in ifindexes:
            self._attached.pop(index, None)

    def _program(self, netlink: Rtnetlink, target: Target, direction: str) -> int | None:
        """The id of our program at a device, None if there is none."""
        if not self._tcx:
            with suppress(OSError):
                return _program_of(our_filter(filters(netlink, target.ifindex, _PARENTS[direction])))
            return None
        with bpf.pinned(self._links / f"tc-{target.ifindex}-{direction}") as link:
            if link is not None and (info := bpf.tcx_link_info(link)).ifindex == target.ifindex:
                return int(info.prog_id)
        return None

    def _link(self, target: Target, attach_type: int, direction: str, program: int) -> str:
        path = self._links / f"tc-{target.ifindex}-{direction}"
        with bpf.pinned(path) as link:
            if link is not None and (info := bpf.tcx_link_info(link)).ifindex == target.ifindex:
                there = bpf.attached_programs(target.ifindex, attach_type)
                if info.prog_id in there and there[0] != info.prog_id:
                    first = there[: there.index(info.prog_id)]
                    self._overtakers[target.ifindex, direction] = frozenset(first)
                    # The kernel moves no link. Both at once would translate twice.
                    bpf.link_detach(link)
                elif info.prog_id == bpf.prog_info(program).id:
                    return ""
                else:
                    bpf.link_update(link, program)
                    return "replaced"
        fresh = bpf.link_create(program, target.ifindex, attach_type, uapi.F_BEFORE)
        try:
            pin_over(fresh, path)
        finally:
            os.close(fresh)
        return "attached"

    def _filter(self, target: Target, direction: str, program: int) -> str:
        """Adds our filter before all others, replaces it, or moves it there."""
        wanted = bpf.prog_info(program).id
        name = f"{_FILTER_NAME}{wanted}"
        with Rtnetlink() as netlink:
            there = filters(netlink, target.ifindex, _PARENTS[direction])
            known = our_filter(there)
            if known is not None and known == there[0]:
                if _program_of(known) == wanted:
                    return ""
                put_filter(netlink, _place(target.ifindex, direction, known), program, name)
                return "replaced"
            if known is not None:
                self._overtakers[target.ifindex, direction] = frozenset(there[: there.index(known)])
            first = _first_place(target.ifindex, direction, there)
            if known is not None and known.priority == first.priority:
                # One that is added comes before the others of its priority, and one that is replaced stays.
                delete_filter(netlink, _place(target.ifindex, direction, known))
                known = None
            try:
                put_filter(netlink, first, program, name)
            except OSError as error:
                # The priority is that of a filter of another kind, or for other packets.
                if error.errno != errno.EINVAL:
                    raise
                put_filter(netlink, _place(target.ifindex, direction, known), program, name)
                return "attached" if known is None else "replaced"
            if known is not None:
                delete_filter(netlink, _place(target.ifindex, direction, known))
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


def _finish_pins(links: Path) -> None:
    """Brings to its place what a killed agent has pinned beside it: a device takes no program twice."""
    for path in links.glob(f"tc-*{NEW_SUFFIX}"):
        path.replace(path.with_name(path.name.removesuffix(NEW_SUFFIX)))


def _remove_links(links: Path, wanted: dict[int, Target]) -> list[str]:
    gone = []
    for path in sorted(links.glob("tc-*")):
        found = _PIN.fullmatch(path.name)
        if found and (int(found[1]) not in wanted or found[3]):
            path.unlink()
            gone.append(f"device {found[1]} {found[2]} detached")
    return gone


# -- filters


def _place(ifindex: int, direction: str, ours: Filter | None = None) -> Place:
    """The place of a filter of ours, by default that of one which has a priority to itself."""
    ours = ours or Filter(_FILTER_PRIORITY, "")
    return Place(ifindex, _PARENTS[direction], ours.priority, ours.handle)


def _first_place(ifindex: int, direction: str, there: Iterable[Filter]) -> Place:
    """The place before all that are there, if they are BPF's: that of the first, beside which it is put."""
    others = [each.priority for each in there if not each.name.startswith(_FILTER_NAME)]
    if min(others, default=_FILTER_PRIORITY) >= _FILTER_PRIORITY:
        return _place(ifindex, direction)
    return Place(ifindex, _PARENTS[direction], min(others), _FILTER_HANDLE)


def our_filter(there: Iterable[Filter]) -> Filter | None:
    return next((each for each in there if each.name.startswith(_FILTER_NAME)), None)


def _program_of(ours: Filter | None) -> int | None:
    """The program's id, None without a filter of ours."""
    return None if ours is None else int(ours.name.removeprefix(_FILTER_NAME))


def remove_filters(keep: Iterable[int] = ()) -> list[str]:
    """Removes our filters from all devices but these, and a clsact that is then empty."""
    kept = set(keep)
    gone = []
    with Rtnetlink() as netlink:
        for index in device_indexes(netlink):
            if index not in kept:
                gone += _remove_filters_of(netlink, index)
    return gone


def _remove_filters_of(netlink: Rtnetlink, index: int) -> list[str]:
    ours = {d: our_filter(filters(netlink, index, _PARENTS[d])) for d in _DIRECTIONS}
    found = {direction: each for direction, each in ours.items() if each is not None}
    for direction, each in found.items():
        delete_filter(netlink, _place(index, direction, each))
    if found and not any(filters(netlink, index, parent) for parent in _PARENTS.values()):
        delete_clsact(netlink, index)
    return [f"device {index} {direction} detached" for direction in found]


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
                program = _program_of(our_filter(filters(netlink, index, _PARENTS[direction])))
                if program is not None:
                    found.append(DeviceAttachment(index, direction, program))
    return found
