"""Durations in Go's notation (package time, ParseDuration and Duration.String)."""

from __future__ import annotations

import functools
import re

_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,  # U+00B5, micro sign
    "μs": 10**3,  # U+03BC, the Greek letter
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_PART = re.compile(r"([0-9]*)(?:\.([0-9]*))?(ns|us|µs|μs|ms|s|m|h)")
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1


@functools.total_ordering
class Duration:
    """A whole number of nanoseconds, immutable. ``str()`` gives Go's notation: ``1h30m0s``, ``1.5s``."""

    __slots__ = ("_nanoseconds",)

    def __init__(self, nanoseconds: int = 0) -> None:
        self._nanoseconds = nanoseconds

    @property
    def nanoseconds(self) -> int:
        return self._nanoseconds

    @property
    def seconds(self) -> float:
        return self._nanoseconds / 10**9

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and self._nanoseconds == other._nanoseconds

    def __lt__(self, other: Duration) -> bool:
        return self._nanoseconds < other._nanoseconds

    def __hash__(self) -> int:
        return hash(self._nanoseconds)

    def __bool__(self) -> bool:
        return self._nanoseconds != 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        sign = "-" if self._nanoseconds < 0 else ""
        number = abs(self._nanoseconds)
        if number == 0:
            return "0s"
        for unit, above in (("ns", "us"), ("µs", "ms"), ("ms", "s")):
            if number < _UNITS[above]:
                return f"{sign}{_decimal(number, _UNITS[unit])}{unit}"
        minutes, rest = divmod(number, _UNITS["m"])
        hours, minutes = divmod(minutes, 60)
        text = f"{_decimal(rest, _UNITS['s'])}s"
        if hours or minutes:
            text = f"{minutes}m{text}"
        return f"{sign}{hours}h{text}" if hours else f"{sign}{text}"


def _decimal(number: int, unit: int) -> str:
    """``number`` in ``unit``, without zeros at the end."""
    whole, rest = divmod(number, unit)
    digits = str(rest).zfill(len(str(unit)) - 1).rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def seconds(number: float) -> Duration:
    """A duration in seconds, rounded to the nearest nanosecond."""
    return Duration(round(number * 10**9))


def parse_duration(text: str) -> Duration:
    """Parses ``1h30m``, ``1.5s``, ``-250ms``, ``0``: numbers with units; there is no default unit.

    Fractions of a nanosecond are cut off. Raises ValueError, also beyond some 292 years, as Go does.
    """
    sign, unsigned = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    if unsigned == "0":
        return Duration()
    parts = list(_PART.finditer(unsigned))
    matched = "".join(part[0] for part in parts)
    if not parts or matched != unsigned or not all(part[1] or part[2] for part in parts):
        raise ValueError(f"{text!r} is not a duration such as 30s or 1h30m")
    total = 0
    for part in parts:
        whole, fraction = part[1] or "0", part[2] or ""
        # int() refuses thousands of digits, and nothing that long is in the range.
        if len(whole.lstrip("0")) > 19:
            raise ValueError(f"{text!r} is too long a duration")
        fraction = fraction[:18]
        total += int(whole) * _UNITS[part[3]] + int(fraction or "0") * _UNITS[part[3]] // 10 ** len(fraction)
    total *= sign
    if not _LOWEST <= total <= _HIGHEST:
        raise ValueError(f"{text!r} is too long a duration")
    return Duration(total)
