"""How commands report what they do: line by line, to a function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

Say = Callable[[str], None]


def each(lines: Iterable[str], say: Say) -> None:
    for line in lines:
        say(line)


def prefixed(say: Say, prefix: str, lock: threading.Lock) -> Say:
    """Lines of one of several threads, each with ``prefix``, which is not written twice."""

    def tell(line: str) -> None:
        with lock:
            say(f"{prefix}{line.removeprefix(prefix)}")

    return tell
