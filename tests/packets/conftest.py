from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from ebpfproxy.datapath.kernel.maps import MapSet, open_pinned
from tests.lab import Lab
from tests.packets.packet_cluster import FAMILIES, FamilyAddresses, PacketCluster
from tests.packets.wire import Wire


@pytest.fixture(scope="package")
def cluster() -> Iterator[PacketCluster]:
    with Lab() as lab:
        made = PacketCluster(lab, "--service-cidr", "10.96.0.0/16,fd00:10:96::/112")
        yield made
        made.wire.close()


@pytest.fixture
def wire(cluster: PacketCluster) -> Wire:
    return cluster.wire


@pytest.fixture(scope="module")
def tables(cluster: PacketCluster) -> Iterator[MapSet]:
    opened = open_pinned(next((cluster.node.bpf_root / "ebpfproxy").glob("v*")))
    yield opened
    opened.close()


@pytest.fixture(params=FAMILIES, ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> FamilyAddresses:
    found: FamilyAddresses = request.param
    return found


_ports = itertools.count(20000)


@pytest.fixture
def port() -> int:
    """A source port of a client that no other test uses."""
    return next(_ports)


@pytest.fixture
def new_port() -> Callable[[], int]:
    return lambda: next(_ports)
