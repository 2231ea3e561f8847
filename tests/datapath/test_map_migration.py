"""What is copied to maps of other sizes, entry by entry; whole flows are in tests/e2e/test_outside.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ebpfproxy.datapath.abi import flow_layout
from ebpfproxy.datapath.abi.flow_layout import AFFINITY, AffinityKey, ClientKind
from ebpfproxy.datapath.abi.layout import U32, pack_name
from ebpfproxy.datapath.flows.map_migration import MapMigration
from ebpfproxy.services.model import Backend, BackendState, Family, Protocol, ServicePortKey
from tests.datapath.test_socket_records import Sockets

pytestmark = pytest.mark.root

CLIENT = bytes((10, 244, 1, 7))
WEB, SHOP = (ServicePortKey("shop", name, "http", Protocol.TCP, Family.IPV4) for name in ("web", "shop"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def _affinity(sockets: Sockets, service: int) -> int | None:
    key = flow_layout.pack_affinity_key(AffinityKey(CLIENT, service, ClientKind.ADDRESS))
    found = sockets.maps["affinity"].lookup(key)
    return None if found is None else flow_layout.unpack_affinity(found)[0]


def _set_affinity(sockets: Sockets, service: int, backend: int) -> None:
    key = flow_layout.pack_affinity_key(AffinityKey(CLIENT, service, ClientKind.ADDRESS))
    sockets.maps["affinity"].update(key, AFFINITY.pack(backend, 0, 1))


def test_affinity_is_copied_whatever_service_has_the_same_id_in_the_new_maps(
    pins: Path, stack: ExitStack
) -> None:
    """Two Services whose ids are exchanged in the new maps, and a client that has asked one there already."""
    old, new = Sockets(pins, stack, 64), Sockets(pins, stack, 128)
    for sockets, web, shop in ((old, 3, 6), (new, 6, 3)):
        sockets.maps["service_names"].update(U32.pack(web), pack_name(WEB))
        sockets.maps["service_names"].update(U32.pack(shop), pack_name(SHOP))
    for sockets, first in ((old, 1), (new, 2)):
        for number in range(2):
            backend = Backend(bytes((10, 244, 0, number)), 80, Protocol.TCP)
            sockets.maps.backends().write(first + number, backend, BackendState.ACTIVE)
    _set_affinity(old, 3, 1)
    _set_affinity(old, 6, 2)
    # The new programs have chosen for shop, whose new id is web's old one.
    _set_affinity(new, 3, 2)
    migration = MapMigration(pins, new.maps, new.programs)
    stack.callback(migration.close)
    migration.copy()
    assert (_affinity(new, 6), _affinity(new, 3)) == (2, 2)
    # What begins later is found by a later copy, which leaves what is there.
    _set_affinity(old, 6, 1)
    migration.copy()
    assert (_affinity(new, 6), _affinity(new, 3)) == (2, 2)


def test_keys_of_a_map_are_those_of_its_entries(pins: Path, stack: ExitStack) -> None:
    maps = Sockets(pins, stack, 64).maps
    names = maps["service_names"]
    names.update_many({U32.pack(number): pack_name(WEB) for number in range(5000)})
    assert names.keys() == {key for key, _ in names.items()}
    assert len(names.keys()) == 5000
    assert maps["affinity"].keys() == set()
