"""Records of sockets in real maps, written by programs that the agent runs."""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ebpfproxy.config.datapath import Capacity, StaleTcp
from ebpfproxy.datapath.abi import socket_layout
from ebpfproxy.datapath.abi.flow_layout import (
    BackendUse,
    Flow,
    Nat,
    NatFlags,
    RemovalReason,
    Seen,
    pack_flow,
    pack_nat,
)
from ebpfproxy.datapath.abi.hooks import RECORDS
from ebpfproxy.datapath.abi.layout import (
    U32,
    U64,
    Scope,
    pack_address,
    pack_name,
    pack_service,
    pack_service_key,
)
from ebpfproxy.datapath.abi.socket_layout import ORIGIN, PEER, OriginKind, with_origin_ids
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.datapath.flows.origin_table import OriginTable, each_of
from ebpfproxy.datapath.flows.origins import stale_sockets
from ebpfproxy.datapath.flows.peers import recorded_removals
from ebpfproxy.datapath.flows.record_programs import RecordPrograms
from ebpfproxy.datapath.flows.removed_backends import Removal
from ebpfproxy.datapath.kernel import maps
from ebpfproxy.datapath.kernel.maps import MapSet
from ebpfproxy.datapath.programs import loader
from ebpfproxy.datapath.services.adopt import uses
from ebpfproxy.netlink import sock_diag
from ebpfproxy.services.model import Backend, BackendState, Family, Protocol, ServicePortKey
from tests.datapath.test_loading import OPTIONS
from tests.datapath.writing import set_load

pytestmark = pytest.mark.root

FRONTEND, OTHER_FRONTEND, BACKEND, OTHER_BACKEND = (
    bytes(a) for a in ((10, 96, 0, 1), (10, 96, 0, 2), (10, 244, 0, 1), (10, 244, 0, 2))
)
USE = BackendUse(3, 5)
COOKIE = 77


class Sockets:
    """Maps with a capacity of ``slots`` connected sockets, and the programs that write their records."""

    def __init__(self, pins: Path, stack: ExitStack, slots: int) -> None:
        self.maps: MapSet = maps.open_or_create(pins, Capacity(connected=slots))
        stack.callback(self.maps.close)
        folder = loader.ensure_loaded(self.maps, OPTIONS, (RECORDS,))
        self.programs = stack.enter_context(closing(RecordPrograms(folder)))

    def elsewhere(self, number: int) -> int:
        """Returns the number of records in other maps that the slot counts."""
        found = self.maps["sock_origin"].lookup(U32.pack(number))
        assert found
        return int(socket_layout.ORIGIN.unpack(found)[-1])

    def connected(self) -> list[tuple[int, bytes, bytes]]:
        """Returns cookie, frontend and backend of each connected socket."""
        return [
            (
                socket_layout.origin_cookie(origin),
                socket_layout.origin_frontend(origin)[0],
                socket_layout.origin_backend(origin)[0],
            )
            for origin in each_of(OriginTable(self.maps).connected())
        ]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def origin(
    frontend: bytes,
    backend: bytes,
    *,
    kind: OriginKind = OriginKind.CONNECTED,
    port: int = 53,
    cookie: int = COOKIE,
    began: int = 0,
) -> bytes:
    """Returns the packed origin of a socket."""
    ports = socket.htons(port), socket.htons(8053)
    peer = PEER.pack(pack_address(frontend), pack_address(backend), *ports, *USE, began)
    key = int.from_bytes(socket_layout.origin_key(cookie, kind), sys.byteorder)
    return ORIGIN.pack(key, peer, 1, 0)


@pytest.mark.parametrize(
    "again",
    [origin(OTHER_FRONTEND, BACKEND), origin(FRONTEND, OTHER_BACKEND), origin(OTHER_FRONTEND, OTHER_BACKEND)],
    ids=["frontend", "backend", "both"],
)
def test_socket_that_reconnects_during_map_migration_keeps_its_last_peer(
    pins: Path, stack: ExitStack, again: bytes
) -> None:
    old, new = Sockets(pins, stack, 64), Sockets(pins, stack, 128)
    first = origin(FRONTEND, BACKEND)
    assert old.programs.restore([first]) == 1
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.copy()
    assert new.connected() == old.connected() == [(COOKIE, FRONTEND, BACKEND)]
    assert (old.programs.forget([first]), old.programs.restore([again])) == (1, 1)
    migration.copy()
    assert new.connected() == old.connected() != [(COOKIE, FRONTEND, BACKEND)]
    assert old.programs.forget([again]) == 1
    migration.copy()
    assert new.connected() == []


@pytest.mark.parametrize(("is_there", "kept"), [(True, 1234), (False, 0)], ids=["there", "gone"])
def test_map_migration_keeps_following_connections_of_services_that_are_there(
    pins: Path, stack: ExitStack, is_there: bool, kept: int
) -> None:
    old, new = Sockets(pins, stack, 64), Sockets(pins, stack, 128)
    name = ServicePortKey("shop", "web", "http", Protocol.TCP, Family.IPV4)
    old.maps["service_names"].update(U32.pack(USE.service_id), pack_name(name))
    if is_there:
        new.maps["service_names"].update(U32.pack(6), pack_name(name))
    assert old.programs.restore([origin(FRONTEND, BACKEND, began=1234)]) == 1
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.copy()
    (copied,) = each_of(OriginTable(new.maps).connected())
    assert socket_layout.origin_began(copied) == kept


def test_a_closed_socket_in_the_overflow_is_removed_as_a_closed_one_alone(
    pins: Path, stack: ExitStack
) -> None:
    here = Sockets(pins, stack, 4)
    first, second = (origin(FRONTEND, BACKEND, cookie=cookie, began=4) for cookie in (1, 5))
    assert here.programs.restore([first, second]) == 2
    closed = origin(FRONTEND, BACKEND, cookie=5, kind=OriginKind.CLOSED, began=4)
    here.maps["sock_origin_overflow"].update(U64.pack(5), closed)
    assert here.programs.forget([second]) == 0
    assert here.elsewhere(1) == 1
    assert here.programs.forget([closed]) == 1
    assert here.elsewhere(1) == 0


@pytest.mark.parametrize(("port", "found"), [(53, {USE}), (0, set())], ids=["kept", "dropped"])
def test_dropped_peer_does_not_delay_the_removal_of_its_backend(
    pins: Path, stack: ExitStack, port: int, found: set[BackendUse]
) -> None:
    """A program drops the peer of a removed backend if the Service has no other backend."""
    here = Sockets(pins, stack, 64)
    assert here.programs.restore([origin(FRONTEND, BACKEND, kind=OriginKind.UNCONNECTED, port=port)]) == 1
    assert recorded_removals(here.maps, {USE}) == found


def test_a_slot_counts_the_records_that_other_maps_have(pins: Path, stack: ExitStack) -> None:
    """Once they are gone, sockets with this slot pay for no other map again."""
    here = Sockets(pins, stack, 4)
    known = [origin(FRONTEND, BACKEND, cookie=cookie) for cookie in (1, 5, 9)]
    sender = [
        origin(each, BACKEND, cookie=13, kind=OriginKind.UNCONNECTED) for each in (FRONTEND, OTHER_FRONTEND)
    ]
    assert here.programs.restore(known) == 3
    assert here.elsewhere(1) == 2
    assert here.programs.restore(known) == 0
    assert here.programs.restore(sender) == 2
    # Both frontends are in one page.
    assert here.elsewhere(1) == 3
    assert [here.elsewhere(number) for number in (0, 2, 3)] == [0, 0, 0]
    assert here.programs.forget(known[:2]) == 2
    assert here.elsewhere(1) == 2
    assert here.programs.forget_pages(sender[:1]) == 1
    assert here.programs.forget_pages(sender[:1]) == 0
    assert here.elsewhere(1) == 1
    assert here.programs.forget(known) == 1
    assert here.elsewhere(1) == 0


def test_a_cookie_that_the_kernel_counts_down_loses_its_highest_byte() -> None:
    packed = (0xFFFFFFFFFFFFFFFE).to_bytes(8, sys.byteorder)
    name = bytes(40) + packed
    kind = OriginKind.CONNECTED
    assert sock_diag._cookie(name) == socket_layout.origin_cookie(packed) == 0x00FFFFFFFFFFFFFE
    assert socket_layout.is_connected(socket_layout.origin_key(sock_diag._cookie(name), kind))


def _with_a_datagram_socket(
    pins: Path, stack: ExitStack
) -> tuple[Sockets, Backend, dict[BackendUse, Removal]]:
    """A connected one, its backend, and that one's removal."""
    sockets = Sockets(pins, stack, 64)
    backend = Backend(BACKEND, 8053, Protocol.UDP)
    sockets.maps.backends().write(USE.backend_id, backend, BackendState.ACTIVE)
    assert sockets.programs.restore([origin(FRONTEND, BACKEND)]) == 1
    set_load(sockets.maps, USE.backend_id, sockets_opened=1)
    return sockets, backend, {USE: Removal(RemovalReason.IDLE, 0)}


@pytest.mark.parametrize("is_removed", [True, False])
def test_sockets_whose_backend_has_come_back_are_not_stale(
    pins: Path, stack: ExitStack, *, is_removed: bool
) -> None:
    """They may have connected since then."""
    sockets, backend, removed = _with_a_datagram_socket(pins, stack)
    asked: list[tuple[BackendUse, Removal]] = []

    def is_current(use: BackendUse, removal: Removal) -> bool:
        asked.append((use, removal))
        return is_removed

    found = stale_sockets(
        sockets.maps, removed, StaleTcp.GONE, is_current=is_current, has_frontend=_never_asked
    )
    assert asked == [*removed.items()]
    assert found == ({backend: {COOKIE}} if is_removed else {})


def test_start_finds_what_flows_and_all_kinds_of_sockets_use(pins: Path, stack: ExitStack) -> None:
    sockets = Sockets(pins, stack, 64)
    kinds = [OriginKind.CONNECTED, *[OriginKind.UNCONNECTED] * 3]
    used = [BackendUse(3, number) for number in range(6)]
    for cookie, (kind, use) in enumerate(zip(kinds, used, strict=False)):
        # All unconnected ones are the same socket, whose later records are in another map.
        number = COOKIE + (0 if kind is OriginKind.UNCONNECTED else 64)
        record = origin(bytes((10, 96, 0, cookie)), BACKEND, kind=kind, cookie=number)
        assert sockets.programs.restore([with_origin_ids(record, use, 0)]) == 1
    for port, use in enumerate(used[len(kinds) :]):
        key = pack_flow(Flow(FRONTEND, BACKEND, port, 80, Protocol.UDP, False))
        nat = Nat(FRONTEND, BACKEND, port, 80, *use, NatFlags(0), Seen(0), 1, 1)
        sockets.maps["conntrack"].update(key, pack_nat(key, nat))
    assert uses(sockets.maps) == set(used)


_FRONTEND6, _BACKEND6 = (bytes.fromhex(f"fd0000100096{n:020x}") for n in (1, 2))
_KINDS = {
    "cluster IP": (FRONTEND, BACKEND, FRONTEND),
    "IPv6": (_FRONTEND6, _BACKEND6, _FRONTEND6),
    "NodePort": (FRONTEND, BACKEND, bytes(4)),
    "NodePort with IPv6": (_FRONTEND6, _BACKEND6, bytes(16)),
}


@pytest.mark.parametrize("when", [1, 2], ids=["before", "after"])
@pytest.mark.parametrize("owner", [USE.service_id, 4, None], ids=["back", "moved", "removed"])
@pytest.mark.parametrize("kind", _KINDS)
def test_sockets_whose_frontend_is_their_services_again_are_not_stale(
    pins: Path, stack: ExitStack, kind: str, owner: int | None, when: int
) -> None:
    """A search is for services, and whether they have a frontend is read when it has found sockets.

    It looks for frontends that are lost, then for their sockets; ``when``: at which of both it is back.
    """
    frontend, address, key = _KINDS[kind]
    sockets = Sockets(pins, stack, 64)
    table = "services4" if len(key) == 4 else "services6"
    rests = itertools.count(1)

    def assign() -> None:
        """While sockets are searched for."""
        if owner is not None and next(rests) == when:
            sockets.maps[table].update(
                pack_service_key(key, 53, Protocol.UDP, Scope.INTERNAL), pack_service(owner, 0, 0, 0, 0)
            )

    backend = Backend(address, 8053, Protocol.UDP)
    sockets.maps.backends().write(USE.backend_id, backend, BackendState.ACTIVE)
    assert sockets.programs.restore([origin(frontend, address)]) == 1
    stale = {} if owner == USE.service_id else {backend: {COOKIE}}
    for losers, found in (({USE.service_id}, stale), (range(16), stale), ({4}, {}), (None, {})):
        rests = itertools.count(1)
        sockets.maps[table].delete_many(list(sockets.maps[table].keys()))
        asked = stale_sockets(
            sockets.maps,
            {},
            StaleTcp.GONE,
            losers,
            is_current=_never_asked,
            has_frontend=_is_unknown,
            rest=assign,
        )
        assert asked == found


def test_sockets_are_not_looked_at_one_by_one_where_no_frontend_is_lost(pins: Path, stack: ExitStack) -> None:
    """A start asks for all services, while very many sockets may be open."""
    sockets = Sockets(pins, stack, 64)
    sockets.maps.backends().write(USE.backend_id, Backend(BACKEND, 8053, Protocol.UDP), BackendState.ACTIVE)
    assert sockets.programs.restore(origin(FRONTEND, BACKEND, cookie=n) for n in range(1, 33)) == 32
    asked: list[tuple[int, bytes, int]] = []

    def has_frontend(*what: Any) -> bool:
        asked.append(what)
        return True

    with patch.object(socket_layout, "origin_cookie", side_effect=_never_asked):
        found = stale_sockets(
            sockets.maps, {}, StaleTcp.GONE, range(16), is_current=_never_asked, has_frontend=has_frontend
        )
    assert (found, asked) == ({}, [(USE.service_id, FRONTEND, 53)])


def _never_asked(*_: object) -> bool:
    raise AssertionError("nothing was removed")


def _is_unknown(_service_id: int, _address: bytes, _port: int) -> bool:
    return False


def test_tcp_sockets_stay_whoever_has_their_frontend(pins: Path, stack: ExitStack) -> None:
    """As connections do in netfilter, until their backend is removed."""
    sockets = Sockets(pins, stack, 64)
    backend = Backend(BACKEND, 8053, Protocol.TCP)
    sockets.maps.backends().write(USE.backend_id, backend, BackendState.ACTIVE)
    assert sockets.programs.restore([origin(FRONTEND, BACKEND)]) == 1
    found = stale_sockets(
        sockets.maps, {}, StaleTcp.GONE, range(16), is_current=_never_asked, has_frontend=_is_unknown
    )
    assert found == {}


def test_socket_that_has_lost_its_frontend_is_stale_though_its_backend_has_come_back(
    pins: Path, stack: ExitStack
) -> None:
    sockets, backend, removed = _with_a_datagram_socket(pins, stack)
    found = stale_sockets(
        sockets.maps,
        removed,
        StaleTcp.GONE,
        {USE.service_id},
        is_current=lambda _use, _removal: False,
        has_frontend=_is_unknown,
    )
    assert found == {backend: {COOKIE}}
