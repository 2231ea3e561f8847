"""Which source ports masquerading may use."""

from __future__ import annotations

from pathlib import Path

_LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
#: Below it are the ports that servers may insist on as a client's (RFC 1700's reserved ones).
LOWEST = 1024
HIGHEST = 65535


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


def beside_local_range(text: str | None = None) -> tuple[int, int]:
    """The larger of the gaps above and below the kernel's own ephemeral ports (``ip_local_port_range``).

    The node's own connections then never share a port with a masqueraded client. Raises PortRangeError
    where the kernel's range leaves fewer than 1024 ports on either side.
    """
    low, high = map(int, (text or _LOCAL_RANGE.read_text()).split())
    gaps = [(LOWEST, low - 1), (high + 1, HIGHEST)]
    best = max(gaps, key=lambda gap: gap[1] - gap[0])
    if best[1] - best[0] < 1024:
        raise PortRangeError(
            f"net.ipv4.ip_local_port_range is {low} {high}: no room for masqueraded clients beside it; "
            "narrow it, or set --masquerade-ports"
        )
    return best
