"""Tables of programs (filters and CRC), and the choice of masquerade ports."""

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
from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.abi.schema import ADDRESS_FILTER_BITS, CRC_STEPS
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.kernel.bpf_map import SharedArray
from ebpfproxy.datapath.node.crc32c import zeros_tables
from ebpfproxy.datapath.services.filter import BitFilter, Bits, address_hash, backend_hashes
from ebpfproxy.services.model import Backend, BackendState, Protocol


def over_zeros(words: tuple[int, ...], crc: int, length: int) -> int:
    """Appends ``length`` zero bytes to a CRC, as ``crc32c_zeros`` in C."""
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


def test_crc_of_a_changed_packet_is_updated_incrementally() -> None:
    words = struct.unpack(f"={CRC_STEPS * 1024}I", zeros_tables())
    draw = random.Random(3)
    for length in (12, 13, 100, 1480, 65535):
        before = bytearray(draw.randbytes(length))
        after = bytearray(before)
        after[:4] = draw.randbytes(4)
        difference = int.from_bytes(before[:4], "little") ^ int.from_bytes(after[:4], "little")
        moved = over_zeros(words, difference, length)
        # scapy returns the CRC in the byte order of packets.
        swapped = int.from_bytes(moved.to_bytes(4, "little"), "big")
        assert crc32c(bytes(before)) ^ swapped == crc32c(bytes(after))


@pytest.fixture
def filter_of_a_map(pins: Path) -> Iterator[tuple[BitFilter, SharedArray]]:
    opened = maps.open_or_create(pins, Capacity(conntrack=1024))
    memory = opened.shared("address_filter")
    yield BitFilter(memory), memory
    opened.close()


@pytest.mark.root
def test_filter_counts_and_clears_bits(filter_of_a_map: tuple[BitFilter, SharedArray]) -> None:
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
    assert has(one), "the address was added twice"
    known.remove(address_hash(one))
    assert not has(one)
    memory.bytes[5] = 0xFF
    known.drop_leftovers()
    assert memory.bytes[5] == 0
    assert has(other)


def test_addresses_spread_over_the_filter() -> None:
    """At most 2 % of ten thousand successive cluster IPs share a bit."""
    hashes = {address_hash(bytes([10, 96, i // 250, i % 250])) for i in range(10_000)}
    assert len(hashes) > 9_800


def test_backends_spread_over_the_filter() -> None:
    """The backends are pods with two ports each, and one address with many ports."""
    pods = [bytes([10, 244, i // 250, i % 250]) for i in range(5_000)]
    for backends in (
        [Backend(pod, port, Protocol.TCP) for pod in pods for port in (8080, 8443)],
        [Backend(pods[0], port, Protocol.TCP) for port in range(1024, 11_024)],
    ):
        assert len(set(hashes_of(backends))) > 9_800


def hashes_of(backends: list[Backend]) -> list[int]:
    return backend_hashes(layout.pack_backends(backends, BackendState.ACTIVE))


def test_backends_of_both_families_have_the_hashes_that_programs_compute() -> None:
    """As in addr_fold() and may_be_backend() of bpf/lib/filter.h, with numbers of 32 bits."""
    draw = random.Random(5)
    backends = [
        Backend(draw.randbytes(size), draw.choice((0, 1, 255, 256, 65535, draw.randrange(65536))), protocol)
        for size in (4, 16) * 200
        for protocol in Protocol
    ]
    backends += [Backend(b"\xff" * size, 65535, Protocol.SCTP) for size in (4, 16)]
    expected = []
    for each in backends:
        words = struct.unpack("=4I", layout.pack_address(each.address))
        factors = (0x27D4EB2F, 0xC2B2AE35, 0x85EBCA6B, 1)
        folded = sum(word * factor for word, factor in zip(words, factors, strict=True))
        product = (folded + each.port * 0x165667B1) * 0x9E3779B1
        expected.append((product & 0xFFFFFFFF) >> (32 - ADDRESS_FILTER_BITS))
    assert hashes_of(backends) == expected
    assert [hashes_of([each]) for each in backends] == [[number] for number in expected]


@pytest.mark.root
def test_many_bits_are_set_as_few_are(pins: Path) -> None:
    opened = maps.open_or_create(pins, Capacity(conntrack=1024))
    draw = random.Random(4)
    memory, other = opened.shared("address_filter"), opened.shared("backend_filter")
    at_once, one_by_one = Bits(memory), Bits(other)
    for count in (1, 20_000, 3, 9_000):
        numbers = [draw.randrange(1 << ADDRESS_FILTER_BITS) for _ in range(count)]
        at_once.set_all(numbers)
        one_by_one.set(numbers)
        assert memory.memory[:] == other.memory[:]
        assert bytes(memory.keep()) == memory.memory[:]
    opened.close()


def test_masquerade_ports_are_the_larger_gap_beside_local_ports() -> None:
    assert default_range(local_range("32768\t60999")) == (1024, 32767)
    assert default_range(local_range("1024 40000")) == (40001, 65535)


@pytest.mark.parametrize("text", ["1024 65535", "1 65535", "1500 64900"])
def test_without_a_gap_masquerade_ports_are_shared_above_node_ports(text: str) -> None:
    local = local_range(text)
    assert default_range(local) == (32768, 65535)
    assert overlaps(default_range(local), local)


def test_port_ranges_overlap_if_they_share_a_port() -> None:
    assert not overlaps((1024, 32767), (32768, 60999))
    assert not overlaps((61000, 65535), (32768, 60999))
    assert overlaps((1024, 32768), (32768, 60999))
    assert overlaps((60999, 65535), (32768, 60999))
    assert overlaps((40000, 40001), (32768, 60999))
    assert overlaps((1024, 65535), (32768, 60999))


@pytest.mark.parametrize(
    "text",
    ["", "1", "5-", "9-3", "0-7", "1-70000", "a-b", "-5-9", "1-²", f"1-{'9' * 5000}", f"{'9' * 5000}-1"],
)
def test_invalid_port_ranges(text: str) -> None:
    with pytest.raises(PortRangeError, match="'"):
        parse_range(text)
    assert parse_range("20000-29999") == (20000, 29999)
