"""Warnings that last, each given once."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from ebpfproxy.services.values import Warning


class Warnings:
    """The warnings about each object, and those that have not been taken yet."""

    def __init__(self) -> None:
        self._known: dict[Hashable, frozenset[Warning]] = {}
        self._new: list[Warning] = []

    def __bool__(self) -> bool:
        return bool(self._new)

    def set(self, about: Hashable, warnings: Collection[Warning]) -> None:
        """Sets all warnings about something; those that were not there before are new."""
        if not warnings and about not in self._known:
            return
        now = frozenset(warnings)
        before = self._known.pop(about, frozenset())
        if now:
            self._known[about] = now
            self._new += sorted(now - before, key=str)

    def take_new(self) -> tuple[Warning, ...]:
        taken, self._new = tuple(self._new), []
        return taken
