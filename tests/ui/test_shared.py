"""Readings that take a while are shared by those who ask meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from ebpfproxy.ui.shared import Shared


class Slow:
    """A reading that takes until it is let go; it returns how many began."""

    def __init__(self) -> None:
        self.begun = 0
        self.goes_on = threading.Semaphore(0)

    def read(self) -> int:
        self.begun += 1
        number = self.begun
        assert self.goes_on.acquire(timeout=30)
        return number


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Callable[[Slow, Shared[int]], Awaitable[None]]) -> None:
    async def inside() -> None:
        slow = Slow()
        await test(slow, Shared(slow.read))

    asyncio.run(inside())


def test_all_who_ask_while_one_runs_share_the_next() -> None:
    """The one that runs may have read before what they ask about was changed."""

    async def test(slow: Slow, shared: Shared[int]) -> None:
        first = asyncio.create_task(shared.get())
        await until(lambda: slow.begun == 1)
        others = [asyncio.create_task(shared.get()) for _ in range(20)]
        await asyncio.sleep(0)
        slow.goes_on.release(2)
        assert await first == 1
        assert await asyncio.gather(*others) == [2] * 20
        slow.goes_on.release()
        assert await shared.get() == 3

    run(test)


def test_who_goes_away_does_not_take_it_from_others() -> None:
    async def test(slow: Slow, shared: Shared[int]) -> None:
        gone, stays = (asyncio.create_task(shared.get()) for _ in range(2))
        await until(lambda: slow.begun == 1)
        gone.cancel()
        slow.goes_on.release()
        assert await stays == 1
        assert gone.cancelled() and slow.begun == 1

    run(test)


def test_an_error_is_for_all_who_asked_and_the_next_is_read_again() -> None:
    answers = iter([None, 5])

    def read() -> int:
        found = next(answers)
        if found is None:
            raise ValueError("unreadable")
        return found

    async def inside() -> None:
        shared = Shared(read)
        first, second = (asyncio.create_task(shared.get()) for _ in range(2))
        for each in (first, second):
            with pytest.raises(ValueError, match="unreadable"):
                await each
        assert await shared.get() == 5

    asyncio.run(inside())
