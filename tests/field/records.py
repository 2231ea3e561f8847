"""What a node's maps hold about sockets, read from the pins: a command takes a second, this a millisecond."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from ebpfproxy.datapath.kernel.roots import pin_folder
from tests.lab import LabNode


@contextmanager
def maps_of(node: LabNode) -> Iterator[MapSet]:
    """The maps of the node's last agent."""
    folders = pin_folder(node.bpf_root).glob("v*/maps")
    maps = open_pinned(max(folders, key=lambda each: each.stat().st_ctime_ns).parent)
    try:
        yield maps
    finally:
        maps.close()


def fill(node: LabNode, name: str) -> int:
    """How many entries a hash has."""
    with maps_of(node) as maps:
        return maps[name].count()


def open_sockets(node: LabNode) -> int:
    """How many connections are counted, to all backends together."""
    with maps_of(node) as maps:
        words = maps.shared("loads").bytes.cast("I")
        size = layout.LOAD_WORDS
        found = sum(layout.load_of(words[at : at + size]).open_sockets for at in range(0, 1024 * size, size))
        words.release()
        return found
