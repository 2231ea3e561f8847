"""Small stable numbers for things with a longer identity: service ports, backends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from itertools import chain
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class IdsExhaustedError(Exception):
    """Every id is in use."""


class Ids(Generic[K]):
    """Ids below ``size``. One that returns is given out again after all others that are free."""

    def __init__(self, size: int, known: dict[K, int] | None = None, resting: Iterable[int] = ()) -> None:
        """``known`` becomes part of this. ``resting`` are taken, but belong to no key: :meth:`give_back`
        returns them."""
        self._size = size
        self._ids: dict[K, int] = {} if known is None else known
        #: The id of a key, None if it has none; the id of one that has.
        self.get: Callable[[K], int | None] = self._ids.get
        self.of: Callable[[K], int] = self._ids.__getitem__
        is_used = bytearray(size)
        for number in chain(self._ids.values(), resting):
            is_used[number] = True
        self._fresh = is_used.rfind(True) + 1
        self._returned = deque(i for i in range(self._fresh) if not is_used[i])

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def recycles(self) -> bool:
        """True once ids have been used before."""
        return self._fresh >= self._size

    @property
    def end(self) -> int:
        """One more than the highest id ever given out."""
        return self._fresh

    def add(self, key: K, held: Container[int] = ()) -> int:
        """A new id for a key that has none, if possible none that is held. Raises IdsExhaustedError."""
        number = self._take(held)
        self._ids[key] = number
        return number

    def add_all(self, keys: Sequence[K]) -> Sequence[int]:
        """New ids for keys that have none, or for none of them. Raises IdsExhaustedError."""
        first, after = self._fresh, self._fresh + len(keys)
        numbers: Sequence[int]
        if after <= self._size:
            self._fresh = after
            numbers = range(first, after)
        elif after <= self._size + len(self._returned):
            numbers = [self._take(()) for _ in keys]
        else:
            raise self._exhausted()
        self._ids.update(zip(keys, numbers, strict=True))
        return numbers

    def has_fresh(self, count: int) -> bool:
        """True if so many ids were never given out."""
        return self._fresh + count <= self._size

    def add_missing(self, keys: Iterable[K]) -> tuple[int, list[K]]:
        """Gives ids that were never given out, in a row, to those keys that have none.

        There have to be as many as keys (:meth:`has_fresh`). Returns the first of the ids, and the keys that
        have them, in their order.
        """
        first = number = self._fresh
        added: list[K] = []
        setdefault = self._ids.setdefault
        for key in keys:
            if setdefault(key, number) == number:
                added.append(key)
                number += 1
        self._fresh = number
        return first, added

    def _take(self, held: Container[int]) -> int:
        while self._fresh < self._size:
            number = self._fresh
            self._fresh += 1
            if number not in held:
                return number
            self._returned.append(number)
        for _ in range(len(self._returned)):
            if self._returned[0] not in held:
                break
            self._returned.rotate(-1)
        if not self._returned:
            raise self._exhausted()
        return self._returned.popleft()

    def _exhausted(self) -> IdsExhaustedError:
        return IdsExhaustedError(f"all {self._size} ids are in use")

    def forget(self, key: K) -> int:
        """Removes a key. Returns its id, which stays taken until :meth:`give_back`."""
        return self._ids.pop(key)

    def give_back(self, number: int) -> None:
        self._returned.append(number)

    def items(self) -> list[tuple[K, int]]:
        return list(self._ids.items())

    def numbers(self) -> list[int]:
        """The ids of all keys."""
        return list(self._ids.values())
