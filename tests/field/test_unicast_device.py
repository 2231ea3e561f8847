"""Sockets of the host that name the device by which they send (IP_UNICAST_IF), as systemd-resolved's do.

The device is that of the route to the Service; a pod of the same node is behind another one. The kernel looks up the
route of a packet that netfilter has translated without the socket's device.
"""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from collections.abc import Iterator

import pytest

from ebpfproxy.datapath.kernel.socket_fields import find_socket_fields
from tests.e2e.outside_client import OutsideClientCluster
from tests.e2e.two_node_cluster import SERVICE_IPS
from tests.lab import Lab, clients

pytestmark = pytest.mark.root

_IP_UNICAST_IF, _IPV6_UNICAST_IF = 50, 76  # linux/in.h, linux/in6.h


@pytest.fixture(scope="module")
def cluster() -> Iterator[OutsideClientCluster]:
    if find_socket_fields() is None:
        pytest.skip("programs cannot read the option on this kernel")
    with Lab() as lab:
        made = OutsideClientCluster(lab)
        made.agent().start()
        yield made


def _spread(host: str, connected: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    for _ in range(clients.ENOUGH):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(3)
            device = struct.pack("!I", socket.if_nametoindex("eth0"))
            sock.setsockopt(socket.IPPROTO_IP, _IP_UNICAST_IF, device)
            if ":" in host:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_UNICAST_IF, device)
            if connected:
                sock.connect((host, 53))
                sock.send(b"?")
            else:
                sock.sendto(b"?", (host, 53))
            data, source = sock.recvfrom(4096)
            assert source[:2] == (host, 53)
            found[json.loads(data)["name"]] += 1
    return found


@pytest.mark.parametrize("family", SERVICE_IPS)
@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
def test_backends_beyond_other_devices_are_reached(
    cluster: OutsideClientCluster, family: str, connected: bool
) -> None:
    assert set(cluster.a.call(_spread, SERVICE_IPS[family], connected)) == {"w1", "w2"}
