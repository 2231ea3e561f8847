"""The packet programs on devices: tcx links where the kernel has them (Linux 6.6), else clsact filters.

A link is pinned as ``links/tc-<ifindex>-ingress``; it ends with its device, and is replaced in one step. A
filter has a priority of its own, lets the filters after it have their turn (TC_ACT_UNSPEC), and is replaced
in one step as well. Whatever others have attached stays.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from ebpfproxy.datapath.abi.hooks import LOOPBACK as LOOPBACK_PROGRAMS
from ebpfproxy.datapath.abi.hooks import PACKETS, RAW_PACKETS, TCX_INGRESS, Hook
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs.attach import LINKS, pin_over

#: Our filters have this priority. Low numbers run first; CNIs use 1 and 49152.
FILTER_PRIORITY = 3
#: The program's id follows it: pyroute2 does not decode the kernel's own attribute for that.
_FILTER_NAME = "ebpfproxy:"
_ETH_P_ALL = 3
_CLSACT = 0xFFFF0000
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
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
            except (bpf.BpfError, NetlinkError) as error:
                code = error.errno if isinstance(error, bpf.BpfError) else error.code
                if code != errno.ENODEV:
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
        usual = RAW_PACKETS if target.raw else PACKETS
        module = LOOPBACK_PROGRAMS if target == LOOPBACK else usual
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
    with IPRoute() as netlink:
        known = _our_filter(netlink, target.ifindex, direction)
        if known == bpf.prog_info(program).id:
            return ""
        try:
            netlink.tc("add", "clsact", target.ifindex)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
        netlink.tc(
            "replace-filter",
            "bpf",
            target.ifindex,
            handle=1,
            parent=_PARENTS[direction],
            protocol=_ETH_P_ALL,
            prio=FILTER_PRIORITY,
            fd=program,
            name=f"{_FILTER_NAME}{bpf.prog_info(program).id}",
            classid=1,
            direct_action=True,
        )
    return "attached" if known is None else "replaced"


def _filters(netlink: Any, index: int, direction: str) -> list[Any]:
    try:
        return list(netlink.get_filters(index, parent=_PARENTS[direction]))
    except NetlinkError as error:
        # No clsact there, or no device any more.
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
            return []
        raise


def _our_filter(netlink: Any, index: int, direction: str) -> int | None:
    """The program's id, None without a filter of ours."""
    for each in _filters(netlink, index, direction):
        if each["info"] >> 16 != FILTER_PRIORITY or each.get_attr("TCA_KIND") != "bpf":
            continue
        options = each.get_attr("TCA_OPTIONS")
        name = (options.get_attr("TCA_BPF_NAME") if options is not None else None) or ""
        if name.startswith(_FILTER_NAME):
            return int(name.removeprefix(_FILTER_NAME))
    return None


def _indexes(netlink: Any) -> list[int]:
    return [link["index"] for link in netlink.get_links()]


def remove_filters(keep: Iterable[int] = ()) -> list[str]:
    """Removes our filters from all devices but these, and a clsact that is then empty."""
    kept = set(keep)
    gone = []
    with IPRoute() as netlink:
        for index in _indexes(netlink):
            if index in kept:
                continue
            ours = [d for d in _DIRECTIONS if _our_filter(netlink, index, d) is not None]
            for direction in ours:
                netlink.tc(
                    "del-filter",
                    "bpf",
                    index,
                    handle=1,
                    parent=_PARENTS[direction],
                    protocol=_ETH_P_ALL,
                    prio=FILTER_PRIORITY,
                )
                gone.append(f"device {index} {direction} detached")
            if ours and not any(_filters(netlink, index, d) for d in _DIRECTIONS):
                netlink.tc("del", "clsact", index, handle=_CLSACT)
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
    with IPRoute() as netlink:
        for index in _indexes(netlink):
            for direction in _DIRECTIONS:
                program = _our_filter(netlink, index, direction)
                if program is not None:
                    found.append(DeviceAttachment(index, direction, program))
    return found
