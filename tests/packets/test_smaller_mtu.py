"""A backend beyond a device that takes smaller packets than the client's, such as a tunnel."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from ebpfproxy.datapath.abi.layout import U32
from ebpfproxy.datapath.kernel.maps import MapSet
from tests.lab.waiting import until
from tests.packets.packet_cluster import PORTS, FamilyAddresses
from tests.packets.test_flows import ends_of, segment
from tests.packets.wire import PASS, Wire

pytestmark = pytest.mark.root

DEVICE = "narrow"
ADDRESSES = {4: "172.20.0.1", 6: "fd00:172:20::1"}


@pytest.fixture
def narrow(wire: Wire, tables: MapSet, family: FamilyAddresses) -> Iterator[str]:
    """The address of a device with a smaller MTU by which the backend is reached."""
    address, bits = ADDRESSES[family.version], "24" if family.version == 4 else "64"
    for command in (
        f"link add {DEVICE} mtu 1420 type veth peer name {DEVICE}-end",
        f"link set {DEVICE}-end up",
        f"link set {DEVICE} up",
        f"address add {address}/{bits} dev {DEVICE} {'nodad' if family.version == 6 else ''}",
        f"-{family.version} route add {family.remote_pod} dev {DEVICE}",
    ):
        wire.node.run(["ip", *command.split()])
    ifindex, rest = wire.node.run(["ip", "-o", "link", "show", DEVICE]).split(": ", 1)
    wire.devices[DEVICE] = int(ifindex), rest.split("link/ether ")[1][:17]

    def known() -> bytes:
        return tables["devices"].lookup(U32.pack(int(ifindex))) or b""

    until(lambda: ip_address(address).packed in known(), "the agent knows no such address")
    yield address
    del wire.devices[DEVICE]
    wire.node.run(["ip", "link", "del", DEVICE])
    until(lambda: not known(), "the agent keeps the device")


def test_client_is_masqueraded_by_the_address_of_the_device_that_leads_to_the_backend(
    wire: Wire, family: FamilyAddresses, narrow: str, port: int
) -> None:
    """As by the kernel: WireGuard drops what has another one, and a strict reverse path check on the other node may."""
    for protocol, (_, node_port, target) in PORTS.items():
        sent = family.ip(family.client, family.node) / segment(protocol, port, node_port, "S")
        translated = wire.ingress(sent)
        assert translated.verdict == PASS
        assert ends_of(translated.packet)[2:] == (family.remote_pod, target)
        out = wire.egress(translated.packet, DEVICE, iif="eth0")
        assert ends_of(out.packet)[0] == narrow
