"""How the reconciler gives slow work to a worker thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

R = TypeVar("R")


class BackgroundRunner(Protocol):
    """Runs ``work`` in a worker, and then ``then`` with its result in the reconciler."""

    def __call__(self, work: Callable[[], R], then: Callable[[R], None], /) -> None: ...
