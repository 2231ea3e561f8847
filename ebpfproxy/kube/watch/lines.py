"""Splits a stream of chunks into lines."""

from __future__ import annotations


class LineSplitter:
    """Collects chunks and gives out whole lines. A line of any length costs one copy."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Returns lines that this chunk completes, without their ends; empty lines are left out."""
        first, newline, rest = chunk.partition(b"\n")
        self._parts.append(first)
        if not newline:
            return []
        lines = [b"".join(self._parts), *rest.split(b"\n")]
        self._parts = [lines.pop()]
        return [stripped for line in lines if (stripped := line.strip())]

    @property
    def pending(self) -> bool:
        """True if an unfinished line is held: a stream that ends now was cut."""
        return any(self._parts)
