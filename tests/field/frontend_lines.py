"""Lines of the cache of frontends (bpf/lib/frontend_cache.h), as tests read and write them."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

from ebpfproxy.datapath.abi import layout
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet

FOLDED = 0x9E3779B97F4A7C15
WORDS = (1 << 64) - 1
LINE = struct.Struct("=8Q")
RANGE_OF_BACKENDS = 1 << 31
_HEADER = (Path(__file__).parents[2] / "bpf/lib/frontend_cache.h").read_text()
FACTORS = [int(each, 16) for each in re.findall(r"#define FRONTEND_\w+\s+(0x\w+)ULL", _HEADER)]


def key_words(host: str, port: int) -> tuple[int, int, int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    packed = layout.pack_address(socket.inet_pton(family, host)) + struct.pack(">HBBI", port, 6, 0, 0)
    first, second, third = struct.unpack("=3Q", packed)
    return first, second, third


def key_sum(key: tuple[int, int, int]) -> int:
    return sum(word * factor for word, factor in zip(key, FACTORS, strict=False)) & WORDS


def place_of(maps: MapSet, key: tuple[int, int, int]) -> bytes:
    total = key_sum(key)
    at = (((total ^ total >> 32) * FOLDED & WORDS) >> 48) & (maps["frontend_cache"].spec.max_entries - 1)
    return layout.U32.pack(at)


def generation_of(maps: MapSet) -> int:
    return int(maps.shared("frontend_generation").words()[0])


def mix(mixed: int, *words: int) -> int:
    for word in words:
        mixed ^= word
        mixed = (mixed ^ mixed >> 32) * FACTORS[3] & WORDS
    return mixed


def line_of(
    key: tuple[int, int, int],
    service: bytes,
    generation: int,
    range_word: int = 0,
    range_generation: int = -1,
) -> bytes:
    """A line; that has no valid range by default."""
    words = struct.unpack("=2Q", service)
    check = mix(mix(generation ^ FACTORS[4], *key) ^ key_sum(key), *words)
    range_check = 0 if range_generation < 0 else mix(check, range_generation, range_word)
    return LINE.pack(*key, *words, check, range_word, range_check)


def without_range(line: bytes | None) -> bytes:
    assert line is not None
    return line[:-16]


def range_in(maps: MapSet, host: str, port: int) -> tuple[int, int, bool]:
    """Base and count of the valid range in a line, and if these are backend ids."""
    key = key_words(host, port)
    words = LINE.unpack(maps["frontend_cache"].lookup(place_of(maps, key)) or b"")
    assert words[:3] == key
    service = service_at(maps, host, port)
    valid = line_of(key, service, generation_of(maps), words[6], range_generation_of(maps, service))
    assert LINE.pack(*words) == valid
    base, count = layout.selection_range(words[6])
    return base, count & ~RANGE_OF_BACKENDS, bool(count & RANGE_OF_BACKENDS)


def range_generation_of(maps: MapSet, service: bytes) -> int:
    words = maps.shared("range_generations").words()
    return int(words[layout.unpack_service(service).id % layout.RANGE_GENERATIONS])


def service_at(maps: MapSet, host: str, port: int) -> bytes:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    key = layout.pack_service_key(socket.inet_pton(family, host), port, 6, layout.Scope.INTERNAL)
    found = maps["services6" if ":" in host else "services4"].lookup(key)
    assert found
    return found


def write(maps: MapSet, key: tuple[int, int, int], line: bytes) -> None:
    bpf.map_update(maps["frontend_cache"].fd, place_of(maps, key), line)
