"""Values in Grafana's units, as Grafana shows them: those of our panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

_COUNTED = ("", "K", "M", "B", "T")
_SHORT = ("", " K", " Mil", " Bil", " Tri")
_SI = ("n", "µ", "m", "", "k", "M", "G", "T")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti")
#: Seconds, from those on that have the next name.
_SECONDS = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (60.0, 1.0, "s"))
_LONG = (
    (3600.0, 60.0, "min"),
    (86400.0, 3600.0, "hour"),
    (604800.0, 86400.0, "day"),
    (math.inf, 604800.0, "week"),
)


def shown(value: float, unit: str) -> str:
    """Raises KeyError for a unit that is none of our panels'."""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    match unit:
        case "none":
            return _digits(value)
        case "percentunit":
            return f"{_digits(100 * value)}%"
        case "s":
            return _seconds(value)
        case "Bps":
            return _scaled(value, 1000, [f" {each}B/s" for each in _SI], 3)
        case "bytes":
            return _scaled(value, 1024, [f" {each}B" for each in _BINARY])
        case "short":
            return _scaled(value, 1000, _SHORT)
    kind, _, own = unit.partition(":")
    symbol = own if kind == "count" else {"cps": "c/s", "ops": "ops/s"}[unit]
    return _scaled(value, 1000, [f"{each} {symbol}" for each in _COUNTED])


def _seconds(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0 s"
    for below, factor, unit in _SECONDS:
        if size < below:
            return f"{_digits(value * factor)} {unit}"
    seconds, unit = next((seconds, unit) for below, seconds, unit in _LONG if size < below)
    return f"{_digits(value / seconds)} {unit}{'s' * (size > seconds)}"


def _scaled(value: float, step: int, suffixes: Sequence[str], ones: int = 0) -> str:
    """``ones``: which of the suffixes is that of 1."""
    exponent = math.floor(math.log(abs(value), step) + 1e-12) if value else 0
    place = min(max(ones + exponent, 0), len(suffixes) - 1)
    return _digits(value / step ** float(place - ones)) + suffixes[place]


def _digits(value: float) -> str:
    """Three of them, or a whole number."""
    if value == int(value):
        return f"{value:.0f}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    # JavaScript has an exponent here.
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-6 else text
