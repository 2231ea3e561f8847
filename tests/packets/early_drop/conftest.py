"""A node with as few ports as one packet looks at, with and without --bypass-netfilter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab import Lab
from tests.packets.early_drop.clients import FIRST, LAST, Clients
from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.wire import Wire


@pytest.fixture(scope="package", params=[False, True], ids=["masquerade", "bypass"])
def bypass(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="package")
def cluster(bypass: bool) -> Iterator[PacketCluster]:
    with Lab() as lab:
        options = ["--bypass-netfilter"] if bypass else []
        made = PacketCluster(lab, "--masquerade-ports", f"{FIRST}-{LAST}", *options)
        yield made
        made.wire.close()


@pytest.fixture
def clients(wire: Wire, family: FamilyAddresses, tables: MapSet, bypass: bool) -> Iterator[Clients]:
    def clear() -> None:
        for key, _ in list(tables["conntrack"].items()):
            tables["conntrack"].delete(key)

    clear()
    yield Clients(wire, family, tables, bypass)
    clear()


@pytest.fixture(params=PORTS)
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found
