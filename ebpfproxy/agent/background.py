"""How the reconciler gives slow work to a worker thread, and what that gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

R = TypeVar("R")


class BackgroundRunner(Protocol):
    """Runs ``work`` in a worker, and then ``then`` with its result in the reconciler."""

    def __call__(self, work: Callable[[], R], then: Callable[[R], None], /) -> None: ...


class ReconcilerCall(Protocol):
    """Has the reconciler call ``what``. A worker's calls come before the result of its work."""

    def __call__(self, what: Callable[[], None], /) -> None: ...
