"""The EndpointSlices that are known, by the Service that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Set

from ebpfproxy.kube.objects import ObjectKey
from ebpfproxy.services.endpoints import SliceEndpoints


class Slices:
    """An index of slices. The order of a Service's slices has no meaning."""

    def __init__(self) -> None:
        self._slices: dict[ObjectKey, SliceEndpoints] = {}
        self._of: dict[ObjectKey, tuple[ObjectKey, ...]] = {}

    def keys(self) -> Set[ObjectKey]:
        return self._slices.keys()

    def all(self) -> list[SliceEndpoints]:
        return list(self._slices.values())

    def of(self, service: ObjectKey) -> list[SliceEndpoints]:
        return [self._slices[key] for key in self._of.get(service, ())]

    def set(self, key: ObjectKey, new: SliceEndpoints | None) -> tuple[ObjectKey | None, ObjectKey | None]:
        """Replaces a slice, or removes it (None); returns the Services that it belonged and belongs to.

        Both are None where nothing changes but the trigger.
        """
        old = self._slices.get(key)
        if old is None or new is None:
            if old is new:
                return None, None
        elif old.same_as(new):
            return None, None
        if new is None:
            del self._slices[key]
        else:
            self._slices[key] = new
        before = old.service if old is not None else None
        after = new.service if new is not None else None
        if before != after:
            self._move(key, before, after)
        return before, after

    def _move(self, key: ObjectKey, before: ObjectKey | None, after: ObjectKey | None) -> None:
        if before is not None:
            left = tuple(each for each in self._of.pop(before) if each != key)
            if left:
                self._of[before] = left
        if after is not None:
            self._of[after] = (*self._of.get(after, ()), key)

    def services_with(self, addresses: Set[bytes]) -> Iterator[ObjectKey]:
        """The Services that have any of these as an endpoint, some of them more than once."""
        for piece in self._slices.values():
            if piece.service is not None and not addresses.isdisjoint(piece.addresses):
                yield piece.service

    def has_endpoint(self, address: bytes, port: int) -> bool:
        """True if any slice has it; port 0: any port."""
        return any(
            address in piece.addresses and (not port or any(p.port == port for p in piece.ports))
            for piece in self._slices.values()
        )
