"""Durations in words."""

from __future__ import annotations


def age(seconds: float) -> str:
    """``3s``, ``5m``, ``2h``, ``4d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{seconds:.0f}s"
