"""Connected sockets and their backends: which of them have lost theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi import socket_layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, RemovalReason
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Backend, Protocol


def _ends_connections(tcp: StaleTcp, why: RemovalReason) -> bool:
    """An endpoint that is only absent may come back: no connection ends because of that."""
    if why is RemovalReason.GONE:
        return tcp is not StaleTcp.NEVER
    return tcp is StaleTcp.UNREADY and why is RemovalReason.IDLE


class LostFrontend(NamedTuple):
    """A UDP frontend that a service had. A NodePort's address is unspecified: it is any of the node's."""

    service_id: int
    address: bytes
    port: int


_NODE_PORTS = (bytes(4), bytes(16))


def stale_sockets(
    maps: MapSet,
    removed: Mapping[BackendUse, Removal],
    tcp: StaleTcp,
    lost: Collection[LostFrontend] = (),
    *,
    is_current: Callable[[BackendUse, Removal], bool],
    rest: Callable[[], None] = lambda: None,
) -> dict[Backend, set[int]]:
    """Cookies of the sockets that were translated to backends which their service has lost, by backend.

    Datagram sockets are among them whatever ``tcp`` says: they have no connection to lose, and would send to
    nobody; so are those whose frontend their service has ``lost``. ``is_current``: says if a backend is still
    removed; sockets may have chosen one that has come back. ``rest`` is called between batches.
    """
    wanted = _with_sockets(maps, removed, tcp)
    found: dict[Backend, set[int]] = {}
    of_removed: dict[BackendUse, dict[Backend, set[int]]] = {}
    losers = {each.service_id for each in lost}
    if not wanted and not losers:
        return found
    for origins in OriginTable(maps).connected(rest):
        for place, use in enumerate(socket_layout.origin_uses(origins)):
            protocol = wanted.get(use)
            if protocol is None and use[0] not in losers:
                continue
            origin = origins[place * socket_layout.ORIGIN.size :][: socket_layout.ORIGIN.size]
            if protocol is not None:
                sockets = of_removed.setdefault(BackendUse(*use), {})
            elif _has_lost(use[0], origin, lost):
                protocol, sockets = Protocol.UDP, found
            else:
                continue
            backend = Backend(*socket_layout.origin_backend(origin), protocol)
            sockets.setdefault(backend, set()).add(socket_layout.origin_cookie(origin))
    # Those that have been found chose a backend before this question.
    for each, sockets in of_removed.items():
        for backend, cookies in sockets.items() if is_current(each, removed[each]) else ():
            found.setdefault(backend, set()).update(cookies)
    return found


def _has_lost(service_id: int, origin: bytes, lost: Collection[LostFrontend]) -> bool:
    address, port = socket_layout.origin_frontend(origin)
    return any(LostFrontend(service_id, each, port) in lost for each in (address, *_NODE_PORTS))


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
