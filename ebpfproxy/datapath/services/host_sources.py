"""The addresses by which this node itself asks at a frontend: source ranges are compared with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache


class HostSources:
    """The source addresses of this node's own connections, as routes say."""

    def __init__(self, source_towards: Callable[[bytes], bytes], primary: tuple[bytes, ...] = ()) -> None:
        """``source_towards``: the source address of this node's route to another, empty without a route.

        ``primary``: the node's own address of each family.
        """
        self._source_towards = source_towards
        self.primary = primary

    def towards(self, address: bytes) -> tuple[bytes, ...]:
        """If the address is this node's own, its primary ones count as source, as in kube-proxy."""
        source = self._source_towards(address)
        return self.primary if source == address else (source,)

    def cached(self) -> HostSources:
        """The same with a cache: an address has a frontend for each port and scope."""
        return HostSources(cache(self._source_towards), self.primary)
