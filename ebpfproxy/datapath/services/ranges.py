"""Which parts of the slots array are in use: contiguous ranges, handed out again as late as possible."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class RangesExhaustedError(Exception):
    """No free range is long enough."""


class Ranges:
    """Free extents of an array of ``size`` places, merged with their neighbours when they return.

    Allocation goes on where the last one ended (next fit), so that a returned range is reused late.
    """

    def __init__(self, size: int, used: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._next = 0
        self.free = 0
        at = 0
        for base, count in sorted(used):
            if base < at:
                raise ValueError(f"range {base}+{count} overlaps another")
            self._add(at, base)
            at = base + count
        if at > size:
            raise ValueError(f"a range ends at {at}, beyond {size}")
        self._add(at, size)

    def _add(self, start: int, end: int) -> None:
        if end > start:
            self._starts.append(start)
            self._ends.append(end)
            self.free += end - start

    def fits(self, count: int) -> bool:
        """True if :meth:`allocate` would find so many."""
        return any(end - start >= count for start, end in zip(self._starts, self._ends, strict=True))

    def allocate(self, count: int) -> int:
        """The base of a range of ``count`` places. Raises RangesExhaustedError."""
        n = len(self._starts)
        first = bisect_left(self._starts, self._next)
        for step in range(n):
            i = (first + step) % n
            base = self._starts[i]
            if self._ends[i] - base >= count:
                self.free -= count
                self._next = base + count
                if self._ends[i] - base == count:
                    del self._starts[i], self._ends[i]
                else:
                    self._starts[i] = base + count
                return base
        raise RangesExhaustedError(f"no {count} places in a row; {self.free} are free in all")

    def release(self, base: int, count: int) -> None:
        end = base + count
        i = bisect_left(self._starts, base)
        joins_left = i > 0 and self._ends[i - 1] == base
        joins_right = i < len(self._starts) and self._starts[i] == end
        if joins_left and joins_right:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_left:
            self._ends[i - 1] = end
        elif joins_right:
            self._starts[i] = base
        else:
            self._starts.insert(i, base)
            self._ends.insert(i, end)
        self.free += count
