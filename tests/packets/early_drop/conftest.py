"""A node with as few ports as one packet looks at, with and without --bypass-netfilter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab import Lab, manifests
from tests.packets.early_drop.clients import (
    BACKENDS_OF_TWO,
    FIRST,
    LAST,
    NODE_PORTS_OF_TWO,
    TARGETS,
    Clients,
)
from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.wire import Wire


@pytest.fixture(scope="package", params=[False, True], ids=["masquerade", "bypass"])
def bypass(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def _service_of_two() -> list[manifests.Document]:
    ports = [
        {"name": each.lower(), "protocol": each, "port": PORTS[each][0], "nodePort": node_port}
        for each, node_port in NODE_PORTS_OF_TWO.items()
    ]
    targets = [{"name": each.lower(), "protocol": each, "port": target} for each, target in TARGETS.items()]
    slices = [
        manifests.slice_of("two", [manifests.endpoint(each, "node-b") for each in backends], ports=targets)
        for backends in BACKENDS_OF_TWO.values()
    ]
    cluster_ips = ["10.96.0.70", "fd00:10:96::70"]
    return [manifests.service("two", type="NodePort", clusterIPs=cluster_ips, ports=ports), *slices]


@pytest.fixture(scope="package")
def cluster(bypass: bool) -> Iterator[PacketCluster]:
    with Lab() as lab:
        options = ["--bypass-netfilter"] if bypass else []
        made = PacketCluster(lab, "--masquerade-ports", f"{FIRST}-{LAST}", *options, more=_service_of_two())
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
