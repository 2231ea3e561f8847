"""Hashes and tries that the agent alone writes, with what it has written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ebpfproxy.datapath.kernel.bpf_map import Map


class Owned(NamedTuple):
    """``entries`` returns packed keys and values as the map should hold them.

    It is called in the thread that writes the map. What it returns may be read in another one, and does not
    follow later changes; the ``writes`` of the map tell whether there were any.
    """

    map: Map
    entries: Callable[[], Iterable[tuple[bytes, bytes]]]
