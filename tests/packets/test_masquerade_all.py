"""masqueradeAll: whose address a backend of this node sees, by client and frontend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab import Lab
from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import Wire

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def masquerading() -> Iterator[Wire]:
    with Lab() as lab:
        made = PacketCluster(lab, "--masquerade-all")
        yield made.wire
        made.wire.close()


@pytest.mark.parametrize("protocol", PORTS)
@pytest.mark.parametrize("bound_for", ["cluster IP", "load balancer, policy Local", "NodePort, policy Local"])
@pytest.mark.parametrize("client", ["outside", "pod"])
def test_policy_local_keeps_the_clients_address_and_a_cluster_ip_does_not(
    masquerading: Wire, family: FamilyAddresses, client: str, bound_for: str, protocol: str, port: int
) -> None:
    """kube-proxy's rules, of which TestInternalExternalMasquerade (pkg/proxy/nftables) has these rows."""
    service_port, _, target = PORTS[protocol]
    frontend, asked = {
        "cluster IP": (family.own, service_port),
        "load balancer, policy Local": (family.local_balancer, service_port),
        "NodePort, policy Local": (family.node, 30200 + list(PORTS).index(protocol)),
    }[bound_for]
    source, device = (family.client, "eth0") if client == "outside" else (family.client_pod, "p2")
    translated = masquerading.ingress(
        family.ip(source, frontend) / segment(protocol, port, asked), device
    ).packet
    assert ends_of(translated) == (source, port, family.local_pod, target)
    left = masquerading.egress(translated.payload, "p1", iif=device).packet
    assert ends_of(left)[0] == (family.node_on_pods if bound_for == "cluster IP" else source)
