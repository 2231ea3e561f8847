"""Ranges of addresses that programs know (``cidrs``), and the filter that spares them the look-up.

``bpf/lib/service_cidr.h`` computes the same bits: of IPv4 the first 20 bits of the address, of IPv6 a hash of
the first 64. A filter may say yes wrongly, never no.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.node_layout import CidrFlags, pack_cidr, unpack_cidr
from ebpfproxy.datapath.abi.schema import CIDR_FILTER_BITS
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.kernel.owned import Owned
from ebpfproxy.services.model import Prefix

_WORDS = struct.Struct("=2I")
_MASK = 0xFFFFFFFF
_V4_BITS = CIDR_FILTER_BITS
_V6_BITS = 64
#: An IPv6 range of more /64s than this has all bits: it would have most of them anyway.
_MOST_V6 = 1 << 16


def filter_bits(prefix: Prefix) -> Iterator[int] | None:
    """The bits of a range; None for all there are."""
    if len(prefix.address) == 4:
        first = int.from_bytes(prefix.address, "big") >> (32 - _V4_BITS)
        return iter(range(first, first + (1 << max(0, _V4_BITS - prefix.length))))
    count = 1 << max(0, _V6_BITS - prefix.length)
    if count > _MOST_V6:
        return None
    first = int.from_bytes(prefix.address[:8], "big")
    return (_hash6((first + i).to_bytes(8, "big")) for i in range(count))


def _hash6(upper: bytes) -> int:
    one, two = _WORDS.unpack(upper)
    hashed: int = (one * 0x85EBCA6B + two) * 0x9E3779B1 & _MASK
    return hashed >> (32 - CIDR_FILTER_BITS)


class Cidrs:
    """The only writer of ``cidrs`` and ``cidr_filter``. What an earlier agent knew stays until it is set."""

    def __init__(self, maps: MapSet) -> None:
        self._table = maps["cidrs"]
        self._filter = maps.shared("cidr_filter")
        self._filter.keep()
        self._flags: dict[Prefix, CidrFlags] = {}
        self._entries = dict(self._table.items())
        for key, value in self._entries.items():
            self._flags[unpack_cidr(key)] = CidrFlags(U32.unpack(value)[0])
        #: Ranges of cluster IPs that an earlier agent knew.
        self.adopted = tuple(
            prefix
            for prefix, flags in self._flags.items()
            if flags & CidrFlags.SERVICES and not flags & CidrFlags.TAKEN
        )

    def set_pods(self, pods: Iterable[Prefix]) -> None:
        """Sets the ranges of this node's pods."""
        self._set(CidrFlags.PODS, dict.fromkeys(pods, CidrFlags.PODS))

    def set_services(self, services: Iterable[Prefix], taken: Iterable[bytes]) -> bool:
        """Sets the ranges of cluster IPs, and addresses in them that this node or another proxy serves.

        False where there is no room for all of the latter.
        """
        ranges = tuple(services)
        wanted = dict.fromkeys(ranges, CidrFlags.SERVICES)
        for address in taken:
            if any(each.contains(address) for each in ranges):
                wanted[Prefix(address, 8 * len(address))] = CidrFlags.SERVICES | CidrFlags.TAKEN
        return self._set(CidrFlags.SERVICES | CidrFlags.TAKEN, wanted)

    def _set(self, of: CidrFlags, wanted: dict[Prefix, CidrFlags]) -> bool:
        others = {prefix: flags & ~of for prefix, flags in self._flags.items() if flags & ~of}
        self._flags = {
            prefix: others.get(prefix, CidrFlags(0)) | wanted.get(prefix, CidrFlags(0))
            for prefix in {*others, *wanted}
        }
        # The longest prefix alone is found: it says what holds for all that contain it.
        ranges = [(p, flags) for p, flags in self._flags.items() if p.length < 8 * len(p.address)]
        entries = {}
        for prefix, flags in self._flags.items():
            for outer, more in ranges:
                if outer.length < prefix.length and outer.contains(prefix.address):
                    flags |= more  # noqa: PLW2901
            entries[pack_cidr(prefix)] = U32.pack(flags)
        refused = self._table.bring(entries)
        self._entries = {key: value for key, value in entries.items() if key not in refused}
        self._write_filter()
        return not refused

    def owned(self) -> Owned:
        """The map of ranges, with what it should hold."""
        return Owned(self._table, lambda: list(self._entries.items()))

    def _write_filter(self) -> None:
        bits = bytearray(self._filter.stride)
        for prefix, flags in self._flags.items():
            if not flags & CidrFlags.SERVICES or flags & CidrFlags.TAKEN:
                continue
            numbers = filter_bits(prefix)
            if numbers is None:
                bits = bytearray(b"\xff" * len(bits))
                break
            for number in numbers:
                bits[number >> 3] |= 1 << (number & 7)
        if self._filter.keep()[: len(bits)] != bits:
            self._filter.store(0, bytes(bits))
