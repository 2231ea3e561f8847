"""What takes a while, once for all who ask for it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

T = TypeVar("T")


class Shared(Generic[T]):
    """A reading in a thread, one at a time. Who asks while one runs shares the next with all others who do:
    the one that runs may have read before what they ask about was changed. One event loop uses it."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[T] | None = None

    async def get(self) -> T:
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        # One who goes away does not take it from the others.
        return await asyncio.shield(self._next)

    async def _run(self) -> T:
        async with self._turn:
            self._next = None
            return await run_in_threadpool(self._read)
