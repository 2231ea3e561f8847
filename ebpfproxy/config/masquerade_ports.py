"""The source ports for masquerading."""

from __future__ import annotations

import re
from pathlib import Path

from ebpfproxy.services.values import parse_port

_DIGITS = re.compile("[0-9]+")
_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
#: Servers may require a client port below it (reserved ports, RFC 1700).
LOWEST = 1024
HIGHEST = 65535
_ENOUGH = 1024
#: The larger part of 1024-65535 beside Kubernetes' default NodePorts, 30000-32767.
_SHARED = (32768, HIGHEST)


class PortRangeError(Exception):
    """An invalid range of ports; the message names it."""


def parse_range(text: str) -> tuple[int, int]:
    """``20000-29999``: first and last. Raises PortRangeError."""
    first, dash, last = text.partition("-")
    if not dash or not _DIGITS.fullmatch(first.strip()) or not _DIGITS.fullmatch(last.strip()):
        raise PortRangeError(f"{text!r} is not FIRST-LAST, such as 20000-29999")
    found = parse_port(first.strip()), parse_port(last.strip())
    if found[0] is None or found[1] is None or not found[0] < found[1]:
        raise PortRangeError(
            f"{text!r}: a range of ports begins at 1 or above and ends at {HIGHEST} or below"
        )
    return found[0], found[1]


def local_range(text: str | None = None) -> tuple[int, int]:
    """The kernel's ephemeral ports of both families, first and last: ``ip_local_port_range``."""
    low, high = map(int, (text or _LOCAL_RANGE.read_text()).split())
    return low, high


def default_range(local: tuple[int, int]) -> tuple[int, int]:
    """The larger of the gaps above and below ``local``, the kernel's ephemeral ports.

    The node's own connections then never share a port with a masqueraded client. If neither gap has 1024
    ports, the ports above the NodePorts are shared with the node's connections: see :func:`overlaps`.
    """
    low, high = local
    gaps = [(LOWEST, low - 1), (high + 1, HIGHEST)]
    best = max(gaps, key=lambda gap: gap[1] - gap[0])
    return best if best[1] - best[0] >= _ENOUGH else _SHARED


def overlaps(ports: tuple[int, int], local: tuple[int, int]) -> bool:
    """Whether a socket of this host may have one of ``ports``: programs then look up sockets first."""
    return ports[0] <= local[1] and local[0] <= ports[1]


def shared_remark(ports: tuple[int, int]) -> str:
    """The warning about ports that overlap ``ip_local_port_range``."""
    return (
        f"masqueraded clients share the ports {ports[0]}-{ports[1]} with net.ipv4.ip_local_port_range: "
        "ports of this host's sockets are avoided, but a later connection of the host may collide; "
        "narrow that range, or set --masquerade-ports"
    )
