"""Connected datagram sockets whose backend is gone: their packets are sent to the frontend again.

The kernel cannot give another process's socket a new peer. One that is closed (SOCK_DESTROY) has no peer, and
fails to send for ever (EDESTADDRREQ) unless the application connects again, which many do not. So the socket
stays as it is, and packet programs translate what it sends to the old backend as if it had been sent to the
frontend; while that has no backend, the sender gets an ICMP error. Replies come from the old backend's
address, which the socket takes for the frontend's.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from ebpfproxy.datapath.abi import flow_layout, socket_layout
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.services.frontend_table import Frontends


class Redirects:
    """The only writer of ``sock_redirects``. One thread uses it."""

    def __init__(self, maps: MapSet, frontends: Frontends) -> None:
        self._map = maps["sock_redirects"]
        self._origins = OriginTable(maps)
        self._frontends = frontends
        #: Addresses and ports of backends, by map key: the filters let programs see packets to them.
        self._watched: dict[bytes, tuple[bytes, int]] = {}
        self.adopt()

    def adopt(self) -> None:
        """Reads what is in the map: at a start, and when flows of other maps have been copied."""
        self._watch({key for key, _ in self._map.items()})

    def _watch(self, keys: Set[bytes]) -> None:
        for key in keys - self._watched.keys():
            flow = flow_layout.unpack_flow(key)
            self._watched[key] = flow.destination, flow.destination_port
            self._frontends.watch(*self._watched[key])

    def add(self, wanted: Mapping[bytes, bytes]) -> set[bytes]:
        """Adds packed keys and values. Returns the keys for which there was no room."""
        # The filters learn first: packets that they let pass would go to the old backend.
        self._watch(wanted.keys())
        refused = set(self._map.update_many(wanted))
        self._unwatch(refused)
        return refused

    def _unwatch(self, keys: Set[bytes]) -> None:
        for key in keys:
            self._frontends.unwatch(*self._watched.pop(key))

    def sweep(self) -> None:
        """Deletes those whose socket is closed, or connected to something else by now."""
        over = set()
        for key, value in self._map.items():
            cookie = socket_layout.unpack_redirect(value).cookie
            origin = self._origins.of(cookie)
            flow = flow_layout.unpack_flow(key)
            if origin is None or socket_layout.origin_backend(origin) != (
                flow.destination,
                flow.destination_port,
            ):
                over.add(key)
        if over:
            self._map.delete_many(list(over))
            self._unwatch(over & self._watched.keys())
