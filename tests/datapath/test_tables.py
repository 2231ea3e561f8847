"""Tables that programs read: hashes and CRCs as others compute them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.sctp import crc32c

from ebpfproxy.config.datapath import Capacity
from ebpfproxy.config.masquerade_ports import (
    PortRangeError,
    default_range,
    local_range,
    overlaps,
    parse_range,
)
from ebpfproxy.datapath.abi.schema import CRC_STEPS
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.node.crc32c import zeros_tables
from ebpfproxy.datapath.services.filter import BitFilter, address_hash


def over_zeros(words: tuple[int, ...], crc: int, length: int) -> int:
    """Does what ``crc32c_zeros`` does in C."""
    for k in range(CRC_STEPS):
        if length >> k & 1:
            step = words[k * 1024 : (k + 1) * 1024]
            crc = (
                step[crc & 255]
                ^ step[256 + (crc >> 8 & 255)]
                ^ step[512 + (crc >> 16 & 255)]
                ^ step[768 + (crc >> 24)]
            )
    return crc


def test_the_crc_of_a_changed_packet_follows_from_the_change() -> None:
    words = struct.unpack(f"={CRC_STEPS * 1024}I", zeros_tables())
    draw = random.Random(3)
    for length in (12, 13, 100, 1480, 65535):
        before = bytearray(draw.randbytes(length))
        after = bytearray(before)
        after[:4] = draw.randbytes(4)
        difference = int.from_bytes(before[:4], "little") ^ int.from_bytes(after[:4], "little")
        moved = over_zeros(words, difference, length)
        # scapy gives the CRC as it lies in a packet.
        swapped = int.from_bytes(moved.to_bytes(4, "little"), "big")
        assert crc32c(bytes(before)) ^ swapped == crc32c(bytes(after))


@pytest.fixture
def filter_of_a_map(pins: Path) -> Iterator[tuple[BitFilter, maps.SharedArray]]:
    opened = maps.open_or_create(pins, Capacity(conntrack=1024))
    memory = opened.shared("address_filter")
    found = BitFilter(memory)
    yield found, memory
    # Views of the memory must be gone before it is closed.
    found._memory = None  # type: ignore[assignment]
    opened.close()


@pytest.mark.root
def test_the_filter_counts_and_clears(filter_of_a_map: tuple[BitFilter, maps.SharedArray]) -> None:
    known, memory = filter_of_a_map
    one, other = bytes([10, 96, 0, 1]), bytes(15) + b"\x07"

    def has(address: bytes) -> bool:
        number = address_hash(address)
        return bool(memory.bytes[number >> 3] & 1 << (number & 7))

    for address in (one, one, other):
        known.add(address_hash(address))
    assert has(one)
    assert has(other)
    known.remove(address_hash(one))
    assert has(one), "somebody still wants it"
    known.remove(address_hash(one))
    assert not has(one)
    memory.bytes[5] = 0xFF
    known.drop_leftovers()
    assert memory.bytes[5] == 0
    assert has(other)


def test_addresses_spread_over_the_filter() -> None:
    """Ten thousand cluster IPs in a row: at most 2 % share a bit with another."""
    hashes = {address_hash(bytes([10, 96, i // 250, i % 250])) for i in range(10_000)}
    assert len(hashes) > 9_800


def test_masquerading_has_the_larger_gap_beside_the_kernels_own_ports() -> None:
    assert default_range(local_range("32768\t60999")) == (1024, 32767)
    assert default_range(local_range("1024 40000")) == (40001, 65535)


@pytest.mark.parametrize("text", ["1024 65535", "1 65535", "1500 64900"])
def test_without_a_gap_masquerading_shares_the_ports_above_the_node_ports(text: str) -> None:
    local = local_range(text)
    assert default_range(local) == (32768, 65535)
    assert overlaps(default_range(local), local)


def test_ranges_overlap_where_they_have_a_port_in_common() -> None:
    assert not overlaps((1024, 32767), (32768, 60999))
    assert not overlaps((61000, 65535), (32768, 60999))
    assert overlaps((1024, 32768), (32768, 60999))
    assert overlaps((60999, 65535), (32768, 60999))
    assert overlaps((40000, 40001), (32768, 60999))
    assert overlaps((1024, 65535), (32768, 60999))


@pytest.mark.parametrize("text", ["", "1", "5-", "9-3", "0-7", "1-70000", "a-b", "-5-9"])
def test_ranges_of_ports_that_cannot_be_used(text: str) -> None:
    with pytest.raises(PortRangeError, match="'"):
        parse_range(text)
    assert parse_range("20000-29999") == (20000, 29999)
