"""The sources with loops where a CPU is to be overtaken by another one: the same for all tests, to be compiled once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from ebpfproxy.datapath.programs import loader


class _Place(NamedTuple):
    """A part of a source that is there once, and what stands for it."""

    file: str
    part: str
    other: str


def _slow(file: str, part: str) -> _Place:
    """Some microseconds before it."""
    loop = """\
#pragma clang loop unroll(disable)
for (int turn = 0; turn < 300; turn++)
bpf_ktime_get_ns();
"""
    return _Place(file, part, loop + part)


_PLACES = [
    # Between the look-up of an entry and its copy.
    _slow("conntrack.h", "\t\t*copy = *nat;\n"),
    # Between the look-up of a flow's entry and the renewal of its slot, which each packet does: no slot is valid.
    _slow("flow_cache.h", "\tslot->nat.marks = entry->marks;\n"),
    _Place("flow_cache.h", "return slot->sum == slot_sum", "return slot->sum + 1 == slot_sum"),
]


def altered_sources(folder: Path) -> Path:
    """Writes them below ``folder``; returns what stands for ``bpf/``."""
    sources = folder / "bpf"
    shutil.copytree(loader.source_folder(), sources)
    for file, part, other in _PLACES:
        source = sources / "lib" / file
        text = source.read_text()
        assert text.count(part) == 1, (file, part)
        source.write_text(text.replace(part, other))
    return sources
