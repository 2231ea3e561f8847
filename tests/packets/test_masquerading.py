"""Whose address a backend of this node sees: by client, frontend and policies, and with masqueradeAll."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import Lab, manifests
from tests.packets.packet_cluster import PORTS, V4, V6, FamilyAddresses, PacketCluster
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import Wire

pytestmark = pytest.mark.root

_INTERNAL_LOCAL = {4: "10.96.0.80", 6: "fd00:10:96::80"}
FRONTENDS = (
    "cluster IP",
    "cluster IP, internal policy Local",
    "load balancer, policy Local",
    "NodePort, policy Local",
)


@pytest.fixture(scope="module", params=[[], ["--masquerade-all"]], ids=["default", "all"])
def node(request: pytest.FixtureRequest) -> Iterator[tuple[Wire, bool]]:
    """The node, and whether masqueradeAll is set."""
    ports = [{"name": each.lower(), "port": port, "protocol": each} for each, (port, _, _) in PORTS.items()]
    targets = [
        {"name": each.lower(), "port": target, "protocol": each} for each, (_, _, target) in PORTS.items()
    ]
    inside = manifests.service(
        "inside", clusterIPs=list(_INTERNAL_LOCAL.values()), internalTrafficPolicy="Local", ports=ports
    )
    slices = [
        manifests.slice_of("inside", [manifests.endpoint(family.local_pod, "node-a")], ports=targets)
        for family in (V4, V6)
    ]
    with Lab() as lab:
        made = PacketCluster(lab, *request.param, more=[inside, *slices])
        yield made.wire, bool(request.param)
        made.wire.close()


@pytest.mark.parametrize("protocol", PORTS)
@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("client", ["outside", "pod"])
def test_address_that_a_local_backend_sees(
    node: tuple[Wire, bool], family: FamilyAddresses, client: str, frontend: str, protocol: str, port: int
) -> None:
    """kube-proxy's rules: TestInternalExternalMasquerade (pkg/proxy/nftables) has the same rows.

    Clients outside are masqueraded at any cluster IP, and all clients with masqueradeAll, whatever the internal
    policy says; externalTrafficPolicy Local keeps the address in any case.
    """
    wire, masquerades_all = node
    service_port, _, target = PORTS[protocol]
    asked, number = {
        "cluster IP": (family.own, service_port),
        "cluster IP, internal policy Local": (_INTERNAL_LOCAL[family.version], service_port),
        "load balancer, policy Local": (family.local_balancer, service_port),
        "NodePort, policy Local": (family.node, 30200 + list(PORTS).index(protocol)),
    }[frontend]
    source, device = (family.client, "eth0") if client == "outside" else (family.client_pod, "p2")
    translated = wire.ingress(family.ip(source, asked) / segment(protocol, port, number), device).packet
    assert ends_of(translated) == (source, port, family.local_pod, target)
    left = wire.egress(translated.payload, "p1", iif=device).packet
    is_masqueraded = frontend.startswith("cluster IP") and (client == "outside" or masquerades_all)
    assert ends_of(left)[0] == (family.node_on_pods if is_masqueraded else source)
