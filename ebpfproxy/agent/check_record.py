"""How ``ebpfproxy check`` and the agent talk: a request and a report in the map that ``status`` reads.

A pinned map is there for whoever may see the bpffs, from any network and process namespace, and for nobody
else; a socket would be one more thing to protect.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.schema import AGENT_STATE_SIZE, CHECK_REPORT, CHECK_REQUEST
from ebpfproxy.datapath.drift.findings import Finding
from ebpfproxy.datapath.kernel.maps import MapSet

T = TypeVar("T")


class Request(msgspec.Struct, frozen=True):
    """``serial`` tells requests apart. With ``repair`` the agent repairs what it finds."""

    serial: int
    repair: bool


class Repaired(msgspec.Struct, frozen=True):
    """What the agent has repaired, and when (Unix seconds)."""

    when: float
    finding: Finding


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison of the agent's. Times are Unix seconds, durations seconds."""

    #: The serial number of the request that it answers; 0 if it answers none.
    serial: int = 0
    checked: float
    took: float
    #: How often the agent compares by itself; 0 for never.
    every: float
    repaired: bool
    #: How many findings there are; not all may fit below.
    total: int = 0
    findings: tuple[Finding, ...] = ()
    #: The last that were repaired, latest first.
    earlier: tuple[Repaired, ...] = ()


def ask(maps: MapSet, request: Request) -> None:
    maps["agent_state"].update(U32.pack(CHECK_REQUEST), _padded(msgspec.json.encode(request)))


def asked(maps: MapSet) -> Request | None:
    """The last request; None without one that can be read."""
    return _decoded(maps, CHECK_REQUEST, Request)


def answer(maps: MapSet, report: Report) -> None:
    """Stores a report, with as many of its findings as have room."""
    while len(encoded := msgspec.json.encode(report)) > AGENT_STATE_SIZE:
        kept, earlier = report.findings, report.earlier
        report = msgspec.structs.replace(
            report, findings=kept[: len(kept) * 3 // 4], earlier=earlier[: len(earlier) * 3 // 4]
        )
    maps["agent_state"].update(U32.pack(CHECK_REPORT), _padded(encoded))


def answered(maps: MapSet) -> Report | None:
    """The last report; None without one that can be read."""
    return _decoded(maps, CHECK_REPORT, Report)


def _padded(encoded: bytes) -> bytes:
    return encoded.ljust(AGENT_STATE_SIZE, b"\0")


def _decoded(maps: MapSet, key: int, kind: type[T]) -> T | None:
    stored = maps["agent_state"].lookup(U32.pack(key))
    if stored is None:
        return None
    try:
        return msgspec.json.decode(stored.rstrip(b"\0"), type=kind)
    except msgspec.DecodeError:
        return None
