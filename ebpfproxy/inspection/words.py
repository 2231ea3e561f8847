"""Durations and sizes in words."""

from __future__ import annotations

from ebpfproxy.datapath.abi.measure_layout import CONNECT_BOUNDS


def age(seconds: float) -> str:
    """``3s``, ``5m``, ``2h``, ``4d``; what a clock that was set back puts into the future is now."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(seconds, 0.0):.0f}s"


def share(part: float) -> str:
    """``50%``, ``1%``, ``0.25%``: of one endpoint among hundreds it is not nothing."""
    return f"{part:.2%}" if 0 < part < 0.01 else f"{part:.0%}"


def duration(seconds: float) -> str:
    """A connect time, rounded: ``64µs``, ``1.2ms``, ``12ms``; ``≥8.4s`` above all bounds."""
    above = "≥" if seconds >= CONNECT_BOUNDS[-1] / 1e6 else ""
    value, unit = seconds * 1e6, "µs"
    for larger in ("ms", "s"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{above}{_two_digits(value)}{unit}"


def size(count: float) -> str:
    """Bytes: ``0``, ``512``, ``1.2k``, ``34M``, in powers of 1,000."""
    value, unit = count, ""
    for larger in "kMGT":
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{_two_digits(value)}{unit}" if unit else f"{value:.0f}"


def _two_digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
