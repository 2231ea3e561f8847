"""Connected sockets and their backends: which of them have lost theirs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi import flow_layout, layout
from ebpfproxy.datapath.abi.flow_layout import Departure
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.flows.removed_backends import Departed
from ebpfproxy.datapath.kernel import bpf
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.services.model import Backend, Protocol

_COOKIE = struct.Struct("=Q")
#: Entries a system call. Small: a batch in Python holds up the reconciler's thread.
_BATCH = 1024


def _ends_connections(tcp: StaleTcp, why: Departure) -> bool:
    """An endpoint that is only absent may come back: no connection ends for that."""
    if why is Departure.GONE:
        return tcp is not StaleTcp.NEVER
    return tcp is StaleTcp.UNREADY and why is Departure.IDLE


class LostFrontend(NamedTuple):
    """A UDP frontend that a service had. A NodePort's address is unspecified: it is any of the node's."""

    service_id: int
    address: bytes
    port: int


_NODE_PORTS = (bytes(4), bytes(16))


def stale_sockets(
    maps: MapSet,
    departures: Mapping[bytes, Departed],
    tcp: StaleTcp,
    lost: Collection[LostFrontend] = (),
    *,
    rest: Callable[[], None] = lambda: None,
) -> dict[Backend, set[int]]:
    """Cookies of the sockets that were translated to backends which have departed from their service.

    Also those of datagram sockets whose frontend their service has ``lost``.
    Datagram sockets in any case: they have no connection to lose, and would be sending to nobody.
    ``departures`` by packed key; ``rest`` is called between batches.
    """
    wanted = _with_sockets(maps, departures, tcp)
    found: dict[Backend, set[int]] = {}
    losers = {U32.pack(each.service_id) for each in lost}
    if not wanted and not losers:
        return found
    origins = maps["sock_origin"]
    key_size, value_size = origins.spec.key_size, origins.spec.value_size
    ids_at = flow_layout.ORIGIN_IDS_AT
    for keys, values, count in bpf.map_lookup_batches(origins.fd, key_size, value_size, _BATCH):
        for i in range(count):
            at = i * value_size
            ids = bytes(values[at + ids_at : at + ids_at + 8])
            protocol = wanted.get(ids)
            if protocol is None and ids[:4] in losers and _has_lost(values[at : at + value_size], lost):
                protocol = Protocol.UDP
            if protocol is not None:
                address, port = flow_layout.origin_backend(bytes(values[at : at + value_size]))
                (cookie,) = _COOKIE.unpack_from(keys, i * key_size)
                found.setdefault(Backend(address, port, protocol), set()).add(cookie)
        rest()
    return found


def _has_lost(origin: memoryview, lost: Collection[LostFrontend]) -> bool:
    service_id, _ = flow_layout.origin_ids(bytes(origin))
    address, port = flow_layout.origin_frontend(bytes(origin))
    return any(LostFrontend(service_id, each, port) in lost for each in (address, *_NODE_PORTS))


def _with_sockets(maps: MapSet, departures: Mapping[bytes, Departed], tcp: StaleTcp) -> dict[bytes, Protocol]:
    """The departures whose sockets are to be ended, if the backend has any: with its protocol."""
    backends, loads = maps.shared("backends"), maps.shared("loads").bytes.cast("I")
    found: dict[bytes, Protocol] = {}
    for key, departed in departures.items():
        _, number = flow_layout.unpack_departure(key)
        start = number * backends.stride
        known = layout.unpack_backend(bytes(backends.bytes[start : start + layout.BACKEND_SIZE]))
        load = layout.load_of(loads[number * layout.LOAD_WORDS : (number + 1) * layout.LOAD_WORDS])
        if known is None or not load.open_sockets:
            continue
        protocol = known[0].protocol
        if protocol is not Protocol.TCP or _ends_connections(tcp, departed.why):
            found[key] = protocol
    return found
