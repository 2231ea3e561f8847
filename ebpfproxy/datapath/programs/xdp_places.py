"""Where the XDP program is at devices, by pins: a link, or the program itself in a dispatcher of libxdp.

They are ``links/xdp-<ifindex>-<mode>`` and ``links/xdp-<ifindex>-<mode>-chained``.
"""

from __future__ import annotations

import enum
import re
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.programs import xdp_chain
from ebpfproxy.datapath.programs.attach import LINKS, program_id
from ebpfproxy.netlink.rtnetlink import Rtnetlink
from ebpfproxy.netlink.xdp_state import XdpProgram, xdp_program

_PIN = re.compile(r"xdp-(\d+)-(native|generic)(-chained)?(-new)?")


class XdpMode(enum.StrEnum):
    """The value is in names of pins; ``flag`` is the kernel's (XDP_FLAGS_DRV_MODE, _SKB_MODE)."""

    NATIVE = "native"
    GENERIC = "generic"

    @property
    def flag(self) -> int:
        return 1 << 2 if self is XdpMode.NATIVE else 1 << 1


class Place(NamedTuple):
    """Where our program is at a device: alone, or in a dispatcher of libxdp."""

    ifindex: int
    mode: XdpMode
    is_chained: bool = False

    @property
    def pin(self) -> str:
        alone = f"xdp-{self.ifindex}-{self.mode}"
        return f"{alone}-chained" if self.is_chained else alone


class XdpAttachment(NamedTuple):
    """A device with our program, as the kernel says. ``programs``: those of its dispatcher as they run."""

    place: Place
    program_id: int
    programs: tuple[int, ...] = ()

    @property
    def ifindex(self) -> int:
        return self.place.ifindex

    @property
    def earlier(self) -> list[int]:
        """The programs that see a packet before ours."""
        return list(takewhile(lambda number: number != self.program_id, self.programs))

    @property
    def state(self) -> str:
        """The mode, and the names of programs that are in the dispatcher beside ours."""
        if not self.place.is_chained:
            return str(self.place.mode)
        others = xdp_chain.names_of(self.programs)
        return f"{self.place.mode}, in libxdp's dispatcher" + (f" with {others}" if others else "")


def is_attached(state: str) -> bool:
    """Tells a state of a device with the program from a reason why it has none."""
    return state.partition(",")[0] in list(XdpMode)


class Dispatcher(NamedTuple):
    """A device's program, and if that is a dispatcher of libxdp, the programs in it, else None."""

    program: XdpProgram
    members: list[int] | None

    @property
    def mode(self) -> XdpMode:
        return XdpMode.GENERIC if self.program.is_generic else XdpMode.NATIVE


def dispatcher_of(ifindex: int) -> Dispatcher:
    """Raises OSError if there is no such device in this network namespace."""
    with Rtnetlink() as netlink:
        program = xdp_program(netlink, ifindex)
    return Dispatcher(program, xdp_chain.members(ifindex, program.number))


def place_of(pin: Path) -> Place | None:
    """The place of a pin; None of a pin of something else."""
    name = _PIN.fullmatch(pin.name)
    return Place(int(name[1]), XdpMode(name[2]), bool(name[3])) if name else None


def xdp_attachments(pins: Path) -> list[XdpAttachment]:
    """Reads pins, in any network namespace: the indexes are those of the agent's."""
    found = []
    for path in sorted((pins / LINKS).glob("xdp-*")):
        place = place_of(path)
        if place is not None and place.is_chained:
            number = program_id(path) or 0
            chains = xdp_chain.dispatchers_with(place.ifindex, number)
            found += [XdpAttachment(place, number, tuple(programs)) for programs in chains]
        elif place is not None:
            with bpf.pinned(path) as link:
                if link is not None and (info := bpf.xdp_link_info(link)).ifindex:
                    found.append(XdpAttachment(place._replace(ifindex=int(info.ifindex)), int(info.prog_id)))
    return found


def detach(path: Path) -> str:
    """Detaches what is pinned there: the device has no program of ours when this returns.

    Returns what was done.
    """
    place = place_of(path)
    if place is not None and place.is_chained:
        if failure := _leave(place, program_id(path)):
            return f"{path.name} stays attached: {failure}"
    else:
        with bpf.pinned(path) as link:
            if link is not None:
                bpf.link_detach(link)
    path.unlink(missing_ok=True)
    return f"detached {path.name}"


def _leave(place: Place, program: int | None) -> str:
    """Removes a program from the dispatcher of a device of this namespace. Returns why that failed."""
    try:
        found = dispatcher_of(place.ifindex)
    except OSError:
        # The device is gone.
        return ""
    if program is None or program not in (found.members or ()):
        return ""
    try:
        xdp_chain.leave(place.ifindex, program, is_native=found.mode is XdpMode.NATIVE)
    except xdp_chain.ChainError as error:
        return f"program {program}: {error}"
    return ""
