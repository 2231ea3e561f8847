"""Sockets whose backend is no more: found in the maps and in their namespaces, then redirected or closed.

Connected datagram sockets go on without noticing where packet programs see what they send
(``datapath.services.redirects``). Others, and those of TCP, are closed: the application gets an error, and
connects again.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from functools import cache
from pathlib import Path

import msgspec

from ebpfproxy.config.datapath import StaleTcp
from ebpfproxy.datapath.abi import flow_layout, node_layout, socket_layout
from ebpfproxy.datapath.abi.flow_layout import BackendUse, Flow
from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.abi.socket_layout import Redirect
from ebpfproxy.datapath.flows.decision_reports import DecisionReports
from ebpfproxy.datapath.flows.origin_table import OriginTable
from ebpfproxy.datapath.flows.origins import stale_sockets
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.kernel.grace import Grace
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.netlink.namespaces import netlink_in
from ebpfproxy.netlink.routes import Routes
from ebpfproxy.netlink.sock_diag import Connected, Peer, end_sockets, find_sockets
from ebpfproxy.services.model import Protocol

#: Seconds before each search: a socket may be between its hook and its connection.
_PAUSES = (0.0, 0.05, 0.25)


class Ended(msgspec.Struct, frozen=True):
    """What became of the sockets of some removed backends. ``unseen`` were not found connected anywhere.

    They have lost their connection already, or are in a network namespace that this process cannot enter.
    """

    removed: Mapping[BackendUse, Removal]
    ended: Mapping[str, int]
    redirected: int
    unseen: int


def end_stale_sockets(
    maps: MapSet,
    grace: Grace,
    removed: Mapping[BackendUse, Removal],
    tcp: StaleTcp,
    *,
    is_current: Callable[[BackendUse, Removal], bool],
    has_frontend: Callable[[int, bytes, int], bool],
    losers: Container[int] | None,
    redirect: Callable[[dict[bytes, bytes]], None],
    reports: DecisionReports | None = None,
) -> Ended:
    """Redirects or closes them. It takes some time, and should run in a thread of its own.

    ``is_current``: says if a backend is still removed. ``has_frontend``: says if a service has a UDP frontend
    at an address and a port. ``losers``: services that may have lost frontends to another, or to nobody,
    whose backends may be well. ``redirect`` gets keys and values for ``sock_redirects``, and ``reports`` the
    sockets that are closed.
    """
    # After this, a connect() that chose before the change has stored its choice.
    grace.wait()
    ended: Counter[str] = Counter()
    handled: set[int] = set()
    unseen = redirected = 0
    for pause in _PAUSES:
        time.sleep(pause)
        found = stale_sockets(
            maps,
            removed,
            tcp,
            losers,
            is_current=is_current,
            has_frontend=has_frontend,
            rest=lambda: time.sleep(0),
        )
        stale = {Peer(each.address, each.port, each.protocol): cookies for each, cookies in found.items()}
        if left := _without(handled, stale):
            if made := _redirects(maps, left):
                packed = {key: socket_layout.pack_redirect(each) for key, each in made.items()}
                # Whoever has one may be found again: at each start, or since its backend is removed for good.
                table = maps["sock_redirects"]
                if new := {key: value for key, value in packed.items() if table.lookup(key) != value}:
                    redirect(new)
                handled |= {each.cookie for each in made.values()}
                redirected += len(new)
                left = _without(handled, left)
            closed = _close(maps, left, reports)
            for peer, cookies in left.items():
                ended[Protocol(peer.protocol).name] += len(cookies & closed)
            handled |= closed
        unseen = sum(len(cookies - handled) for cookies in stale.values())
        if not unseen:
            break
    return Ended(removed, dict(ended), redirected, unseen)


def _without(handled: set[int], sockets: Mapping[Peer, set[int]]) -> dict[Peer, set[int]]:
    """The sockets that are left, by cookie."""
    return {peer: cookies - handled for peer, cookies in sockets.items() if not cookies <= handled}


def _close(maps: MapSet, sockets: Mapping[Peer, set[int]], reports: DecisionReports | None) -> set[int]:
    """Closes those that are found, reports that, and returns their cookies."""
    if not sockets:
        return set()
    # Once a socket is closed it has no origin to be reported with.
    origins = _origins(maps, sockets) if reports is not None else {}
    closed = end_sockets(sockets)
    if reports is not None:
        for peer, cookies in sockets.items():
            reports.sockets_ended(
                (origins[each] for each in cookies & closed & origins.keys()), peer.protocol
            )
    return closed


def _redirects(maps: MapSet, stale: Mapping[Peer, set[int]]) -> dict[bytes, Redirect]:
    """The redirects of datagram sockets whose packets our programs see, by packed flow."""
    datagram = {peer: cookies for peer, cookies in stale.items() if peer.protocol == Protocol.UDP}
    found: dict[bytes, Redirect] = {}
    if not datagram:
        return found
    origins = OriginTable(maps)
    for each in _in_packets(maps, find_sockets(datagram)):
        origin = origins.of(each.cookie)
        peer = each.peer
        if origin is None or socket_layout.origin_backend(origin) != (peer.address, peer.port):
            continue
        flow = Flow(each.address, peer.address, each.port, peer.port, peer.protocol, egress=False)
        found[flow_layout.pack_flow(flow)] = Redirect(*socket_layout.origin_frontend(origin), each.cookie)
    return found


def _origins(maps: MapSet, sockets: Mapping[Peer, set[int]]) -> dict[int, bytes]:
    """Packed origins by cookie: a socket that is closed has none any more."""
    table = OriginTable(maps)
    cookies = (cookie for each in sockets.values() for cookie in each)
    return {cookie: origin for cookie in cookies if (origin := table.of(cookie)) is not None}


def peers_of(redirects: Mapping[bytes, bytes]) -> dict[Peer, set[int]]:
    """The sockets' cookies of entries of ``sock_redirects``, by what they are connected to."""
    found: dict[Peer, set[int]] = {}
    for key, value in redirects.items():
        flow = flow_layout.unpack_flow(key)
        peer = Peer(flow.destination, flow.destination_port, flow.protocol)
        found.setdefault(peer, set()).add(socket_layout.unpack_redirect(value).cookie)
    return found


def _in_packets(maps: MapSet, sockets: Iterable[Connected]) -> list[Connected]:
    """The sockets whose packets pass a device with our programs, wherever the backend's address is by then.

    Packets of a pod come from a local device, which is also the route to the pod. Packets of the host are
    seen where they leave it; what it sends to itself is not. On a bridge of pods the backend is a neighbour:
    packets go to its link address only, and nowhere once it is gone.
    """
    found: list[Connected] = []
    by_namespace: dict[Path, list[Connected]] = {}
    for each in sockets:
        by_namespace.setdefault(each.namespace, []).append(each)
    with Routes() as routes:
        device_to = cache(routes.device_to)
        for namespace, inside in by_namespace.items():
            try:
                own = Routes(netlink_in(namespace, socket.NETLINK_ROUTE))
            except OSError:
                # It is gone by now, and its sockets with it.
                continue
            with own:
                for each in inside:
                    ifindex = device_to(each.peer.address if each.is_here else each.address)
                    device = maps["devices"].lookup(U32.pack(ifindex)) if ifindex is not None else None
                    if device is None:
                        continue
                    is_local = node_layout.is_local_device(device)
                    is_seen = is_local or each.is_here
                    if is_seen and not (is_local and own.is_on_network(each.peer.address)):
                        found.append(each)
    return found
