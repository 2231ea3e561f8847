"""Attachments as the kernel has them, and programs of others that run before ours."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ebpfproxy.agent.state import AgentState
from ebpfproxy.datapath.abi.hooks import SOCKET_HOOKS, TCX_EGRESS, TCX_INGRESS
from ebpfproxy.datapath.drift.findings import Finding, consequence_at
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.libbpf import BpfError
from ebpfproxy.datapath.kernel.roots import RootError, find_cgroup_root
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.programs.attach import DETACHED, REPLACED, Attachment, attachments, program_id
from ebpfproxy.datapath.programs.devices import device_attachments, directions_of, our_filter
from ebpfproxy.datapath.programs.xdp_places import is_attached, xdp_attachments
from ebpfproxy.netlink import traffic_control
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.xdp_state import xdp_program

_ATTACH_TYPES = {"ingress": TCX_INGRESS, "egress": TCX_EGRESS}
_PARENTS = {"ingress": traffic_control.INGRESS, "egress": traffic_control.EGRESS}
_XDP = "xdp"
_START = "start the agent, which attaches them again"


def lost(pins: Path, folder: Path, agent: AgentState | None, *, is_here: bool) -> Iterator[Finding]:
    """Programs that are not attached, or not those that are pinned: where no agent looks after them.

    ``folder``: that of the maps. ``is_here``: this is the agent's network namespace.
    """
    pinned = {program_id(path) for path in loader.pinned_programs(folder)}
    for each in attachments(pins):
        number = each.program_id if each.alive else None
        if number not in pinned:
            yield _lost("programs", number, each.hook, "sockets of this node are not translated there")
    if agent is None or not is_here:
        return
    there = {(one.ifindex, one.direction): one.program_id for one in device_attachments(pins)}
    there |= {(one.ifindex, _XDP): one.program_id for one in xdp_attachments(pins)}
    for device in agent.device_roles:
        wanted = [*(directions_of(device.ifindex) if device.attached else ())]
        wanted += [_XDP] if is_attached(device.xdp) else []
        for at in wanted:
            if (number := there.get((device.ifindex, at))) not in pinned:
                yield _lost("devices", number, f"{device.name} {at}", consequence_at(at))


def _lost(where: str, number: int | None, what: str, consequence: str) -> Finding:
    kind = DETACHED if number is None else REPLACED
    return Finding(where=where, kind=kind, what=what, consequence=consequence, mend=_START)


def before_ours(pins: Path, agent: AgentState | None, *, is_here: bool) -> Iterator[Finding]:
    """Programs of others that see sockets and packets first: what they change or take, ours never see."""
    yield from _at_sockets(attachments(pins))
    if agent is not None and is_here:
        ours = xdp_attachments(pins)
        own = {each.program_id for each in ours} | {0}
        earlier = {each.ifindex: each.earlier for each in ours if each.place.is_chained}
        with Rtnetlink() as netlink:
            for device in agent.device_roles:
                # A device may be gone by now.
                with suppress(OSError):
                    there = earlier.get(device.ifindex, [xdp_program(netlink, device.ifindex).number])
                    for number in there:
                        if number not in own:
                            yield _first("devices", f"{device.name} xdp", number)
                for direction in directions_of(device.ifindex):
                    yield from _at_device(
                        netlink, pins, device.ifindex, f"{device.name} {direction}", direction
                    )


def _at_sockets(ours: Iterable[Attachment]) -> Iterator[Finding]:
    known = {each.hook: each for each in ours if each.alive}
    cgroup = _cgroup({each.cgroup_id for each in known.values()})
    if cgroup is None:
        return
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for hook in SOCKET_HOOKS:
            if (own := known.get(hook.name)) is None:
                continue
            for number in _until(
                bpf.attached_programs(fd, hook.attach_type, effective=True), own.program_id or 0
            ):
                yield _first("programs", hook.name, number)
    finally:
        os.close(fd)


def _cgroup(ids: set[int]) -> Path | None:
    """The cgroup that links are attached to: nearly always the root."""
    try:
        root = find_cgroup_root()
    except RootError:
        return None
    if root.stat().st_ino in ids:
        return root
    return next((Path(at) for at, _, _ in os.walk(root) if Path(at).stat().st_ino in ids), None)


def _at_device(netlink: Rtnetlink, pins: Path, ifindex: int, where: str, direction: str) -> Iterator[Finding]:
    link = pins / "links" / f"tc-{ifindex}-{direction}"
    with bpf.pinned(link) as fd:
        own = int(bpf.tcx_link_info(fd).prog_id) if fd is not None else None
    if own is not None:
        try:
            there = bpf.attached_programs(ifindex, _ATTACH_TYPES[direction])
        except BpfError:
            # The device is gone.
            return
        for number in _until(there, own):
            yield _first("devices", where, number)
        return
    filters = traffic_control.filters(netlink, ifindex, _PARENTS[direction])
    if (ours := our_filter(filters)) is not None:
        for each in filters[: filters.index(ours)]:
            yield _first("devices", f"{where}, priority {each.priority} {each.name}".rstrip(), None)


def _until(ids: list[int], own: int) -> list[int]:
    return ids[: ids.index(own)] if own in ids else []


def _first(where: str, at: str, number: int | None) -> Finding:
    name = f": program {number} {bpf.prog_name(number)}".rstrip() if number is not None else ""
    return Finding(
        where=where,
        kind="foreign",
        what=f"{at}{name}",
        consequence="it runs before ours: what it translates, drops or redirects does not reach them",
        mend="bpftool net; bpftool cgroup tree" if number is None else f"bpftool prog show id {number}",
        warning=True,
    )
