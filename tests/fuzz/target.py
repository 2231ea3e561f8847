"""A target of fuzzing, and where seeds come from."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tests.data import SAMPLES


class Target(NamedTuple):
    """``run`` takes an input; ``seeds`` are those to begin with."""

    run: Callable[[bytes], object]
    seeds: Callable[[], Iterable[bytes]]

    @property
    def name(self) -> str:
        return self.run.__name__


def printable(text: str) -> None:
    """Errors are shown to people: as lines, and without anything that a terminal obeys."""
    odd = [each for each in text if not each.isprintable() and each != "\n"]
    assert not odd, f"{text!r} would be printed"


def samples(*names: str) -> Callable[[], Iterable[bytes]]:
    def read() -> Iterator[bytes]:
        for name in names:
            content = (SAMPLES / name).read_bytes()
            yield gzip.decompress(content) if name.endswith(".gz") else content

    return read


def shortened(seeds: Callable[[], Iterable[bytes]], lines: int) -> Callable[[], Iterable[bytes]]:
    """Parts of each table of a long text, which are run more often than the whole."""

    def read() -> Iterator[bytes]:
        for text in seeds():
            for table in text.split(b"*")[1:]:
                parts = table.splitlines(keepends=True)
                for at in range(1, len(parts), lines):
                    yield b"*" + b"".join(parts[:1] + parts[at : at + lines])

    return read
