"""Connected sockets and their backends: which of them have lost theirs."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi import layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, RemovalReason
from ebpfproxy.datapath.abi.layout import Scope, unpack_address
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
#: Address and port that a socket asked for.
_Frontend = tuple[bytes, int]


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
    lost: dict[tuple[int, int], set[_Frontend]] = {}

    def is_served(use: tuple[int, int], frontend: _Frontend) -> bool:
        service_id, backend_id = use
        if backend_id == DATAGRAM_NOBODY:
            return False
        # Somebody else may have deleted it from the map; a moment after it is there it is known, too.
        return has_frontend(service_id, *frontend) or _is_stored(maps, service_id, *frontend)

    if losers is not None:
        # Sockets are kept only if there are some of a lost frontend: there may be very many.
        for use, frontend in _asked(maps, losers, rest):
            if not is_served(use, frontend):
                lost.setdefault(use, set()).add(frontend)
    found: _Sockets = {}
    if not wanted and not lost:
        return found
    of_removed: dict[BackendUse, _Sockets] = {}
    of_lost: dict[tuple[BackendUse, _Frontend], _Sockets] = {}
    for origins in OriginTable(maps).connected(rest):
        for place, pair in enumerate(socket_layout.origin_uses(origins)):
            protocol, frontends = wanted.get(pair), lost.get(pair)
            if protocol is None and frontends is None:
                continue
            origin = origins[place * socket_layout.ORIGIN.size :][: socket_layout.ORIGIN.size]
            frontend = socket_layout.origin_frontend(origin)
            backend = Backend(*socket_layout.origin_backend(origin), protocol or Protocol.UDP)
            cookie = socket_layout.origin_cookie(origin)
            use = BackendUse(*pair)
            if protocol is not None:
                of_removed.setdefault(use, {}).setdefault(backend, set()).add(cookie)
            if frontends is not None and frontend in frontends:
                of_lost.setdefault((use, frontend), {}).setdefault(backend, set()).add(cookie)
    # Those that have been found chose before these questions.
    stale = [sockets for use, sockets in of_removed.items() if is_current(use, removed[use])]
    stale += [sockets for asked, sockets in of_lost.items() if not is_served(*asked)]
    for sockets in stale:
        for backend, cookies in sockets.items():
            found.setdefault(backend, set()).update(cookies)
    return found


def _asked(
    maps: MapSet, services: Container[int], rest: Callable[[], None]
) -> Iterator[tuple[tuple[int, int], _Frontend]]:
    """What connected datagram sockets of these services use, and the frontends that they asked for."""
    backends = maps.backends()

    @cache
    def is_datagram(number: int) -> bool:
        known = backends.read(number)
        return number == DATAGRAM_NOBODY or (known is not None and known[0].protocol is Protocol.UDP)

    # A set of packed ones takes a tenth of the time.
    found: set[tuple[bytes, bytes, int, int]] = set()
    for origins in OriginTable(maps).connected(rest):
        packed = socket_layout.origin_frontends(origins)
        found.update(each for each in packed if each[2] in services and is_datagram(each[3]))
    for address, port, *use in found:
        yield (use[0], use[1]), (unpack_address(address), int.from_bytes(port, "big"))


def _is_stored(maps: MapSet, service_id: int, address: bytes, port: int) -> bool:
    """Says if the map has a UDP frontend of the service. A NodePort's address is unspecified."""
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
