"""Routes that the kernel's own lookup passes over, but not its helper's."""

from __future__ import annotations

import pytest

from tests.packets.packet_cluster import PORTS, FamilyAddresses, PacketCluster
from tests.packets.test_flows import assert_passed, masqueraded_port, segment
from tests.packets.wire import Wire

pytestmark = pytest.mark.root


@pytest.mark.parametrize("protocol", PORTS)
def test_node_port_is_masqueraded_where_a_table_of_the_uplink_throws_the_backend_to_the_next_rule(
    cluster: PacketCluster, wire: Wire, family: FamilyAddresses, port: int, protocol: str
) -> None:
    _, node_port, target = PORTS[protocol]
    ip = ["ip", f"-{family.version}"]
    for command in ("route add throw {} table 4711", "rule add iif eth0 lookup 4711"):
        cluster.node.run([*ip, *command.format(family.remote_pod).split()])
    try:
        first = wire.ingress(family.ip(family.client, family.node) / segment(protocol, port, node_port))
    finally:
        cluster.node.run([*ip, *["rule", "delete", "iif", "eth0", "lookup", "4711"]])
        cluster.node.run([*ip, *["route", "flush", "table", "4711"]])
    assert_passed(first, family.client, port, family.remote_pod, target)
    assert masqueraded_port(wire, family, protocol, port, family.node) != port
