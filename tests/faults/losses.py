"""Where the kernel itself lost packets: what a datagram that is lost may have to do with, beside the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_NET = Path("/proc/thread-self/net")
#: Counters of what is not delivered, by the kernel's names.
_SNMP = frozenset(
    """
    Ip.InHdrErrors Ip.InAddrErrors Ip.InDiscards Ip.OutDiscards Ip.OutNoRoutes Ip.ReasmFails Ip.FragFails Udp.NoPorts
    Udp.InErrors Udp.RcvbufErrors Udp.SndbufErrors Udp.InCsumErrors Udp.MemErrors TcpExt.ListenDrops
    """.split()  # noqa: SIM905
)
#: Columns of /proc/net/stat, by file.
_TABLES = {
    "arp_cache": ("unresolved_discards", "table_fulls"),
    "ndisc_cache": ("unresolved_discards", "table_fulls"),
    "nf_conntrack": ("insert_failed", "drop"),
}


def here() -> Counter[str]:
    """What this network namespace has lost so far."""
    return Counter(dict(_found()))


def _lines(file: str) -> list[str]:
    path = _NET / file
    return path.read_text().splitlines() if path.exists() else []


def _found() -> Iterator[tuple[str, int]]:
    for file in ("snmp", "netstat"):
        words = [line.split() for line in (_NET / file).read_text().splitlines()]
        for (kind, *names), (_, *values) in zip(words[::2], words[1::2], strict=True):
            for name, value in zip(names, values, strict=True):
                if f"{kind}{name}".replace(":", ".") in _SNMP:
                    yield f"{kind} {name}", int(value)
    for line in _lines("snmp6"):
        name, value = line.split()
        if name.replace("6", ".", 1) in _SNMP or name == "Icmp6OutDestUnreachs":
            yield name, int(value)
    for file, columns in _TABLES.items():
        if (_NET / "stat" / file).exists():
            head, *rows = [line.split() for line in (_NET / "stat" / file).read_text().splitlines()]
            for name in columns:
                yield f"{file} {name}", sum(int(row[head.index(name)], 16) for row in rows)
    for line in (_NET / "dev").read_text().splitlines()[2:]:
        device, _, text = line.partition(":")
        received, sent = text.split()[2:4], text.split()[10:12]
        yield f"{device.strip()} received, errors and dropped", sum(map(int, received))
        yield f"{device.strip()} sent, errors and dropped", sum(map(int, sent))
