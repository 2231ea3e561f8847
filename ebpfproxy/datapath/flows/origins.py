"""Connected sockets and their backends: which of them have lost theirs."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import cache
from typing import NamedTuple

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi import layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, RemovalReason
from ebpfproxy.datapath.abi.layout import NOBODY, Scope
from ebpfproxy.datapath.abi.socket_layout import DATAGRAM_NOBODY
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Backend, Protocol


def _ends_connections(tcp: StaleTcp, why: RemovalReason) -> bool:
    """An endpoint that is only absent may come back: no connection ends because of that."""
    if why is RemovalReason.GONE:
        return tcp is not StaleTcp.NEVER
    return tcp is StaleTcp.UNREADY and why is RemovalReason.IDLE


#: Sockets' cookies by backend.
_Sockets = dict[Backend, set[int]]


class _Frontend(NamedTuple):
    """What a socket asked for, and the service that it was of."""

    service_id: int
    address: bytes
    port: int


def stale_sockets(
    maps: MapSet,
    removed: Mapping[BackendUse, Removal],
    tcp: StaleTcp,
    losers: Container[int] | None = None,
    *,
    is_current: Callable[[BackendUse, Removal], bool],
    has_frontend: Callable[[int, bytes, int], bool],
    rest: Callable[[], None] = lambda: None,
) -> dict[Backend, set[int]]:
    """Cookies of the sockets that were translated to backends which their service has lost, by backend.

    Datagram sockets are among them whatever ``tcp`` says: they have no connection to lose, and would send to
    nobody; so are those whose frontend is not their service's now, or whose backend has no id: neither was
    there any more when they were copied from maps of another size. ``losers``: the ids of services that may
    have lost a frontend. ``is_current``: says if a backend is still removed; sockets may have chosen one that
    has come back. ``has_frontend``: says if a service has a UDP frontend at an address and a port. ``rest``
    is called between batches.
    """
    wanted = _with_sockets(maps, removed, tcp)
    found: _Sockets = {}
    if not wanted and losers is None:
        return found
    of_removed: dict[BackendUse, _Sockets] = {}
    of_losers: dict[_Frontend, _Sockets] = {}
    backends = maps.backends()

    @cache
    def is_datagram(number: int) -> bool:
        known = backends.read(number)
        return number == DATAGRAM_NOBODY or (known is not None and known[0].protocol is Protocol.UDP)

    for origins in OriginTable(maps).connected(rest):
        for place, use in enumerate(socket_layout.origin_uses(origins)):
            is_loser = losers is not None and use[0] in losers and is_datagram(use[1])
            protocol = Protocol.UDP if is_loser else wanted.get(use)
            if protocol is None:
                continue
            origin = origins[place * socket_layout.ORIGIN.size :][: socket_layout.ORIGIN.size]
            backend = Backend(*socket_layout.origin_backend(origin), protocol)
            cookie = socket_layout.origin_cookie(origin)
            if use in wanted:
                of_removed.setdefault(BackendUse(*use), {}).setdefault(backend, set()).add(cookie)
            if is_loser:
                owner = NOBODY if use[1] == DATAGRAM_NOBODY else use[0]
                frontend = _Frontend(owner, *socket_layout.origin_frontend(origin))
                of_losers.setdefault(frontend, {}).setdefault(backend, set()).add(cookie)
    # Those that have been found chose before these questions.
    stale = [sockets for use, sockets in of_removed.items() if is_current(use, removed[use])]
    stale += [
        sockets
        for frontend, sockets in of_losers.items()
        # Somebody else may have deleted it from the map; a moment after it is there it is known, too.
        if not has_frontend(*frontend) and not _is_stored(maps, frontend)
    ]
    for sockets in stale:
        for backend, cookies in sockets.items():
            found.setdefault(backend, set()).update(cookies)
    return found


def _is_stored(maps: MapSet, frontend: _Frontend) -> bool:
    """Says if the map has the UDP frontend of the service. A NodePort's address is unspecified."""
    service_id, address, port = frontend
    table = maps["services4" if len(address) == 4 else "services6"]
    keys = (
        layout.pack_service_key(each, port, Protocol.UDP, Scope.INTERNAL)
        for each in (address, bytes(len(address)))
    )
    return any(
        entry is not None and service_id == layout.service_id(entry) for entry in map(table.lookup, keys)
    )


def _with_sockets(
    maps: MapSet, removed: Mapping[BackendUse, Removal], tcp: StaleTcp
) -> dict[tuple[int, int], Protocol]:
    """The removals whose backend has open sockets that have to end, with the backend's protocol."""
    backends, loads = maps.backends(), maps.loads()
    found: dict[tuple[int, int], Protocol] = {}
    for use, removal in removed.items():
        known = backends.read(use.backend_id)
        if known is None or not loads[use.backend_id].open_sockets:
            continue
        protocol = known[0].protocol
        if protocol is not Protocol.TCP or _ends_connections(tcp, removal.why):
            found[use] = protocol
    return found
