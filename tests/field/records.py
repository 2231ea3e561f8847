"""Reads the pinned maps, in a millisecond; a command takes a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ebpfproxy.datapath import dump
from ebpfproxy.datapath.abi import layout, socket_layout
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
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


def key_of(address: str, port: int, protocol: int = 6) -> bytes:
    """The key of an IPv4 frontend of internal clients in ``services4``."""
    packed = bytes(map(int, address.split(".")))
    return layout.pack_service_key(packed, port, protocol, layout.Scope.INTERNAL)


def fill(node: LabNode, name: str) -> int:
    """The number of entries of a map."""
    with maps_of(node) as maps:
        return next(each.entries for each in dump.fill(maps) if each.name == name)


def origins(node: LabNode) -> tuple[int, int]:
    """The number of connected and of unconnected sockets that have an origin."""
    with maps_of(node) as maps:
        table = OriginTable(maps)
        return sum(1 for _ in each_of(table.connected())), sum(1 for _ in each_of(table.unconnected()))


def kept_elsewhere(node: LabNode) -> int:
    """The number of records in other maps that the slots of ``sock_origin`` refer to."""
    with maps_of(node) as maps:
        slots = maps["sock_origin"]
        return sum(
            socket_layout.ORIGIN.unpack(value)[-1]
            for number in range(slots.spec.max_entries)
            if (value := slots.lookup(layout.U32.pack(number)))
        )


def open_sockets(node: LabNode) -> int:
    """The sum of open sockets of all backends, as programs count them."""
    with maps_of(node) as maps:
        loads = maps.loads()
        return sum(loads[number].open_sockets for number in range(1024))
