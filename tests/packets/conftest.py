from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from tests.lab import Lab
from tests.packets.wire import Wire
from tests.packets.world import SIDES, PacketWorld, Side


@pytest.fixture(scope="package")
def world() -> Iterator[PacketWorld]:
    with Lab() as lab:
        made = PacketWorld(lab, "--service-cidr", "10.96.0.0/16,fd00:10:96::/112")
        yield made
        made.wire.close()


@pytest.fixture
def wire(world: PacketWorld) -> Wire:
    return world.wire


@pytest.fixture(scope="module")
def tables(world: PacketWorld) -> Iterator[MapSet]:
    opened = open_pinned(next((world.node.bpf_root / "ebpfproxy").glob("v*")))
    yield opened
    opened.close()


@pytest.fixture(params=SIDES, ids=["v4", "v6"])
def side(request: pytest.FixtureRequest) -> Side:
    found: Side = request.param
    return found


_ports = itertools.count(20000)


@pytest.fixture
def port() -> int:
    """A source port of a client that no other test uses."""
    return next(_ports)


@pytest.fixture
def new_port() -> Callable[[], int]:
    return lambda: next(_ports)
