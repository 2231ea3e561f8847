"""Which source ports masquerading may use."""

from __future__ import annotations

from pathlib import Path

_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
#: Below it are the ports that servers may insist on as a client's (RFC 1700's reserved ones).
LOWEST = 1024
HIGHEST = 65535
_ENOUGH = 1024
#: The larger part of 1024-65535 beside Kubernetes' default NodePorts, 30000-32767.
_SHARED = (32768, HIGHEST)


class PortRangeError(Exception):
    """A range of ports that cannot be used; the message names it."""


def parse_range(text: str) -> tuple[int, int]:
    """``20000-29999``: first and last. Raises PortRangeError."""
    first, dash, last = text.partition("-")
    if not dash or not first.strip().isdigit() or not last.strip().isdigit():
        raise PortRangeError(f"{text!r} is not FIRST-LAST, such as 20000-29999")
    found = int(first), int(last)
    if not 0 < found[0] < found[1] <= HIGHEST:
        raise PortRangeError(
            f"{text!r}: a range of ports begins at 1 or above and ends at {HIGHEST} or below"
        )
    return found


def local_range(text: str | None = None) -> tuple[int, int]:
    """The kernel's own ephemeral ports, first and last, of both families: ``ip_local_port_range``."""
    low, high = map(int, (text or _LOCAL_RANGE.read_text()).split())
    return low, high


def default_range(local: tuple[int, int]) -> tuple[int, int]:
    """The larger of the gaps above and below ``local``, the kernel's own ephemeral ports.

    The node's own connections then never share a port with a masqueraded client. Where neither gap has 1024
    ports, the ports above the NodePorts are shared with the node's own connections: see :func:`overlaps`.
    """
    low, high = local
    gaps = [(LOWEST, low - 1), (high + 1, HIGHEST)]
    best = max(gaps, key=lambda gap: gap[1] - gap[0])
    return best if best[1] - best[0] >= _ENOUGH else _SHARED


def overlaps(ports: tuple[int, int], local: tuple[int, int]) -> bool:
    """Whether a socket of this host may have one of ``ports``: programs then look for it first."""
    return ports[0] <= local[1] and local[0] <= ports[1]


def shared_remark(ports: tuple[int, int]) -> str:
    """What is to be said of ports that overlap ``ip_local_port_range``."""
    return (
        f"masqueraded clients share the ports {ports[0]}-{ports[1]} with net.ipv4.ip_local_port_range: "
        "those of this host's sockets are avoided, but a connection opened later may meet one of theirs; "
        "narrow that range, or set --masquerade-ports"
    )
